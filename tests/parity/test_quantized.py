"""4-bit checkpoints in both directions with transformers itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from minilora.load import load_model
from minilora.prompt import Example
from minilora.quantized import save_quantized
from parity.reference import load_reference, our_logits, reference_logits

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_what_transformers_saved_loads_as_the_weights_that_we_make(
    reference_checkpoint: Callable[..., Path], tmp_path: Path, tie: bool, quant_type: str, double: bool
) -> None:
    folder = reference_checkpoint(tie=tie)
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=how)
    reference.save_pretrained(tmp_path / "saved")
    found = load_model(tmp_path / "saved", torch.float32, quant_type, double).state_dict()
    expected = load_model(folder, torch.float32, quant_type, double).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_transformers_computes_the_same_with_what_we_saved(
    reference_checkpoint: Callable[..., Path], examples: list[Example], tmp_path: Path, tie: bool
) -> None:
    folder = reference_checkpoint(tie=tie)
    model = load_model(folder, torch.float32, "nf4")
    save_quantized(model, folder, tmp_path / "ours")
    # As load_reference: out of training, bitsandbytes multiplies in bfloat16 on some processors.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).train()
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    pairs = zip(our_logits(model, examples), reference_logits(theirs, examples), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=0, atol=3e-5)
    same = zip(
        reference_logits(load_reference(folder, nf4=True), examples), reference_logits(theirs, examples), strict=True
    )
    assert all(torch.equal(a, b) for a, b in same)
