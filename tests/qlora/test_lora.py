"""The derived LoRA layer equals its definition, outputs and all gradients, for every kind of adapter."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from minilora.adapters.attach import merged_weight
from minilora.qlora.dora import BLOCK_TOKENS, base_squares
from minilora.qlora.lora import (
    Dropout,
    DropoutSeed,
    LoRALinear,
    LoRAWeights,
    Recompute,
    cast_once,
    linear_layers,
)
from minilora.qlora.nf4 import Linear4bit, quantize

KINDS = ("plain", "bias", "dora", "pissa", "dora and bias", "dora and pissa", "bias only")


def adapted(
    base: nn.Linear | Linear4bit, kind: str = "plain", dropout: float = 0.0, r: int = 3, seed: DropoutSeed | None = None
) -> LoRALinear:
    """A layer with one active adapter of random values and scale 0.5."""
    layer = LoRALinear(base)
    r = 0 if kind == "bias only" else r
    size = (base.out_features, base.in_features)
    w = LoRAWeights(size, r, 1.5, 0.5, Dropout(dropout, 7, seed or DropoutSeed()), "cpu")
    for parameter in (w.lora_A, w.lora_B):
        parameter.data = torch.randn_like(parameter)
    if "bias" in kind:
        w.bias = nn.Parameter(torch.randn(base.out_features))
    if "dora" in kind:
        w.lora_magnitude_vector = nn.Parameter(1 + torch.rand(base.out_features))
    if "pissa" in kind:
        w.initial_A, w.initial_B = torch.randn_like(w.lora_A), torch.randn_like(w.lora_B)
    layer.adapters["default"] = w
    layer.active = "default"
    return layer


def weights_of(layer: LoRALinear) -> LoRAWeights:
    assert layer.weights is not None
    return layer.weights


def frozen(out: int, in_features: int = 6, dtype: torch.dtype = torch.float64) -> nn.Linear:
    return nn.Linear(in_features, out, dtype=dtype).requires_grad_(False)


def trained(layers: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [p for layer in layers for p in layer.parameters() if p.requires_grad and p.numel()]


def assert_both_ways_equal(layers: Sequence[LoRALinear | nn.Linear | Linear4bit], x: torch.Tensor) -> None:
    """`linear_layers` and each layer's own `forward`: outputs, and gradients of x and of all that is trained."""
    derived, defined = linear_layers(x, layers), [layer(x) for layer in layers]
    dys = [torch.randn_like(y) for y in defined]
    inputs = [x, *trained(layers)]
    exact = x.dtype == torch.float64
    tolerance = {} if exact else {"rtol": 1e-5, "atol": 1e-5}  # sums of 64 float32 terms in another order
    for ours, theirs in zip(derived, defined, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    gradients = zip(*(torch.autograd.grad(ys, inputs, dys) for ys in (derived, defined)), strict=True)
    for ours, theirs in gradients:
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_are_equal_in_float64(kind: str, dropout: float) -> None:
    layer = adapted(frozen(4), kind, dropout).double()
    x = torch.randn(BLOCK_TOKENS + 5, 6, dtype=torch.float64, requires_grad=True)
    assert_both_ways_equal([layer], x)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_both_ways_are_equal_for_layers_of_every_kind_over_one_input(dropout: float) -> None:
    """Different ranks, and one layer without an adapter, as a pattern of targets may leave them."""
    seed = DropoutSeed()
    layers = [adapted(frozen(2 + i), kind, dropout, 1 + i, seed).double() for i, kind in enumerate(KINDS)]
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert_both_ways_equal([*layers[:2], frozen(3), *layers[2:]], x)


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_are_equal_over_4_bits(kind: str) -> None:
    torch.manual_seed(1)
    base = Linear4bit(quantize(torch.randn(10, 64)), torch.randn(10))
    assert_both_ways_equal([adapted(base, kind, 0.25)], torch.randn(5, 64, requires_grad=True))


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_the_derived_gradient_equals_finite_differences(kind: str) -> None:
    layer = adapted(frozen(4), kind, 0.25).double()
    w = weights_of(layer)

    def forward(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        w.lora_A, w.lora_B = nn.Parameter(a), nn.Parameter(b)
        w._parameters |= {"lora_A": a, "lora_B": b}  # so that gradcheck reaches them
        return linear_layers(x, (layer,))[0]

    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    a, b = (p.detach().requires_grad_() for p in (w.lora_A, w.lora_B))
    if "dora" in kind:  # the norm counts as constant, which finite differences do not know
        assert torch.autograd.gradcheck(lambda x: forward(x, a, b), (x,))
    else:
        assert torch.autograd.gradcheck(forward, (x, a, b))


def test_a_recomputed_input_is_not_kept_and_changes_no_gradient() -> None:
    layer = adapted(frozen(10, 64, torch.float32))
    source = torch.randn(5, 64, requires_grad=True)
    dy = torch.randn(5, 10)

    def gradients(recompute: Recompute | None) -> tuple[tuple[torch.Tensor, ...], bool]:
        kept: list[int] = []
        x = source.detach().exp().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
            (y,) = linear_layers(x, (layer,), recompute)
        return torch.autograd.grad(y, (x, *trained([layer])), dy), x.data_ptr() in kept

    (expected, is_kept) = gradients(None)
    (found, is_kept_too) = gradients(Recompute(torch.exp, (source.detach(),)))
    assert (is_kept, is_kept_too) == (True, False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_dropout_masks_differ_between_steps_micro_batches_and_layers() -> None:
    seed, seen = DropoutSeed(), set()
    for step in range(4):
        for micro_batch in range(3):
            seed.set(42, step, micro_batch)
            seen.add(seed.value)
    assert len(seen) == 12
    first, second = (adapted(frozen(64, 64, torch.float32), dropout=0.5, seed=seed) for _ in range(2))
    weights_of(second).dropout.layer += 1
    assert weights_of(first).dropout_mask() != weights_of(second).dropout_mask()


def test_evaluation_draws_no_dropout() -> None:
    layer = adapted(frozen(10, 64, torch.float32), dropout=0.5).eval()
    assert weights_of(layer).dropout_mask().probability == 0


def test_an_untrained_dora_adapter_changes_nothing_in_bfloat16_and_sees_small_magnitude_steps() -> None:
    """A magnitude learns in steps that bfloat16 cannot tell apart; the output has to see them."""
    base = frozen(10, 64, torch.bfloat16)
    base.bias = None
    layer = adapted(base)
    w = weights_of(layer)
    nn.init.zeros_(w.lora_B)
    w.lora_magnitude_vector = nn.Parameter(base_squares(w, base.weight).sqrt())
    x = torch.randn(400, 64, dtype=torch.bfloat16)
    assert torch.equal(linear_layers(x, (layer,))[0], base(x))
    w.lora_magnitude_vector.data *= 1.003
    ratio = (linear_layers(x, (layer,))[0].float().abs().sum() / base(x).float().abs().sum()).item()
    assert ratio == pytest.approx(1.003, abs=4e-4)  # 4,000 roundings of up to 0.4 %, either way


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_weight_does_what_the_layer_does(kind: str) -> None:
    layer = adapted(frozen(10, 64, torch.float32), kind)
    x = torch.randn(5, 64)
    merged = nn.functional.linear(x, merged_weight(layer, layer.base.weight), layer.effective_bias)
    torch.testing.assert_close(merged, layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "dora", "pissa"])
def test_factors_that_are_cast_once_change_no_bit(kind: str) -> None:
    torch.manual_seed(2)
    layers = nn.ModuleList(adapted(frozen(10 + i, 64, torch.bfloat16), kind, r=2 + i) for i in range(3))
    x = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)
    dys = [torch.randn(5, 10 + i, dtype=torch.bfloat16) for i in range(3)]

    def results() -> list[torch.Tensor]:
        ys = linear_layers(x, list(layers))  # type: ignore[arg-type]
        return [*ys, *torch.autograd.grad(ys, [x, *trained(list(layers))], dys)]

    expected = results()
    with cast_once(layers, torch.bfloat16):
        found = results()
        for w in map(weights_of, layers):  # type: ignore[arg-type]
            w.lora_A.data.zero_()  # which the copies do not see
        again = results()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(again[0], expected[0]) or kind == "dora"  # whose norms are of the float32 factors
    assert not torch.equal(results()[0], expected[0])  # nothing of the copies is left


def test_factors_of_the_compute_dtype_are_not_copied() -> None:
    layer = adapted(frozen(10, 64, torch.float32))
    with cast_once(layer, torch.float32):
        assert weights_of(layer).cast is None
    with cast_once(layer, torch.bfloat16):
        assert weights_of(layer).cast is not None
