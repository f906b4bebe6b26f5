"""Which layers get an adapter, of which rank and alpha; what matches nothing, or for ever, is refused."""

import time
from typing import Any

import pytest

from minilora.adapters import target_modules
from minilora.adapters.target_modules import choose_targets
from minilora.config import LoraConfig
from minilora.errors import UserError

NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
NAMES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PATHS = [f"model.layers.{layer}.{name}" for layer in range(3) for name in NAMES]


def chosen(target_modules: str | list[str] = "all-linear", **patterns: Any) -> list[str]:
    return [t.path for t in choose_targets(PATHS, LoraConfig(target_modules=target_modules, **patterns))]


@pytest.mark.parametrize(
    ("target_modules", "count"),
    [
        ("all-linear", 21),
        (["q_proj", "v_proj"], 6),
        (["layers.1.mlp.up_proj"], 1),
        (r".*\.1\.self_attn\..*", 4),
        (r"model.layers.[02].mlp.(up|down)_proj", 4),
        ("k_proj", 3),
    ],
)
def test_targets_are_names_paths_or_a_pattern(target_modules: str | list[str], count: int) -> None:
    found = chosen(target_modules)
    assert len(found) == count
    assert found == [path for path in PATHS if path in found]


@pytest.mark.parametrize("target_modules", [["q_proj", "qproj"], "nothing.*", ["proj"], []])
def test_a_target_that_matches_nothing_lists_the_choices(target_modules: str | list[str]) -> None:
    with pytest.raises(UserError, match=r"lora\.target_modules: .* match no linear layer; .*down_proj, gate_proj"):
        chosen(target_modules)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_head_and_embedding_are_refused_with_the_reason(target: str) -> None:
    with pytest.raises(UserError, match="head and embedding cannot be adapted"):
        chosen(["q_proj", target])


def test_a_broken_pattern_is_named() -> None:
    with pytest.raises(UserError, match=r"'\[\[' is not a regular expression \(Possible nested set at position 1\)"):
        chosen("[[")
    with pytest.raises(UserError, match=r"lora\.target_modules: '\(q_proj' is not a regular expression"):
        chosen("(q_proj")
    with pytest.raises(UserError, match=r"lora\.rank_pattern: '\*' is not a regular expression"):
        chosen(rank_pattern={"*": 2})


@pytest.mark.parametrize("expression", ["(.*)*(.*)*(.*)*!", "(a?|.)*(.|.)*(..|.)*!"])
def test_a_pattern_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch, expression: str) -> None:
    monkeypatch.setattr(target_modules, "MATCH_TIMEOUT_S", 0.5)
    started = time.monotonic()
    with pytest.raises(UserError, match="takes for ever to match; write it without a repetition"):
        choose_targets(["a" * 400], LoraConfig(target_modules=expression))
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("layers", [1, [0, 2], (2,)])
def test_layers_are_chosen_by_number(layers: int | list[int]) -> None:
    numbers = {layers} if isinstance(layers, int) else set(layers)
    wanted = [path for path in PATHS if int(path.split(".")[2]) in numbers and path.endswith(("q_proj", "up_proj"))]
    assert chosen(["q_proj", "up_proj"], layers_to_transform=layers) == wanted
    assert chosen(["q_proj", "up_proj"], layers_to_transform=layers, layers_pattern="layers") == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers_to_transform": [1, 3]}, r"no target stands in layers \[3\]; expected numbers from 0 to 2"),
        ({"layers_to_transform": []}, "no target stands in layers"),
        ({"layers_to_transform": 0, "layers_pattern": "blocks"}, r"in layers \[0\]; the targets stand in none"),
        ({"layers_to_transform": 0, "target_modules": ".*q_proj"}, "put the layers' numbers into the expression"),
        ({"rank_pattern": {"qproj": 2}}, "lora.rank_pattern: 'qproj' matches no linear layer; correct or remove it"),
        ({"alpha_pattern": {"qproj": 2}}, "lora.alpha_pattern: 'qproj' matches no linear layer"),
    ],
)
def test_numbers_and_patterns_that_match_nothing_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen(**arguments)


def test_of_two_patterns_for_a_path_the_first_counts() -> None:
    patterns = {"rank_pattern": {"layers.1.*": 2, "q_proj": 3}, "alpha_pattern": {"q_proj": 1.5}}
    found = choose_targets(PATHS, LoraConfig(target_modules=["q_proj"], **patterns))
    assert [(target.r, target.alpha) for target in found] == [(3, 1.5), (2, 1.5), (3, 1.5)]
