"""A recomputed layer gives the gradients of one that is kept, and computes no more than they need."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from minilora.adapters.attach import attach, lora_parameters
from minilora.config import LoraConfig
from minilora.qlora.batch import pack
from minilora.qlora.loss import next_token_nll
from minilora.qlora.model import Qwen2Config, Qwen2ForCausalLM
from minilora.qlora.nf4 import Linear4bit, quantize
from minilora.qlora.prompt import Example


def build(**lora: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(50, 64, 128, 2, 4, 2, 1e-6, 1e4, True))
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Linear4bit(quantize(module.weight), module.bias))
    attach(model, LoraConfig(r=2, alpha=4, dropout=0.25, **lora))
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    return model.train()


def gradients(model: Qwen2ForCausalLM, checkpointing: bool) -> list[torch.Tensor]:
    model.model.gradient_checkpointing = checkpointing
    examples = [Example([1, 2, *range(3, 6 + i), 7, 8], [False] * (5 + i) + [True] * 2) for i in range(4)]
    batch = pack(examples)
    loss, _ = next_token_nll(model(batch), batch.targets, model.head_weight)
    return list(torch.autograd.grad(loss, lora_parameters(model)))


@pytest.mark.parametrize(
    "lora",
    [{}, {"use_dora": True}, {"target_modules": ["q_proj", "up_proj"]}, {"target_modules": ["down_proj"]}],
    ids=["all", "dora", "without down_proj", "down_proj only"],
)
def test_checkpointing_changes_no_bit_of_a_gradient(lora: dict[str, Any]) -> None:
    model = build(**lora)
    kept, recomputed = gradients(model, False), gradients(model, True)
    assert all(x.any() for x in kept)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_the_product_that_no_gradient_needs_is_not_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    names = {module: path.split(".")[-2] for path, module in model.named_modules() if isinstance(module, Linear4bit)}
    counts: Counter[str] = Counter()
    dense_weight = Linear4bit.dense_weight

    def counted(layer: Linear4bit, dtype: torch.dtype) -> torch.Tensor:
        counts[names[layer]] += 1
        return dense_weight(layer, dtype)

    monkeypatch.setattr(Linear4bit, "dense_weight", counted)
    gradients(model, True)
    assert counts["down_proj"] == 2 * 2  # of two layers: forward and backward
    assert counts["o_proj"] == counts["up_proj"] == 2 * 3  # recomputed too
