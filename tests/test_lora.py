"""The LoRA layer's formulas, its gradients, its dropout, and where it is attached."""

import math

import pytest
import torch
from torch import nn

from minilora.errors import UserError
from minilora.lora import (
    Again,
    DropoutSeed,
    LoRALinear,
    adapter_disabled,
    attach,
    dropped_places,
    iter_lora_layers,
    lora_parameters,
    lora_scaling,
    project,
)
from minilora.model import Qwen2Config, Qwen2ForCausalLM
from minilora.nf4 import Linear4bit, quantize


def tiny_model(tied: bool = True) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(50, 16, 24, 2, 4, 2, 1e-6, 1e4, tied))


def layer_over(base: nn.Module, dropout: float = 0.0) -> LoRALinear:
    layer = LoRALinear(base, 3, 0.5, dropout, 7, DropoutSeed())  # type: ignore[arg-type]
    for parameter in (layer.lora_A, layer.lora_B):
        parameter.data = torch.randn_like(parameter)
    return layer


def frozen_linear(quantization: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    weight, bias = torch.randn(10, 64, dtype=dtype), torch.randn(10, dtype=dtype)
    if quantization == "nf4":
        return Linear4bit(quantize(weight), bias)
    base = nn.Linear(64, 10, dtype=dtype)
    base.weight = nn.Parameter(weight, requires_grad=False)
    base.bias = nn.Parameter(bias, requires_grad=False)
    return base


def by_hand(layer: LoRALinear, x: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    kept = x
    if layer.dropout and layer.training:
        dropped = dropped_places(x.shape, layer.dropout, layer._dropout_seed.value * 4096 + layer.index, x.device)
        kept = x * (~dropped) / (1 - layer.dropout)
    return x @ dense.T + layer.base.bias + layer.scaling * (kept @ layer.lora_A.T) @ layer.lora_B.T


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_output_and_every_gradient_equal_autograd_on_the_formula(quantization: str, dropout: float) -> None:
    base = frozen_linear(quantization, torch.float32)
    dense = base.dense_weight(torch.float32) if isinstance(base, Linear4bit) else base.weight
    layer = layer_over(base, dropout)
    x = torch.randn(5, 64, requires_grad=True)
    dy = torch.randn(5, 10)
    wanted = torch.autograd.grad(by_hand(layer, x, dense), (x, layer.lora_A, layer.lora_B), dy)
    found = torch.autograd.grad(layer(x), (x, layer.lora_A, layer.lora_B), dy)
    torch.testing.assert_close(layer(x), by_hand(layer, x, dense))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # sums of 64 float32 terms, other order


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradient_equals_finite_differences(dropout: float) -> None:
    base = nn.Linear(6, 4, dtype=torch.float64).requires_grad_(False)
    layer = layer_over(base, dropout).double()

    def forward(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(forward, (x, layer.lora_A, layer.lora_B))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_layers_over_one_input_equal_autograd_on_each_formula(dropout: float) -> None:
    """Two adapters of different rank and one layer without any, as a pattern of targets may leave them."""
    seed = DropoutSeed()
    bases = [nn.Linear(6, out, dtype=torch.float64).requires_grad_(False) for out in (4, 5, 3)]
    first, second = (LoRALinear(bases[i], r, 0.5, dropout, 7, seed).double() for i, r in ((0, 3), (1, 2)))
    for layer in (first, second):
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    inputs = (x, first.lora_A, first.lora_B, second.lora_A, second.lora_B)
    found = project(x, (first, bases[2], second))
    wanted = (by_hand(first, x, bases[0].weight), bases[2](x), by_hand(second, x, bases[1].weight))
    dys = [torch.randn_like(y) for y in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    pairs = zip(torch.autograd.grad(found, inputs, dys), torch.autograd.grad(wanted, inputs, dys), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


def test_an_input_that_is_made_again_is_not_kept_and_changes_no_gradient() -> None:
    layer = layer_over(nn.Linear(64, 10, dtype=torch.float32).requires_grad_(False))
    source = torch.randn(5, 64, requires_grad=True)
    dy = torch.randn(5, 10)

    def gradients(again: Again | None) -> tuple[tuple[torch.Tensor, ...], list[int]]:
        kept: list[int] = []

        def remember(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.data_ptr())
            return tensor

        x = source.detach().exp().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            (y,) = project(x, (layer,), again)
        return torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), dy), [x.data_ptr() in kept]

    (kept_grads, kept), (again_grads, kept_again) = gradients(None), gradients(Again(torch.exp, (source.detach(),)))
    assert (kept, kept_again) == ([True], [False])
    assert all(torch.equal(a, b) for a, b in zip(kept_grads, again_grads, strict=True))


def test_dropout_is_a_function_of_its_seed() -> None:
    shape, device = torch.Size((30, 41)), torch.device("cpu")
    assert torch.equal(dropped_places(shape, 0.3, 5, device), dropped_places(shape, 0.3, 5, device))
    assert not torch.equal(dropped_places(shape, 0.3, 5, device), dropped_places(shape, 0.3, 6, device))


@pytest.mark.parametrize("probability", [0.05, 0.5])
def test_dropout_meets_its_probability(probability: float) -> None:
    count = 400_000
    share = dropped_places(torch.Size((count,)), probability, 3, torch.device("cpu")).double().mean().item()
    # Five standard deviations of a mean of `count` draws.
    assert abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / count)


def test_dropout_masks_differ_between_steps_micro_batches_and_layers() -> None:
    seen = set()
    dropout_seed = DropoutSeed()
    for step in range(4):
        for micro_batch in range(3):
            dropout_seed.set(42, step, micro_batch)
            seen.add(dropout_seed.value)
    assert len(seen) == 12
    base = nn.Linear(64, 64)
    first, second = (LoRALinear(base, 2, 1.0, 0.5, index, dropout_seed) for index in (0, 1))
    x = torch.ones(8, 64)
    for layer in (first, second):
        nn.init.eye_(layer.lora_A)
        nn.init.ones_(layer.lora_B)
    assert not torch.equal(first(x), second(x))


def test_evaluation_draws_no_dropout() -> None:
    layer = layer_over(nn.Linear(64, 10), 0.5).eval()
    x = torch.randn(4, 64)
    dropless = by_hand(layer, x, layer.base.weight)
    torch.testing.assert_close(layer(x), dropless, rtol=1e-5, atol=1e-5)


def test_an_untrained_adapter_changes_nothing_to_the_bit() -> None:
    base = nn.Linear(64, 10)
    layer = LoRALinear(base, 4, 2.0, 0.0, 0, DropoutSeed())
    x = torch.randn(9, 64)
    assert torch.equal(layer(x), base(x))


def test_first_values_are_kaiming_uniform_and_zero() -> None:
    model = tiny_model()
    attach(model, 8, 16)
    for _, layer in iter_lora_layers(model):
        bound = 1 / math.sqrt(layer.base.in_features)
        assert layer.lora_A.abs().max() <= bound
        assert layer.lora_A.abs().max() > 0.8 * bound
        assert not layer.lora_B.any()
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32


def test_attach_trains_the_adapter_alone() -> None:
    model = tiny_model()
    attach(model, 2, 4)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.endswith(("lora_A", "lora_B")) for name in trained)
    assert len(trained) == len(lora_parameters(model)) == 2 * 7 * 2


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", 14),
        (["q_proj", "v_proj"], 4),
        (["layers.1.mlp.up_proj"], 1),
        (r".*\.1\.self_attn\..*", 4),
        ("k_proj", 2),
    ],
)
def test_targets_are_names_paths_or_a_pattern(targets: str | list[str], count: int) -> None:
    model = tiny_model()
    attach(model, 2, 4, target_modules=targets)
    assert len(list(iter_lora_layers(model))) == count


@pytest.mark.parametrize("targets", [["q_proj", "qproj"], "nothing.*", ["proj"], []])
def test_a_target_that_matches_nothing_lists_the_choices(targets: str | list[str]) -> None:
    with pytest.raises(UserError, match=r"lora\.target_modules: .* match no linear layer; .*down_proj, gate_proj"):
        attach(tiny_model(), 2, 4, target_modules=targets)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_head_and_embedding_are_refused_with_the_reason(tied: bool, target: str) -> None:
    with pytest.raises(UserError, match="head and embedding cannot be adapted"):
        attach(tiny_model(tied), 2, 4, target_modules=["q_proj", target])


def test_a_broken_pattern_is_named() -> None:
    with pytest.raises(UserError, match=r"'\[\[' is not a regular expression \(Possible nested set at position 1\)"):
        attach(tiny_model(), 2, 4, target_modules="[[")
    with pytest.raises(UserError, match=r"'\(q_proj' is not a regular expression"):
        attach(tiny_model(), 2, 4, target_modules="(q_proj")


def test_scaling() -> None:
    assert lora_scaling(8, 16, use_rslora=False) == 2
    assert lora_scaling(16, 16, use_rslora=True) == 4


def test_disabled_adapter_is_the_base_and_comes_back() -> None:
    model = tiny_model()
    attach(model, 2, 4)
    layers = [layer for _, layer in iter_lora_layers(model)]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 16)
    with adapter_disabled(model):
        assert torch.equal(layers[0](x), layers[0].base(x))
    assert not torch.equal(layers[0](x), layers[0].base(x))
