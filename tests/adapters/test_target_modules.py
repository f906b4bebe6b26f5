"""Which layers get an adapter, of which rank and alpha; what matches nothing, or in too many ways, is refused."""

from typing import Any

import pytest

from minilora.adapters.target_modules import MAX_WAYS, choose_targets, count_ways
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
    with pytest.raises(UserError, match=r"lora\.target_modules: .*down_proj, gate_proj"):
        chosen(target_modules)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_head_and_embedding_are_refused_with_the_reason(target: str) -> None:
    with pytest.raises(UserError, match=rf"lora\.target_modules: .*{target}.*head and embedding"):
        chosen(["q_proj", target])


@pytest.mark.parametrize("expression", ["[[", "(q_proj", "*"])
@pytest.mark.parametrize("key", ["target_modules", "rank_pattern", "alpha_pattern"])
def test_a_broken_expression_is_named(key: str, expression: str) -> None:
    with pytest.raises(UserError) as caught:
        chosen(**{key: expression if key == "target_modules" else {expression: 2}})
    assert str(caught.value).startswith(f"lora.{key}: {expression!r} is not a regular expression")


@pytest.mark.parametrize(
    "expression",
    [
        "(.*)*(.*)*(.*)*!",
        "(a+)+b",
        "(a?|.)*(.|.)*(..|.)*!",
        "(.|.){9,}!",
        "(?:(?:.?)+)!",
        r"([)]|.)*\)!",
        ".*.*.*.*.*!",
        ".?" * 30 + "!",
        "(|.)" * 30 + "!",
        "(?x)(.* # (\n)*!",
        "(?#[)(.*)*!",
        "(?i-x:.*)*!",
    ],
)
@pytest.mark.parametrize("key", ["target_modules", "rank_pattern"])
def test_an_expression_that_can_match_in_too_many_ways_is_refused(key: str, expression: str) -> None:
    with pytest.raises(UserError) as caught:
        chosen(**{key: expression if key == "target_modules" else {expression: 2}})
    assert str(caught.value).startswith(f"lora.{key}: {expression!r} ")
    assert "list the names of the layers" in str(caught.value)


@pytest.mark.parametrize(
    ("expression", "ways"),
    [
        ("q_proj", 1),
        (r"model\.layers\.[0-9]+\.(self_attn|mlp)\..*_proj", 16 * 2 * 16),
        (r".*layers\.(?:1?\d)\..*(?P<name>q|k|v)_proj", 16 * 2 * 16 * 3),
        (r"[(*+]\(\*[^]|](a)?", 2),
        ("(?:x*)?", 17),
        (".*.*.*.*", 16**4),
    ],
)
def test_the_ways_of_an_expression_are_those_of_its_repetitions_and_alternatives(expression: str, ways: int) -> None:
    assert count_ways(expression) == ways <= MAX_WAYS


@pytest.mark.parametrize("layers", [1, [0, 2], (2,)])
def test_layers_are_chosen_by_index(layers: int | list[int]) -> None:
    numbers = {layers} if isinstance(layers, int) else set(layers)
    wanted = [path for path in PATHS if int(path.split(".")[2]) in numbers and path.endswith(("q_proj", "up_proj"))]
    assert chosen(["q_proj", "up_proj"], layers_to_transform=layers) == wanted
    assert chosen(["q_proj", "up_proj"], layers_to_transform=layers, layers_pattern="layers") == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers_to_transform": [1, 3]}, r"lora\.layers_to_transform: .*\[3\]; .* 0 to 2"),
        ({"layers_to_transform": []}, r"lora\.layers_to_transform: "),
        ({"layers_to_transform": 0, "layers_pattern": "blocks"}, r"lora\.layers_to_transform: .*\[0\]"),
        ({"layers_to_transform": 0, "target_modules": ".*q_proj"}, r"lora\.layers_to_transform: .*'\.\*q_proj'"),
        ({"rank_pattern": {"qproj": 2}}, r"lora\.rank_pattern: 'qproj' .*remove it"),
        ({"alpha_pattern": {"qproj": 2}}, r"lora\.alpha_pattern: 'qproj' "),
    ],
)
def test_indices_and_patterns_that_match_nothing_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen(**arguments)


def test_of_two_patterns_for_a_path_the_first_counts() -> None:
    patterns = {"rank_pattern": {"layers.1.*": 2, "q_proj": 3}, "alpha_pattern": {"q_proj": 1.5}}
    found = choose_targets(PATHS, LoraConfig(target_modules=["q_proj"], **patterns))
    assert [(target.r, target.alpha) for target in found] == [(3, 1.5), (2, 1.5), (3, 1.5)]
