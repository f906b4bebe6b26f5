"""The loader is strict both ways, reads either layout, and quantises what it should."""

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.errors import UserError
from minilora.qlora.nf4 import Linear4bit
from minilora.weights import load as load_module
from minilora.weights.bnb_checkpoint import QuantizedEntry
from minilora.weights.load import LoadSettings, load_model
from tests.weights.test_hf_config import CONFIG


def random_weights(tied: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (40, 64), "model.norm.weight": (64,)}
    for i in range(2):
        layer = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = (64,)
        for name, rows in (("q", 64), ("k", 32), ("v", 32)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, 64)
            shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (64, 64)
        for name in ("gate", "up"):
            shapes[f"{layer}mlp.{name}_proj.weight"] = (128, 64)
        shapes[f"{layer}mlp.down_proj.weight"] = (64, 128)
    if not tied:
        shapes["lm_head.weight"] = (40, 64)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def _write(weights: dict[str, torch.Tensor] | None = None, **changes: object) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changes}), "utf-8")
        save_file(random_weights() if weights is None else weights, tmp_path / "model.safetensors")
        return tmp_path

    return _write


def test_every_tensor_arrives_unchanged(write: Callable[..., Path]) -> None:
    folder = write()
    model = load_model(folder, torch.bfloat16, "none")
    loaded = dict(model.named_parameters())
    expected = load_file(folder / "model.safetensors")
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert not any(parameter.requires_grad for parameter in loaded.values())


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_projections_and_nothing_else_are_quantised(write: Callable[..., Path], quantization: str) -> None:
    weights = random_weights(tied=False)
    model = load_model(write(weights, tie_word_embeddings=False), torch.bfloat16, quantization)
    quantised = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(quantised) == 14
    assert all(name.endswith("_proj") for name in quantised)
    dense = dict(model.named_parameters())
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(dense)
    q_proj = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert torch.equal(q_proj.bias, weights["model.layers.0.self_attn.q_proj.bias"])


def test_shards_are_read_through_their_index(write: Callable[..., Path]) -> None:
    folder = write()
    whole = load_model(folder, torch.float32, "none")
    weights = random_weights()
    names = sorted(weights)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((names[:9], names[9:])):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    sharded = load_model(folder, torch.float32, "none")
    for ours, theirs in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_head_of_a_tied_model_may_be_there(write: Callable[..., Path]) -> None:
    weights = random_weights()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    model = load_model(write(weights), torch.float32, "none")
    assert model.head_weight is model.model.embed_tokens.weight


def test_all_mismatches_are_in_one_message(write: Callable[..., Path]) -> None:
    weights = random_weights()
    del weights["model.norm.weight"]
    weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2)
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(64, 128)
    with pytest.raises(UserError) as error:
        load_model(write(weights), torch.float32, "none")
    message = str(error.value)
    assert message.startswith(f"{write(weights)}: ")
    assert "download both again" in message
    lines = sorted(line.strip() for line in message.splitlines()[1:])
    assert [line.partition(":")[0] for line in lines] == [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.norm.weight",
    ]
    assert "(64, 128)" in lines[0]
    assert "(128, 64)" in lines[0]
    assert "(64,)" in lines[2]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
    ],
)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_non_finite_weights_are_refused(write: Callable[..., Path], quantization: str, name: str, value: float) -> None:
    weights = random_weights()
    weights[name].view(-1)[-1] = value
    with pytest.raises(UserError, match=rf"model\.safetensors: {name} holds NaN or infinite values"):
        load_model(write(weights), torch.float32, quantization)


def test_the_constant_of_old_files_is_left_out_and_whole_numbers_are_no_weights(write: Callable[..., Path]) -> None:
    weights = random_weights() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    load_model(write(weights), torch.float32, "none")
    weights["model.norm.weight"] = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(UserError, match=r"model\.norm\.weight: .*torch\.int32"):
        load_model(write(weights), torch.float32, "none")


def test_a_checkpoint_that_is_quantised_in_several_ways_is_refused(write: Callable[..., Path]) -> None:
    nf4 = QuantizedEntry("a", "nf4", torch.Size([64, 64]), None, {})
    entries = {"a": nf4, "b": dataclasses.replace(nf4, quant_type="fp4", offset=0.5)}
    with pytest.raises(UserError, match=r"in several ways; use the original checkpoint"):
        load_module._check_quantization(entries, LoadSettings(torch.float32), write())


def test_progress_is_told_tensor_by_tensor(write: Callable[..., Path]) -> None:
    told: list[tuple[int, int]] = []
    model = load_model(write(), torch.float32, "none", on_progress=lambda done, total: told.append((done, total)))
    total = len(list(model.named_parameters()))
    assert told == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_everything_that_is_not_in_4_bits_has_the_compute_dtype(write: Callable[..., Path], quantization: str) -> None:
    model = load_model(write(), torch.float32, quantization)  # the file is in bfloat16
    held = [*model.parameters(), *(m.bias for m in model.modules() if isinstance(m, Linear4bit) and m.bias is not None)]
    assert len(held) > 6
    assert {tensor.dtype for tensor in held} == {torch.float32}


def test_every_tensor_goes_to_the_device(write: Callable[..., Path]) -> None:
    model = load_model(write(), torch.float32, "none", device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_of_many_mismatches_the_first_and_the_last_are_shown_and_the_others_counted(write: Callable[..., Path]) -> None:
    weights = random_weights()
    names = [f"spare.{number:02d}" for number in range(13)]
    for count in (10, 11, 13):
        with pytest.raises(UserError) as caught:
            load_model(write(weights | {name: torch.zeros(1) for name in names[:count]}), torch.float32, "none")
        lines = [line.partition(":")[0] for line in str(caught.value).split("\n  ")[1:]]
        more = [f"... {count - 10} more ..."] if count > 10 else []
        assert lines == [*names[:5], *more, *names[count - 5 : count]]


@pytest.mark.parametrize(("offset", "double"), [(None, "false"), (0.5, "true")])
def test_a_checkpoint_in_4_bits_says_how_it_wants_to_be_loaded(
    offset: float | None, double: str, tmp_path: Path
) -> None:
    entries = {"a": QuantizedEntry("a", "nf4", torch.Size([64, 64]), offset, {})}
    with pytest.raises(UserError) as caught:
        load_module._check_quantization(entries, LoadSettings(torch.float32, "fp4"), tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: ")
    assert f"; set model.quantization=nf4 model.double_quantization={double}, or use the original" in message


def test_loading_has_no_effect_on_the_process(write: Callable[..., Path]) -> None:
    before = dict(os.environ)
    load_model(write(), torch.float32)
    assert dict(os.environ) == before


def test_the_model_knows_where_flash_attention_was_tried(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[Any]()
    monkeypatch.setattr(load_module, "has_flash", lambda *given: asked.append(given) or True)
    model = load_model(tiny_checkpoint(), torch.bfloat16, "none")
    assert asked == [(torch.device("cpu"), torch.bfloat16, 16)]
    assert model.model.flash_attention == (torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(load_module, "has_flash", lambda *_: False)
    assert load_model(tiny_checkpoint(), torch.bfloat16, "none").model.flash_attention is None
