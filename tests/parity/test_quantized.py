"""4-bit checkpoints in both directions with transformers itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from minilora.qlora.prompt import Example
from minilora.weights.bnb_checkpoint import write_quantized
from minilora.weights.load import load_model
from minilora.weights.safetensors_io import read_checkpoint_entries
from tests.parity.reference import load_reference, our_logits, reference_logits

pytestmark = pytest.mark.parity

DYNAMIC = ["lm_head", "multi_modal_projector", "model.layers.0.mlp", "model.layers.1.self_attn.q_proj"]  # as unsloth's


def quantize_with_transformers(
    folder: Path, saved: Path, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB", **how: Any
) -> Path:
    """`saved`: the checkpoint in `folder`, quantised and written by transformers."""
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype, **how}
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)
    model.save_pretrained(saved, max_shard_size=max_shard_size)
    return saved


def open_with_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """What transformers makes of `folder`, computing in `dtype` whatever type the file names, which it would take.

    As `load_reference`: out of training, bitsandbytes multiplies in bfloat16 on some processors.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype, module.compute_type_is_set = dtype, True
    return model


def assert_equal_logits(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """Both in float32; sums in another order, of logits up to 5."""
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=3e-5)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_what_transformers_saved_is_what_we_make_and_computes_the_same(
    reference_checkpoint: Callable[..., Path],
    examples: list[Example],
    tmp_path: Path,
    tie: bool,
    quant_type: str,
    double: bool,
) -> None:
    folder = reference_checkpoint(tie=tie)
    how = {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": double}
    saved = quantize_with_transformers(folder, tmp_path / "saved", **how)
    model = load_model(saved, torch.float32, quant_type, double)
    found, expected = model.state_dict(), load_model(folder, torch.float32, quant_type, double).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    theirs = open_with_transformers(saved)
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert_equal_logits(our_logits(model, examples), reference_logits(theirs, examples))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_file_of_another_compute_type_is_read(
    reference_checkpoint: Callable[..., Path], examples: list[Example], tmp_path: Path, dtype: torch.dtype
) -> None:
    saved = quantize_with_transformers(reference_checkpoint(), tmp_path / "saved", dtype)
    exact = our_logits(load_model(saved, torch.float32), examples)
    assert_equal_logits(exact, reference_logits(open_with_transformers(saved), examples))
    # In the file's own type neither side is exact: ours is no farther from float32 than theirs, but for chance.
    ours, theirs = our_logits(load_model(saved, dtype), examples), open_with_transformers(saved, dtype)
    errors = [
        torch.cat([(a.float() - b).flatten() for a, b in zip(logits, exact, strict=True)]).square().mean().sqrt()
        for logits in (ours, reference_logits(theirs, examples))
    ]
    assert 0 < errors[0] < 1.2 * errors[1]


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=["bfloat16", "half", "float32"])
def test_codes_that_are_stored_as_another_type_are_the_same(
    reference_checkpoint: Callable[..., Path], tmp_path: Path, storage: torch.dtype
) -> None:
    """As `bnb_4bit_quant_storage` says, so that FSDP can cut them as it cuts the other weights."""
    folder = reference_checkpoint()
    saved = quantize_with_transformers(folder, tmp_path / "saved", bnb_4bit_quant_storage=storage)
    entries = read_checkpoint_entries(saved)
    assert entries["model.layers.0.mlp.up_proj.weight"].dtype == storage
    found, expected = (load_model(path, torch.float32).state_dict() for path in (saved, folder))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_file_in_shards_is_read(
    reference_checkpoint: Callable[..., Path], examples: list[Example], tmp_path: Path
) -> None:
    saved = quantize_with_transformers(reference_checkpoint(tie=False), tmp_path / "saved", max_shard_size="4KB")
    index = json.loads((saved / "model.safetensors.index.json").read_text("utf-8"))["weight_map"]
    name = "model.layers.0.mlp.up_proj.weight"
    parts = {shard for key, shard in index.items() if key.startswith(name)}
    assert len(set(index.values())) > 2
    assert len(parts) > 1, "one weight's parts stand in several files"
    logits = our_logits(load_model(saved, torch.float32), examples)
    assert_equal_logits(logits, reference_logits(open_with_transformers(saved), examples))


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_modules_that_were_left_in_full_are_read_and_written(
    reference_checkpoint: Callable[..., Path], examples: list[Example], tmp_path: Path, tie: bool
) -> None:
    folder = reference_checkpoint(tie=tie)
    saved = quantize_with_transformers(folder, tmp_path / "saved", llm_int8_skip_modules=DYNAMIC)
    model = load_model(saved, torch.float32)
    full = {path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    assert full == {
        *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
        "model.layers.1.self_attn.q_proj",
    }
    logits = our_logits(model, examples)
    assert_equal_logits(logits, reference_logits(open_with_transformers(saved), examples))
    write_quantized(model, saved, tmp_path / "ours", {})
    assert_equal_logits(logits, reference_logits(open_with_transformers(tmp_path / "ours"), examples))


def test_a_head_that_transformers_quantised_is_read(
    reference_checkpoint: Callable[..., Path], examples: list[Example], tmp_path: Path
) -> None:
    folder = reference_checkpoint(tie=False)
    saved = quantize_with_transformers(folder, tmp_path / "saved", llm_int8_skip_modules=["model.layers.0.mlp"])
    theirs = open_with_transformers(saved)
    assert type(theirs.lm_head).__name__ == "Linear4bit"
    model = load_model(saved, torch.float32)
    assert not torch.equal(model.head_weight, load_model(folder, torch.float32).head_weight)
    assert_equal_logits(our_logits(model, examples), reference_logits(theirs, examples))


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_transformers_computes_the_same_with_what_we_saved(
    reference_checkpoint: Callable[..., Path],
    examples: list[Example],
    tmp_path: Path,
    tie: bool,
    quant_type: str,
    double: bool,
) -> None:
    folder = reference_checkpoint(tie=tie)
    model = load_model(folder, torch.float32, quant_type, double)
    write_quantized(model, folder, tmp_path / "ours", {})
    theirs = open_with_transformers(tmp_path / "ours")
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    found = reference_logits(theirs, examples)
    assert_equal_logits(our_logits(model, examples), found)
    if (quant_type, double) == ("nf4", True):
        reference = reference_logits(load_reference(folder, nf4=True), examples)
        assert all(torch.equal(a, b) for a, b in zip(reference, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_transformers_takes_the_type_that_we_saved_in(
    reference_checkpoint: Callable[..., Path], examples: list[Example], tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = reference_checkpoint()
    write_quantized(load_model(folder, dtype), folder, tmp_path / "ours", {})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert theirs.dtype == theirs.model.layers[0].mlp.up_proj.compute_dtype == dtype
    exact = reference_logits(open_with_transformers(tmp_path / "ours"), examples)
    assert_equal_logits(our_logits(load_model(tmp_path / "ours", torch.float32), examples), exact)
