"""GEMV on 4-bit weights, for decoding, where one token at a time goes through the model.

    y = x W^T + b        x: (T, in), T at most nf4.MAX_GEMV_TOKENS

The cost of such a product is that of reading W: half a byte per parameter from 4 bits. Dequantising first reads as
much, writes two bytes and reads them back. The gain: 42 tokens/s instead of 22 from dense bfloat16 weights
(Qwen2.5-0.5B, 2 cores of a Zen 5, `benchmarks/generate_speed.py`). bitsandbytes has two kernels:

* `gemm_4bit`, on a GPU, reads the weight as quantised.
* `gemv_4bit`, on a processor with AVX512-BF16, computes in bfloat16 and reads the weight in another order, 32 outputs
  interleaved. A byte holds two codes; with n the first of the 32, and j = 0, 1, ... for all columns 2j and 2j + 1,

      as quantised    for each output m:     code(m, 2j) << 4 | code(m, 2j + 1)
      reordered       for r = 0 to 15:       code(n + r + 16, 2j) << 4 | code(n + r, 2j), then the same for 2j + 1

  and the scales are (in / 64, out) bfloat16. The reordered copy takes 4.25 bits per parameter beside the weight.

Everywhere else there is no such kernel, and `Linear4bit` dequantises. Scales and levels in bfloat16 round a little more
than a dense weight in bfloat16: the error of the product is 1.4 times as large. The order is internal to bitsandbytes,
so it is checked on a small weight before it is used.

Source: bitsandbytes 0.50.2, its operators and `_convert_weight_packed_for_cpu`.
"""

import functools
from collections.abc import Callable
from functools import partial

import torch

from minilora.qlora.nf4 import BLOCK_SIZE, LEVELS, QuantizedTensor, quantize
from minilora.system import bnb

Product = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
OUTPUTS = 32  # interleaved


def make_product(weight: QuantizedTensor, dtype: torch.dtype) -> Product | None:
    """A function for x (T, in) and bias (out,) of `dtype`, None where there is no kernel.

    It holds `weight` (out, in), or a reordered copy.
    """
    if not bnb.is_available() or weight.shape[1] % BLOCK_SIZE:
        return None
    if weight.packed.is_cuda:
        return partial(_multiply, weight)
    if weight.packed.device.type != "cpu" or dtype != torch.bfloat16 or weight.shape[0] % OUTPUTS:
        return None
    return _reordered_product(weight) if _is_order_right() else None


def _multiply(weight: QuantizedTensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    scales: dict[str, torch.Tensor | None] = {"absmax": weight.absmax}
    if weight.offset is not None:
        scales = {"absmax": weight.nested_absmax, "absmax_8bit": weight.absmax, "absmax_code": weight.nested_code}
        scales["absmax_offset"] = weight.offset[0]
    y: torch.Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
        x, weight.packed, weight.shape, blocksize=BLOCK_SIZE, quant_type=weight.quant_type, bias=bias, **scales
    )
    return y


def _reordered_product(weight: QuantizedTensor) -> Product:
    scales = weight.scales().view(weight.shape[0], -1).T.to(torch.bfloat16).contiguous()
    packed, levels = _reorder(weight.packed, weight.shape), torch.tensor(LEVELS[weight.quant_type])

    def multiply(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = torch.ops.bitsandbytes.gemv_4bit.default(
            x.contiguous(), packed, shapeB=weight.shape, absmax=scales, code=levels, blocksize=BLOCK_SIZE
        )
        return y if bias is None else y.add_(bias)

    return multiply


def _reorder(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The codes of a weight in the kernel's order: (out, in / 2) uint8."""
    halves = packed.view(-1, 2, OUTPUTS // 2, shape[1] // 2)  # 32 outputs as 2 x 16
    first, second = halves[:, 0], halves[:, 1]
    pairs = torch.stack((second & 0xF0 | first >> 4, second << 4 | first & 0xF), dim=-1)
    return pairs.transpose(1, 2).reshape(shape[0], shape[1] // 2)


@functools.cache
def _is_order_right() -> bool:
    """Whether the kernel exists and reads the order that `_reorder` makes."""
    dense = torch.randn(2 * OUTPUTS, 2 * BLOCK_SIZE, generator=torch.Generator().manual_seed(0))
    weight, x = quantize(dense), torch.eye(2 * BLOCK_SIZE, dtype=torch.bfloat16)
    try:
        y = _reordered_product(weight)(x, None)
    except Exception:  # whatever a missing or changed operator raises
        return False
    # An entry of y is one weight, off by the rounding of its level, its scale and itself, 1 / 256 each.
    return torch.allclose(y.float().T, weight.dequantize(torch.float32), rtol=0.02, atol=0)
