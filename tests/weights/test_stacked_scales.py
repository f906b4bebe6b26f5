"""Scales that are made together are those that each weight makes, to the bit."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minilora.qlora.nf4 import Linear4bit, quantize
from minilora.system import bnb
from minilora.weights import stacked_scales
from minilora.weights.load import load_model
from minilora.weights.stacked_scales import stack_scales

SHAPES = ((256, 256), (64, 256), (512, 256), (256, 512))


def build(double_quantization: bool = True, shapes: tuple[tuple[int, int], ...] = SHAPES) -> nn.ModuleList:
    torch.manual_seed(0)
    weights = [torch.randn(shape) * (1 + index) for index, shape in enumerate(shapes)]
    return nn.ModuleList(Linear4bit(quantize(w, double_quantization=double_quantization), None) for w in weights)


def dense(layers: nn.ModuleList) -> list[torch.Tensor]:
    return [layer.dense_weight(torch.bfloat16) for layer in layers]  # type: ignore[operator]


def are_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def dequantized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many scales each dequantisation makes."""
    sizes, plain = list[int](), stacked_scales.dequantize_scales

    def counted(codes: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        sizes.append(len(codes))
        return plain(codes, *given)

    monkeypatch.setattr(stacked_scales, "dequantize_scales", counted)
    return sizes


@pytest.mark.parametrize("with_bitsandbytes", [True, False])
def test_weights_are_the_same_to_the_bit(
    with_bitsandbytes: bool, dequantized: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if with_bitsandbytes:
        pytest.importorskip("bitsandbytes")
    else:
        monkeypatch.setattr(bnb, "functional", lambda: None)
    first, second = build(), build()[:2]
    expected = [*dense(first), *dense(second)]
    stack_scales(first)
    stack_scales(second)
    assert are_equal([*dense(first), *dense(second), *dense(first)], expected + expected[:4])
    all_of_first = sum(out * inner for out, inner in SHAPES) // 64
    assert dequantized == [all_of_first, (256 + 64) * 256 // 64, all_of_first]


def test_the_layers_hold_parts_of_the_stack_and_no_second_copy() -> None:
    layers = build()
    stack_scales(layers)
    for name in ("absmax", "nested_absmax"):
        assert len({layer.get_buffer(name).untyped_storage().data_ptr() for layer in layers}) == 1


def test_scales_that_were_made_in_inference_mode_serve_a_training_pass() -> None:
    layers = build()
    stack_scales(layers)
    x = torch.randn(3, 256, requires_grad=True)
    with torch.inference_mode():
        layers[0](x)
    layers[2](x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 512) @ layers[2].weight.dequantize(torch.float32))


def test_a_layer_that_was_moved_makes_its_own(dequantized: list[int]) -> None:
    layers = build()
    expected = dense(layers)
    stack_scales(layers)
    layers[1].to("cpu")
    assert are_equal(dense(layers), expected)
    assert layers[1].stacked is None
    assert len(dequantized) == 1


def test_other_weights_that_are_loaded_are_the_ones_that_count() -> None:
    layers = build()
    others = nn.ModuleList(Linear4bit(quantize(3 + torch.randn(shape)), None) for shape in SHAPES)
    stack_scales(layers)
    stack_scales(others)
    dense(layers)
    layers.load_state_dict(others.state_dict())
    assert are_equal(dense(layers), dense(others))


def test_what_another_thread_leaves_in_between_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = build()
    expected = dense(layers)
    stack_scales(layers)

    class Interrupted(list[Any]):
        """Another model's layer is computed right after each change of the entry."""

        def __setitem__(self, index: Any, value: Any) -> None:
            super().__setitem__(index, (object(), [torch.zeros_like(part) for part in value[1]]))

    monkeypatch.setattr(stacked_scales, "_latest", Interrupted([None]))
    assert are_equal(dense(layers), expected)


def test_a_copy_has_a_stack_of_its_own() -> None:
    layers = build()
    stack_scales(layers)
    copied, expected = copy.deepcopy(layers), dense(layers)
    for layer in layers:
        layer.get_buffer("absmax").zero_()
    assert are_equal(dense(copied), expected)


@pytest.mark.parametrize(
    "layers",
    [build(double_quantization=False), build(shapes=((64, 64), (64, 128))), build()[:1]],
    ids=["single", "in pieces", "alone"],
)
def test_what_cannot_be_stacked_stays_as_it_is(layers: nn.ModuleList) -> None:
    expected = dense(layers)
    stack_scales(layers)
    assert all(layer.stacked is None for layer in layers)
    assert are_equal(dense(layers), expected)


def test_weights_of_other_levels_are_not_stacked_with_them() -> None:
    layers = build()
    layers[1].nested_code = 2 * layers[1].get_buffer("nested_code")
    expected = dense(layers)
    stack_scales(layers)
    assert [layer.stacked is None for layer in layers] == [False, True, False, False]
    assert are_equal(dense(layers), expected)


def test_a_loaded_model_has_a_stack_in_each_layer(tiny_checkpoint: Callable[..., Path], dequantized: list[int]) -> None:
    folder = tiny_checkpoint(hidden=256, intermediate=512)
    model = load_model(folder, torch.float32, "nf4")
    layers = [[m for m in layer.modules() if isinstance(m, Linear4bit)] for layer in model.model.layers]
    expected = [layer.weight.dequantize(torch.float32) for own in layers for layer in own]
    assert are_equal([layer.dense_weight(torch.float32) for own in layers for layer in own], expected)
    assert dequantized == [(2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256) // 64] * 2
