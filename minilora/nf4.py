"""4-bit NormalFloat: a dense weight in, about half a byte a number out, and the frozen linear layer over it.

A trained weight matrix looks like draws from a normal distribution. NF4 spends its 16 codes so that each is
used equally often on such draws: the levels q are quantiles of N(0, 1), scaled to [-1, 1], with an exact 0.
Every run of 64 numbers (in row-major order) is one block with a scale of its own:

    absmax_b = max |w_i| over block b        code_i = argmin_k |w_i / absmax_b - q_k|
    w'_i = q[code_i] * absmax_b              two codes a byte, the first in the high four bits

One float32 scale a block costs 32 / 64 bits a number: 4.5 in all. Double quantisation stores the scales in
8 bits too: their mean m is subtracted, and every 256 of them form a block with a float32 scale s and codes
into a table d of 256 levels, dense around 0:  absmax'_b = d[c_b] * s + m.  That is 4 + 8 / 64 +
32 / (64 * 256) = 4.127 bits. FP4 is the same with 1 sign, 2 exponent and 1 mantissa bit as levels.

The work is done by bitsandbytes, which no other module imports. The PyTorch functions at the end of the file
say the same thing readably, equal it to the bit, and take over where bitsandbytes cannot be imported.

Source: arXiv 2305.14314 (QLoRA), section 3; the 8-bit table: arXiv 2110.02861; rounding as in bitsandbytes
0.50.2 on the CPU. Left out: other block sizes, which no Qwen2.5 needs; a product straight from 4 bits,
slower than dequantise-and-multiply from about 64 rows on.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

BLOCK_SIZE = 64  # weights under one scale
ABSMAX_BLOCK_SIZE = 256  # scales under one scale of scales
SMALLEST_ABSMAX = 1e-38  # a block of zeros must not divide by zero

# fmt: off
LEVELS = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(
        sign * magnitude / 12 for sign in (1, -1) for magnitude in (0, 0.0625, 8, 12, 4, 6, 2, 3)
    ),
}
# fmt: on


@functools.cache
def _bitsandbytes() -> ModuleType | None:
    """bitsandbytes.functional, or None with one notice; imported on first use, for it takes a second."""
    source = logging.getLogger("bitsandbytes.backends.cpu.ops")
    source.addFilter(_is_worth_showing)
    try:
        import bitsandbytes.functional
    except Exception as error:  # a broken installation fails with whatever its loader meets
        logging.getLogger("minilora").warning(
            "nf4: bitsandbytes cannot be imported (%s); its PyTorch equivalent takes over, with equal results "
            "and slower; pip install bitsandbytes",
            error,
        )
        return None
    finally:
        source.removeFilter(_is_worth_showing)
    return bitsandbytes.functional  # type: ignore[no-any-return, unused-ignore]


def _is_worth_showing(record: logging.LogRecord) -> bool:
    """False for the notice about an optional kernel for inference, which nothing here would call."""
    return "kernels-community" not in record.getMessage()


def uses_bitsandbytes() -> bool:
    """Whether bitsandbytes does the work; False, after one notice, where it cannot be imported."""
    return _bitsandbytes() is not None


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight in 4 bits. The last three are None without double quantisation.

    Attributes:
        packed: (out * in / 2 rounded up, 1) uint8, two codes a byte.
        absmax: (blocks,) float32 scales; with double quantisation their uint8 codes.
        shape: (out, in) of the dense weight.
        quant_type: "nf4" or "fp4".
        nested_absmax: (blocks / 256 rounded up,) float32, the scales of the scales.
        nested_code: (256,) float32, the levels of the scales.
        offset: (1,) float32, the mean of the scales.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    shape: torch.Size
    quant_type: str
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """(out, in) `dtype`, a new constant; products in float32, then rounded once.

        4,864 x 896 to bfloat16 takes 0.31 ms on 2 cores; 0.03 ms of it turns 8-bit scales into float32, too
        little to keep them in both forms.
        """
        functional = _bitsandbytes()
        if functional is None:
            return _dequantize_in_pytorch(self, dtype)
        nested = None
        if self.nested_absmax is not None:
            nested = functional.QuantState(
                self.nested_absmax, code=self.nested_code, blocksize=ABSMAX_BLOCK_SIZE, dtype=torch.float32
            )
        # Rows of whole blocks in place of the weight's own: bitsandbytes' AVX512 kernel starts a new block with
        # every row, its quantiser does not, and so they disagree where 64 does not divide `in`.
        whole_blocks = self.shape.numel() % BLOCK_SIZE == 0
        state = functional.QuantState(
            self.absmax,
            shape=(self.absmax.numel(), BLOCK_SIZE) if whole_blocks else (1, 2 * self.packed.numel()),
            blocksize=BLOCK_SIZE,
            quant_type=self.quant_type,
            dtype=dtype,
            offset=self.offset,
            state2=nested,
        )
        flat = functional.dequantize_4bit(self.packed, state).view(-1)
        return flat[: self.shape.numel()].view(self.shape)  # type: ignore[no-any-return]

    @property
    def nbytes(self) -> int:
        """Bytes held, all scales included."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The attributes that are tensors, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def to(self, device: torch.device | str) -> "QuantizedTensor":
        """The same weight on `device`."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, **moved)


def quantize(weight: torch.Tensor, quant_type: str = "nf4", double_quantization: bool = True) -> QuantizedTensor:
    """The weight in 4 bits, on its device.

    Args:
        weight: (out, in) float32, bfloat16 or float16.
        quant_type: "nf4" or "fp4".
        double_quantization: store the scales in 8 bits too, 4.127 bits a number in place of 4.5.

    Raises:
        ValueError: another type, dtype or number of axes.
    """
    if quant_type not in LEVELS:
        raise ValueError(f"quant_type: got {quant_type!r}, expected one of {list(LEVELS)}")
    if weight.ndim != 2 or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"weight: got {tuple(weight.shape)} {weight.dtype}, expected (out, in) in float32, bfloat16 or float16"
        )
    functional = _bitsandbytes()
    if functional is None:
        return _quantize_in_pytorch(weight.detach(), quant_type, double_quantization)
    packed, state = functional.quantize_4bit(
        weight.detach(),
        blocksize=BLOCK_SIZE,
        compress_statistics=double_quantization,
        quant_type=quant_type,
    )
    quantized = QuantizedTensor(packed, state.absmax, weight.shape, quant_type)
    if not double_quantization:
        return quantized
    nested = state.state2
    return replace(quantized, nested_absmax=nested.absmax, nested_code=nested.code, offset=state.offset.view(1))


class _FrozenLinear(torch.autograd.Function):
    """y = x W^T + b for constant W and b, so dy/dx is W and  dx = dy W.

    x is not needed for that, and W is made again from its 4 bits in place of being kept: what waits for
    backward is nothing but the quantised weight, which the model holds anyway.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        return dy @ ctx.weight.dequantize(dy.dtype), None, None


class Linear4bit(nn.Module):
    """A frozen linear layer, its weight in 4 bits until it is used.

    The weight's parts are buffers: `.to(device)` and `state_dict` find them, an optimizer does not.

    Attributes:
        bias: (out,) compute dtype, or None.
    """

    bias: torch.Tensor | None

    def __init__(self, weight: QuantizedTensor, bias: torch.Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.quant_type = weight.quant_type
        self._weight_names = tuple(weight.tensors())
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def weight(self) -> QuantizedTensor:
        """The weight as it is held now."""
        parts: dict[str, Any] = {name: self._buffers[name] for name in self._weight_names}
        shape = torch.Size((self.out_features, self.in_features))
        return QuantizedTensor(shape=shape, quant_type=self.quant_type, **parts)

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.weight.packed.device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, in) -> (T, out), in the dtype of x, which must be that of the bias."""
        return _FrozenLinear.apply(x, self.weight, self.bias)  # type: ignore[no-any-return]

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """(out, in) `dtype`, made anew."""
        return self.weight.dequantize(dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows between the brackets."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.quant_type}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Linear4bit":
        """Moves everything and casts the bias alone: a scale in bfloat16 would be another weight."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            # Bytes have a device and no floating-point type, so `fn` can only move them.
            return fn(tensor) if tensor is self.bias else fn(tensor.view(torch.uint8)).view(tensor.dtype)

        return super()._apply(move, recurse)  # type: ignore[no-any-return, unused-ignore]


def _quantize_in_pytorch(weight: torch.Tensor, quant_type: str, double_quantization: bool) -> QuantizedTensor:
    levels = torch.tensor(LEVELS[quant_type], device=weight.device)
    by_value = torch.argsort(levels, stable=True)  # FP4's codes are bit patterns, not in order of value
    scaled, absmax = _scale_blocks(weight.to(torch.float32).flatten())
    codes = by_value.to(torch.uint8)[torch.bucketize(scaled, _midpoints(levels[by_value]), out_int32=True)]
    packed = (codes[::2] << 4 | codes[1::2]).unsqueeze(1)
    quantized = QuantizedTensor(packed, absmax, weight.shape, quant_type)
    if not double_quantization:
        return quantized
    offset = absmax.mean()
    nested_code = _dynamic_levels().to(weight.device)
    codes, nested_absmax = _quantize_scales(absmax - offset, nested_code)
    return replace(
        quantized,
        absmax=codes,
        nested_absmax=nested_absmax,
        nested_code=nested_code,
        offset=offset.view(1),
    )


def _scale_blocks(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each number over its block's absmax, in [-1, 1] and an even count of them; and the (blocks,) absmax."""
    count = values.numel()
    blocks = F.pad(values, (0, -count % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1 / absmax.clamp(min=SMALLEST_ABSMAX))[:, None]
    if count % BLOCK_SIZE:
        # bitsandbytes divides in an incomplete block, and multiplies by the inverse in all others.
        absmax[-1].clamp_(min=SMALLEST_ABSMAX)
        scaled[-1] = blocks[-1] / absmax[-1]
    return scaled.clamp_(-1, 1).view(-1)[: count + count % 2], absmax


def _quantize_scales(values: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (blocks,) uint8 and absmax of each 256.

    bitsandbytes looks the nearest level up in a table of 65,536 entries evenly spaced over [-1, 1]: a number
    is moved to the nearest entry first. Around 0, where the levels are closer than that, the code may be off
    by a few; the error is below 1 / 65,535 of the largest.
    """
    count = values.numel()
    blocks = F.pad(values, (0, -count % ABSMAX_BLOCK_SIZE)).view(-1, ABSMAX_BLOCK_SIZE)
    absmax = blocks.abs().amax(dim=1)
    # 0 / 0 is where a block is all zeros, to which bitsandbytes gives code 0, whose scale of 0 makes it right.
    scaled = (blocks * (1 / absmax)[:, None]).nan_to_num(nan=-1.0).clamp_(-1, 1)
    # One rounding for product and sum, as a processor's fused multiply-add has it: exact in float64, then cut.
    entry = ((scaled + 1) * 0.5).double().mul_(65535).add_(0.5).float().trunc_()
    codes = torch.bucketize(entry * 2 / 65535 - 1, _midpoints(levels)).to(torch.uint8)
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


def _dequantize_in_pytorch(quantized: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    absmax = quantized.absmax
    if quantized.nested_code is not None:
        assert quantized.nested_absmax is not None and quantized.offset is not None  # they come together
        scales = quantized.nested_absmax.repeat_interleave(ABSMAX_BLOCK_SIZE)[: absmax.numel()]
        absmax = quantized.nested_code[absmax.int()] * scales + quantized.offset
    levels = torch.tensor(LEVELS[quantized.quant_type], device=absmax.device)
    # Row b of `pairs` is what byte b stands for: one look-up brings two numbers.
    pairs = torch.cartesian_prod(levels, levels)
    values = pairs.index_select(0, quantized.packed.view(-1).int()).view(-1)[: quantized.shape.numel()]
    scales = absmax.repeat_interleave(BLOCK_SIZE)[: values.numel()]
    return (values * scales).to(dtype).view(quantized.shape)
