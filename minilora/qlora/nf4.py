"""4-bit NormalFloat: a dense weight in, about half a byte per parameter out, and the frozen linear layer over it.

A trained weight matrix looks like draws from a normal distribution. NF4 chooses its 16 levels q so that each is used
about equally often on such draws: quantiles of N(0, 1), scaled to [-1, 1], with an exact 0. Every 64 parameters in
row-major order are a block b with a scale of their own:

    absmax_b = max |w_i| in b      code_i = argmin_k |w_i / absmax_b - q_k|      w'_i = q[code_i] * absmax_b

Two codes fill a byte, the first in its high half; a float32 scale adds 32 / 64 bits per parameter: 4.5. Double
quantisation subtracts the mean m from the scales and stores them in 8 bits too: 256 of them share a scale s and have
codes c into 256 levels d that are dense around 0.  absmax'_b = d[c_b] * s + m  costs 8 / 64 + 32 / (64 * 256) bits:
4.127 in all. FP4 is the same with a sign, two bits of exponent and one of mantissa as levels.

bitsandbytes does the work. The PyTorch functions at the end are the readable reference, equal it to the bit, and take
over where it cannot be imported; on a CPU they always quantise, three times as fast as its own.

Source: arXiv 2305.14314 (QLoRA), section 3; the 256 levels: arXiv 2110.02861; rounding as in bitsandbytes 0.50.2 on a
CPU. Left out: other block sizes; GEMV on 4-bit weights, which gains nothing from 64 tokens on (`generation/gemv.py`).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from minilora.system import bnb

BLOCK_SIZE = 64  # weights under one scale
ABSMAX_BLOCK_SIZE = 256  # scales under one scale of scales
SMALLEST_ABSMAX = 1e-38  # so that a block of zeros does not divide by zero
MAX_GEMV_TOKENS = 32  # GEMV on 4-bit weights is faster than to dequantise up to here
PIECE = 1 << 20  # parameters that are quantised at a time on a CPU; whole blocks

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4_LEVELS = tuple(sign * size / 12 for sign in (1, -1) for size in (0, 0.0625, 8, 12, 4, 6, 2, 3))
LEVELS = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight in 4 bits. The last three are None without double quantisation."""

    packed: torch.Tensor  # (out * in / 2 rounded up, 1) uint8, two codes a byte
    absmax: torch.Tensor  # (blocks,) float32 scales; with double quantisation their uint8 codes
    shape: torch.Size  # (out, in) of the dense weight
    quant_type: str  # "nf4" or "fp4"
    nested_absmax: torch.Tensor | None = None  # (blocks / 256 rounded up,) float32, the scales of the scales
    nested_code: torch.Tensor | None = None  # (256,) float32, the levels of the scales
    offset: torch.Tensor | None = None  # (1,) float32, the mean of the scales

    def dequantize(self, dtype: torch.dtype, scales: torch.Tensor | None = None) -> torch.Tensor:
        """(out, in) `dtype`, a new constant tensor; products in float32, rounded once. `scales` are made if not given.

        A tenth of the time makes the scales from 8 bits: too little to keep them in float32 beside.
        """
        scales = self.scales() if scales is None else scales
        if not bnb.is_available():
            return _dequantize_in_pytorch(self, scales, dtype)
        # The AVX512 kernel begins a new block with every row and the quantiser does not, so bitsandbytes 0.50.2
        # returns another weight where `in` is a multiple of 16 and not of 64. As one long row it comes out right.
        whole = self.shape[1] % BLOCK_SIZE == 0
        rows = self.shape if whole else (1, 2 * self.packed.numel())
        kind = {"blocksize": BLOCK_SIZE, "quant_type": self.quant_type, "shape": rows, "dtype": dtype}
        # The operator under bitsandbytes.functional.dequantize_4bit: no state object to build on each call.
        dense: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(self.packed, scales, **kind)
        return dense if whole else dense.view(-1)[: self.shape.numel()].view(self.shape)

    def scales(self) -> torch.Tensor:
        """(blocks,) float32 absmax of each block, made from 8 bits where they are quantised too."""
        if self.offset is None or self.nested_absmax is None or self.nested_code is None:  # the three come together
            return self.absmax
        return dequantize_scales(self.absmax, self.nested_absmax, self.nested_code).add_(self.offset)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def to(self, device: torch.device | str) -> "QuantizedTensor":
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, **moved)


def quantize(weight: torch.Tensor, quant_type: str = "nf4", double_quantization: bool = True) -> QuantizedTensor:
    """An (out, in) weight in 4 bits, on its device; ValueError for another dtype, number of axes or `quant_type`."""
    if quant_type not in LEVELS:
        raise ValueError(f"quant_type: got {quant_type!r}, expected one of {list(LEVELS)}")
    if weight.ndim != 2 or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        got = f"{tuple(weight.shape)} {weight.dtype}"
        raise ValueError(f"weight: got {got}, expected (out, in) in float32, bfloat16 or float16")
    if weight.is_cuda and bnb.is_available():
        return _quantize_with_bitsandbytes(weight.detach(), quant_type, double_quantization)
    return _quantize_in_pytorch(weight.detach(), quant_type, double_quantization)


def _quantize_with_bitsandbytes(weight: torch.Tensor, quant_type: str, double_quantization: bool) -> QuantizedTensor:
    functional = bnb.functional()
    assert functional is not None
    packed, state = functional.quantize_4bit(
        weight, blocksize=BLOCK_SIZE, compress_statistics=double_quantization, quant_type=quant_type
    )
    nested = (state.state2.absmax, state.state2.code, state.offset.view(1)) if double_quantization else ()
    return QuantizedTensor(packed, state.absmax, weight.shape, quant_type, *nested)


class _FrozenLinear(torch.autograd.Function):
    """y = x W^T + b for constant W and b, so dy/dx is W and  dx = dy W.

    x is not needed for that, and W is dequantised a second time: what waits for backward is nothing that the model does
    not hold anyway.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: "Linear4bit", bias: torch.Tensor | None) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dense_weight(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        return dy @ ctx.layer.dense_weight(dy.dtype), None, None


class Linear4bit(nn.Module):
    """A frozen linear layer, its weight in 4 bits until it is used.

    The weight's parts are buffers: `.to(device)` and `state_dict` find them, an optimizer does not.
    """

    bias: torch.Tensor | None  # (out,) compute dtype
    cache_dequantized = False  # keep the dense weight: speed for memory, 2 bytes per parameter in bfloat16
    gemv: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor] | None = None  # (x, bias) -> y, for few tokens
    stacked: Callable[[], torch.Tensor] | None = None  # its scales, made together with those of other layers
    _dense: torch.Tensor | None = None

    def __init__(self, weight: QuantizedTensor, bias: torch.Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._shape, self.quant_type = weight.shape, weight.quant_type
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def weight(self) -> QuantizedTensor:
        parts: dict[str, Any] = {name: tensor for name, tensor in self._buffers.items() if name != "bias"}
        return QuantizedTensor(shape=self._shape, quant_type=self.quant_type, **parts)

    @property
    def device(self) -> torch.device:
        return self.weight.packed.device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, in) -> (T, out), in the dtype of x, which must be that of the bias."""
        return self.product(x, self.bias)

    def uses_gemv(self, x: torch.Tensor) -> bool:
        return self.gemv is not None and len(x) <= MAX_GEMV_TOKENS and torch.is_inference_mode_enabled()

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x W^T + bias: in inference mode by GEMV on 4-bit weights, where there is one and T is small, else dense."""
        if self.gemv is not None and self.uses_gemv(x):
            return self.gemv(x, bias)
        y: torch.Tensor = _FrozenLinear.apply(x, self, bias)
        return y

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """(out, in) `dtype`, constant: dequantised, unless it is kept."""
        if self._dense is not None and self._dense.dtype == dtype:
            return self._dense
        dense = self.weight.dequantize(dtype, None if self.stacked is None else self.stacked())
        if self.cache_dequantized:
            self._dense = dense
        return dense

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Linear4bit":
        """Moves everything and casts only the bias: a scale in bfloat16 would be another weight."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            # Bytes have a device and no floating-point type, so `fn` can only move them.
            return fn(tensor) if tensor is self.bias else fn(tensor.view(torch.uint8)).view(tensor.dtype)

        self._dense = self.gemv = self.stacked = None
        return super()._apply(move, recurse)


def dense_weight(base: Linear4bit | nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """(out, in) `dtype`: the weight itself, or dequantised from its 4 bits."""
    return base.dense_weight(dtype) if isinstance(base, Linear4bit) else base.weight.to(dtype)


def frozen_product(base: Linear4bit | nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """x W^T without the bias, (T, out)."""
    return base.product(x, None) if isinstance(base, Linear4bit) else F.linear(x, base.weight)


def _quantize_in_pytorch(weight: torch.Tensor, quant_type: str, double_quantization: bool) -> QuantizedTensor:
    levels = torch.tensor(LEVELS[quant_type], device=weight.device)
    by_value = torch.argsort(levels, stable=True)  # FP4's codes are bit patterns, not in order of value
    ranks, absmax = _nearest_levels(weight.flatten(), _midpoints(levels[by_value]))
    codes = ranks if quant_type == "nf4" else by_value.to(torch.uint8)[ranks.int()]
    packed = (codes[::2] << 4 | codes[1::2]).unsqueeze(1)
    if not double_quantization:
        return QuantizedTensor(packed, absmax, weight.shape, quant_type)
    offset = absmax.mean()
    nested_code = _dynamic_levels().to(weight.device)
    codes, nested_absmax = _quantize_scales(absmax - offset, nested_code)
    nested = {"nested_absmax": nested_absmax, "nested_code": nested_code, "offset": offset.view(1)}
    return QuantizedTensor(packed, codes, weight.shape, quant_type, **nested)


def _nearest_levels(values: torch.Tensor, midpoints: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The index of each value's level in order of value, uint8, an even count of them, and the (blocks,) absmax.

    The index is how many midpoints are below the scaled value. Fifteen comparisons of all values take a third of the
    time of a binary search for each, which is what bitsandbytes does on a CPU; a piece at a time stays in the cache.
    """
    count = values.numel()
    indices = torch.empty(count + count % 2, dtype=torch.uint8, device=values.device)
    absmax = torch.empty(-(-count // BLOCK_SIZE), device=values.device)
    for start in range(0, count, PIECE):
        scaled, found = _scale_blocks(values[start : start + PIECE].to(torch.float32))
        absmax[start // BLOCK_SIZE :][: len(found)] = found
        below = torch.empty_like(scaled, dtype=torch.bool)
        piece = indices[start : start + len(scaled)].zero_()
        for midpoint in midpoints.tolist():
            piece += torch.gt(scaled, midpoint, out=below).view(torch.uint8)
    return indices, absmax


def _scale_blocks(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each value over its block's absmax, an even count of them, and the (blocks,) absmax."""
    count = values.numel()
    padded = F.pad(values, (0, -count % BLOCK_SIZE)) if count % BLOCK_SIZE else values
    blocks = padded.view(-1, BLOCK_SIZE)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1 / absmax.clamp(min=SMALLEST_ABSMAX))[:, None]
    if count % BLOCK_SIZE:
        # bitsandbytes divides in an incomplete block, and multiplies by the inverse in all others.
        absmax[-1].clamp_(min=SMALLEST_ABSMAX)
        scaled[-1] = blocks[-1] / absmax[-1]
    return scaled.view(-1)[: count + count % 2], absmax


def _quantize_scales(values: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (blocks,) uint8 and absmax of each 256.

    bitsandbytes finds the nearest level in a table of 65,536 entries evenly spaced over [-1, 1], so a value moves to
    the nearest entry first. Around 0 levels are closer than entries; the error stays below 1 / 65,535.
    """
    count = values.numel()
    blocks = F.pad(values, (0, -count % ABSMAX_BLOCK_SIZE)).view(-1, ABSMAX_BLOCK_SIZE)
    absmax = blocks.abs().amax(dim=1)
    # A block of zeros is 0 * inf here; it has code 0 in bitsandbytes, and a scale of 0 that makes it right.
    scaled = (blocks * (1 / absmax)[:, None]).nan_to_num_(nan=-1.0)
    place = ((scaled + 1) * 0.5 * 65535 + 0.5).trunc_()
    codes = torch.bucketize(place * 2 / 65535 - 1, _midpoints(levels)).to(torch.uint8)
    return codes.view(-1)[:count], absmax


def _midpoints(levels: torch.Tensor) -> torch.Tensor:
    return (levels[1:] + levels[:-1]) / 2


@functools.cache
def _dynamic_levels() -> torch.Tensor:
    """The 256 levels of an 8-bit scale: 0, 1, and +-10^(e-6) * m with 2^e evenly spaced m in (0.1, 1), e = 0..6."""
    levels = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        magnitudes = 10 ** (exponent - 6) * _midpoints(torch.linspace(0.1, 1, 2**exponent + 1))
        levels += [magnitudes, -magnitudes]
    return torch.cat(levels).sort().values


def dequantize_scales(codes: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """(blocks,) float32, their mean not yet added."""
    if bnb.is_available():
        kind = {"blocksize": ABSMAX_BLOCK_SIZE, "dtype": torch.float32}
        scales: torch.Tensor = torch.ops.bitsandbytes.dequantize_blockwise.default(codes, absmax, levels, **kind)
        return scales
    return levels[codes.int()] * absmax.repeat_interleave(ABSMAX_BLOCK_SIZE)[: codes.numel()]


def _dequantize_in_pytorch(quantized: QuantizedTensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As bitsandbytes, except what its processor decides: the sign of an FP4 zero, and bfloat16 below 1.2e-38."""
    levels = torch.tensor(LEVELS[quantized.quant_type], device=quantized.packed.device)
    pairs = torch.cartesian_prod(levels, levels)  # row b: the two levels of byte b
    values = pairs.index_select(0, quantized.packed.view(-1).int()).view(-1)[: quantized.shape.numel()]
    return (values * scales.repeat_interleave(BLOCK_SIZE)[: values.numel()]).to(dtype).view(quantized.shape)
