"""The LoRA layer's formulas, its gradients and its dropout, with DoRA, a trained bias and PiSSA too."""

import math

import pytest
import torch
from torch import nn

from minilora.qlora.dora import BLOCK_ROWS
from minilora.qlora.dropout import DropoutSeed, dropout_mask
from minilora.qlora.lora import (
    Again,
    LoRALinear,
    LoRAWeights,
    merged_weight,
    project,
)
from minilora.qlora.nf4 import Linear4bit, quantize


def layer_over(
    base: nn.Linear | Linear4bit, dropout: float = 0.0, r: int = 3, seed: DropoutSeed | None = None
) -> LoRALinear:
    """A layer with one active adapter of random values and scale 0.5."""
    layer = LoRALinear(base)
    w = LoRAWeights((base.out_features, base.in_features), r, 1.5, 0.5, dropout, 7, seed or DropoutSeed(), "cpu")
    for parameter in (w.lora_A, w.lora_B):
        parameter.data = torch.randn_like(parameter)
    layer.adapters["default"] = w
    layer.active = "default"
    return layer


def weights_of(layer: LoRALinear) -> LoRAWeights:
    assert layer.weights is not None
    return layer.weights


def frozen_linear(quantization: str, dtype: torch.dtype) -> nn.Linear | Linear4bit:
    torch.manual_seed(1)
    weight, bias = torch.randn(10, 64, dtype=dtype), torch.randn(10, dtype=dtype)
    if quantization == "nf4":
        return Linear4bit(quantize(weight), bias)
    base = nn.Linear(64, 10, dtype=dtype)
    base.weight = nn.Parameter(weight, requires_grad=False)
    base.bias = nn.Parameter(bias, requires_grad=False)
    return base


def by_hand(layer: LoRALinear, x: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    w, kept = weights_of(layer), x
    dropout, seed = w.dropout_now()
    if dropout:
        kept = x * (~dropout_mask(x.shape, dropout, seed, x.device)) / (1 - dropout)
    bias = layer.base.bias if w.bias is None else w.bias
    product = x @ dense.T + w.scaling * (kept @ w.lora_A.T) @ w.lora_B.T
    if w.lora_magnitude_vector is not None:
        length = (dense + w.scaling * w.lora_B @ w.lora_A).norm(dim=1).detach()
        product = w.lora_magnitude_vector / length * product
    return product + bias


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_output_and_every_gradient_equal_autograd_on_the_formula(quantization: str, dropout: float) -> None:
    base = frozen_linear(quantization, torch.float32)
    dense = base.dense_weight(torch.float32) if isinstance(base, Linear4bit) else base.weight
    layer = layer_over(base, dropout)
    x = torch.randn(5, 64, requires_grad=True)
    dy = torch.randn(5, 10)
    inputs = (x, *weights_of(layer).parameters())
    wanted = torch.autograd.grad(by_hand(layer, x, dense), inputs, dy)
    found = torch.autograd.grad(layer(x), inputs, dy)
    torch.testing.assert_close(layer(x), by_hand(layer, x, dense))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # sums of 64 float32 terms, other order


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradient_equals_finite_differences(dropout: float) -> None:
    base = nn.Linear(6, 4, dtype=torch.float64).requires_grad_(False)
    layer = layer_over(base, dropout).double()

    def forward(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        named = {"adapters.default.lora_A": a, "adapters.default.lora_B": b}
        return torch.func.functional_call(layer, named, (x,))

    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(forward, (x, weights_of(layer).lora_A, weights_of(layer).lora_B))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_layers_over_one_input_equal_autograd_on_each_formula(dropout: float) -> None:
    """Two adapters of different rank and one layer without any, as a pattern of targets may leave them."""
    seed = DropoutSeed()
    bases = [nn.Linear(6, out, dtype=torch.float64).requires_grad_(False) for out in (4, 5, 3)]
    first, second = (layer_over(bases[i], dropout, r, seed).double() for i, r in ((0, 3), (1, 2)))
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    inputs = (x, *weights_of(first).parameters(), *weights_of(second).parameters())
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
        return torch.autograd.grad(y, (x, *weights_of(layer).parameters()), dy), [x.data_ptr() in kept]

    (kept_grads, kept), (again_grads, kept_again) = gradients(None), gradients(Again(torch.exp, (source.detach(),)))
    assert (kept, kept_again) == ([True], [False])
    assert all(torch.equal(a, b) for a, b in zip(kept_grads, again_grads, strict=True))


def test_dropout_is_a_function_of_its_seed() -> None:
    shape, device = torch.Size((30, 41)), torch.device("cpu")
    assert torch.equal(dropout_mask(shape, 0.3, 5, device), dropout_mask(shape, 0.3, 5, device))
    assert not torch.equal(dropout_mask(shape, 0.3, 5, device), dropout_mask(shape, 0.3, 6, device))


@pytest.mark.parametrize("probability", [0.05, 0.5])
def test_dropout_meets_its_probability(probability: float) -> None:
    count = 400_000
    share = dropout_mask(torch.Size((count,)), probability, 3, torch.device("cpu")).double().mean().item()
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
    first, second = (layer_over(base, 0.5, 2, dropout_seed) for _ in range(2))
    weights_of(second).index += 1
    x = torch.ones(8, 64)
    for layer in (first, second):
        nn.init.eye_(weights_of(layer).lora_A)
        nn.init.ones_(weights_of(layer).lora_B)
    assert not torch.equal(first(x), second(x))


def test_evaluation_draws_no_dropout() -> None:
    layer = layer_over(nn.Linear(64, 10), 0.5).eval()
    x = torch.randn(4, 64)
    dropless = by_hand(layer, x, layer.base.weight)
    torch.testing.assert_close(layer(x), dropless, rtol=1e-5, atol=1e-5)


def with_everything(layer: LoRALinear) -> LoRALinear:
    """DoRA and a trained bias, both of random values."""
    w = weights_of(layer)
    w.lora_magnitude_vector = nn.Parameter(1 + torch.rand(layer.base.out_features))
    w.bias = nn.Parameter(torch.randn(layer.base.out_features))
    return layer


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_dora_and_a_trained_bias_equal_autograd_on_the_formula(quantization: str, dropout: float) -> None:
    base = frozen_linear(quantization, torch.float32)
    dense = base.dense_weight(torch.float32) if isinstance(base, Linear4bit) else base.weight
    layer = with_everything(layer_over(base, dropout))
    x, dy = torch.randn(5, 64, requires_grad=True), torch.randn(5, 10)
    inputs = (x, *weights_of(layer).parameters())
    assert len(inputs) == 5
    torch.testing.assert_close(layer(x), by_hand(layer, x, dense), rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(by_hand(layer, x, dense), inputs, dy)
    for ours, theirs in zip(torch.autograd.grad(layer(x), inputs, dy), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # sums of 64 float32 terms, other order


def test_layers_with_all_and_with_nothing_share_an_input() -> None:
    """One with DoRA and a bias of its own, one plain, one bias alone (rank 0), one without an adapter."""
    bases = [nn.Linear(6, out, dtype=torch.float64).requires_grad_(False) for out in (4, 5, 3, 2)]
    seed = DropoutSeed()
    layers = [with_everything(layer_over(bases[0], 0.25, 3, seed)).double()]
    layers += [layer_over(bases[1], 0.25, 2, seed).double(), layer_over(bases[2], 0.25, 0, seed).double()]
    weights_of(layers[2]).bias = nn.Parameter(torch.randn(3, dtype=torch.float64))
    x = torch.randn(BLOCK_ROWS + 5, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x, *(p for layer in layers for p in weights_of(layer).parameters() if p.numel())]
    found = project(x, (*layers, bases[3]))
    wanted = (*(by_hand(layer, x, layer.base.weight) for layer in layers), bases[3](x))
    dys = [torch.randn_like(y) for y in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    gradients = (torch.autograd.grad(ys, inputs, dys) for ys in (found, wanted))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_magnitude_in_bfloat16_is_multiplied_in_float32() -> None:
    """A magnitude learns in steps that bfloat16 cannot tell apart; the output has to see them."""
    base = nn.Linear(64, 10, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer = layer_over(base)
    w = weights_of(layer)
    nn.init.zeros_(w.lora_B)
    w.lora_magnitude_vector = nn.Parameter(w.base_squares(base.weight).sqrt() * 1.003)
    x = torch.randn(400, 64, dtype=torch.bfloat16)
    ratio = (layer(x).float().abs().sum() / base(x).float().abs().sum()).item()
    assert ratio == pytest.approx(1.003, abs=4e-4)  # 4,000 roundings of up to 0.4 %, either way


def test_pissas_principal_part_is_taken_off_and_not_trained() -> None:
    layer = layer_over(nn.Linear(64, 10))
    w = weights_of(layer)
    w.initial_A, w.initial_B = w.lora_A.detach().clone(), -w.lora_B.detach().clone()
    x = torch.randn(5, 64, requires_grad=True)
    torch.testing.assert_close(layer(x), layer.base(x), rtol=1e-4, atol=1e-4)
    torch.nn.init.normal_(w.lora_B)
    delta = 0.5 * (w.lora_B @ w.lora_A + w.initial_B @ w.initial_A)
    wanted = x @ (layer.base.weight + delta).T + layer.base.bias
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
    inputs, dy = (x, w.lora_A, w.lora_B), torch.randn(5, 10)
    for ours, theirs in zip(*(torch.autograd.grad(y, inputs, dy) for y in (layer(x), wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("has_everything", [False, True])
def test_merged_weight_does_what_the_layer_does(has_everything: bool) -> None:
    layer = layer_over(frozen_linear("none", torch.float32))
    if has_everything:
        with_everything(layer)
    x = torch.randn(5, 64)
    bias = layer.base.bias if layer.bias is None else layer.bias
    merged = nn.functional.linear(x, merged_weight(layer, layer.base.weight), bias)
    torch.testing.assert_close(merged, layer(x), rtol=1e-5, atol=1e-5)
