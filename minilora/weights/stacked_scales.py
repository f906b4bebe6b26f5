"""The 8-bit scales of a decoder layer's weights, dequantised together.

With double quantisation a weight's scales take two operations, forward and backward: 28 in a layer. On a GPU a small
model waits for each of them to be started. Stacked, all seven weights take two, to the same bits.

Their float32 form is used in parts, one weight after the other. So that of the stack that was used last is kept, beyond
its model's life too: half a bit per parameter of one layer, whatever the size of the model.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from minilora.qlora.nf4 import ABSMAX_BLOCK_SIZE, Linear4bit, dequantize_scales


def stack_scales(module: nn.Module) -> None:
    """Lets the 4-bit layers in `module`, a decoder layer, dequantise their scales together.

    A layer that is moved afterwards makes its own again. So does one without double quantisation, and one whose number
    of scales is no multiple of 256, which no Qwen2.5 has.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, Linear4bit) and layer.weight.offset is not None]
    whole = [layer for layer in layers if layer.get_buffer("absmax").numel() % ABSMAX_BLOCK_SIZE == 0]
    levels = [layer.get_buffer("nested_code") for layer in whole]
    same = [layer for layer, own in zip(whole, levels, strict=True) if torch.equal(own, levels[0])]
    if len(same) > 1:
        _Stack(same)


_latest: "list[tuple[_Stack, tuple[torch.Tensor, ...]] | None]" = [None]  # the stack that was used last, its scales


class _Stack:
    def __init__(self, layers: Sequence[Linear4bit]):
        """The layers' buffers become parts of the stack's."""
        self._codes, self._absmax = (_join(layers, name) for name in ("absmax", "nested_absmax"))
        self._levels = layers[0].get_buffer("nested_code")
        self._sizes = [layer.get_buffer("absmax").numel() for layer in layers]
        sized = zip(layers, self._sizes, strict=True)
        means = [layer.get_buffer("offset").expand(size // ABSMAX_BLOCK_SIZE) for layer, size in sized]
        self._offsets = torch.cat(means)[:, None]  # of each 256 scales, which are all of one layer
        for index, layer in enumerate(layers):
            layer.stacked = partial(self._scales_of, index)
            layer.register_load_state_dict_pre_hook(_unstack)

    def _scales_of(self, index: int) -> torch.Tensor:
        """(blocks,) float32, as `QuantizedTensor.scales` gives them."""
        latest = _latest[0]  # read once: another thread may replace it
        if latest is None or latest[0] is not self:
            made = dequantize_scales(self._codes, self._absmax, self._levels)
            made.view(-1, ABSMAX_BLOCK_SIZE).add_(self._offsets)
            _latest[0] = latest = self, made.split(self._sizes)
        return latest[1][index]


def _unstack(layer: Any, *_: Any) -> None:
    """Other values are about to be loaded, and with them another mean, which is not a part of the stack."""
    layer.stacked = None


def _join(layers: Sequence[Linear4bit], name: str) -> torch.Tensor:
    buffers = [layer.get_buffer(name) for layer in layers]
    joined = torch.cat(buffers)
    for layer, part in zip(layers, joined.split([buffer.numel() for buffer in buffers]), strict=True):
        setattr(layer, name, part)
    return joined
