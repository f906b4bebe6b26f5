"""4-bit NormalFloat: a dense weight in, a quarter of a byte a number out, and the linear layer over it.

(first version; bitsandbytes path)
"""

import functools
import logging
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

BLOCK_SIZE = 64
ABSMAX_BLOCK_SIZE = 256


@functools.cache
def _bitsandbytes() -> ModuleType | None:
    source = logging.getLogger("bitsandbytes.backends.cpu.ops")

    def is_wanted(record: logging.LogRecord) -> bool:
        return "kernels-community" not in record.getMessage()

    source.addFilter(is_wanted)
    try:
        import bitsandbytes.functional

        return bitsandbytes.functional
    except Exception as error:
        logging.getLogger("minilora").warning("bitsandbytes cannot be imported (%s)", error)
        return None
    finally:
        source.removeFilter(is_wanted)


def uses_bitsandbytes() -> bool:
    return _bitsandbytes() is not None


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    packed: torch.Tensor
    absmax: torch.Tensor
    shape: torch.Size
    quant_type: str
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        bnb = _bitsandbytes()
        assert bnb is not None
        nested = None
        if self.nested_absmax is not None:
            nested = bnb.QuantState(
                absmax=self.nested_absmax,
                code=self.nested_code,
                blocksize=ABSMAX_BLOCK_SIZE,
                dtype=torch.float32,
            )
        state = bnb.QuantState(
            absmax=self.absmax,
            shape=self.shape,
            blocksize=BLOCK_SIZE,
            quant_type=self.quant_type,
            dtype=dtype,
            offset=self.offset,
            state2=nested,
        )
        return bnb.dequantize_4bit(self.packed, state).view(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(v.nbytes for v in vars(self).values() if isinstance(v, torch.Tensor))

    def to(self, device: torch.device | str) -> "QuantizedTensor":
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)


def quantize(weight: torch.Tensor, quant_type: str = "nf4", double_quantization: bool = True) -> QuantizedTensor:
    bnb = _bitsandbytes()
    assert bnb is not None
    packed, state = bnb.quantize_4bit(
        weight.detach(), blocksize=BLOCK_SIZE, compress_statistics=double_quantization, quant_type=quant_type
    )
    if not double_quantization:
        return QuantizedTensor(packed, state.absmax, weight.shape, quant_type)
    return QuantizedTensor(
        packed,
        state.absmax,
        weight.shape,
        quant_type,
        state.state2.absmax,
        state.state2.code,
        state.offset.view(1),
    )


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        return dy @ ctx.weight.dequantize(dy.dtype), None, None


class Linear4bit(nn.Module):
    bias: torch.Tensor | None

    def __init__(self, weight: QuantizedTensor, bias: torch.Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.quant_type = weight.quant_type
        self._tensor_names = [f.name for f in fields(weight) if isinstance(getattr(weight, f.name), torch.Tensor)]
        for name in self._tensor_names:
            self.register_buffer(name, getattr(weight, name))
        self.register_buffer("bias", bias)

    @property
    def device(self) -> torch.device:
        return self._buffers["packed"].device  # type: ignore[union-attr]

    @property
    def weight(self) -> QuantizedTensor:
        tensors: dict[str, Any] = {name: self._buffers[name] for name in self._tensor_names}
        return QuantizedTensor(
            shape=torch.Size((self.out_features, self.in_features)), quant_type=self.quant_type, **tensors
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _FrozenLinear.apply(x, self.weight, self.bias)  # type: ignore[no-any-return]

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.dequantize(dtype)
