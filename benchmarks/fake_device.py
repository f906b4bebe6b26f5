"""A model on a device that this machine has not: shapes, strides and devices are computed, and no values.

PyTorch's FakeTensorMode traces operators without running them. `lazy` is a device for which this build has no kernels;
a fake `cuda` needs a CUDA build, and a card in backward. What asks whether a tensor is on the CPU is traced as on a
GPU, and flash attention where `has_flash` says so.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from minilora.qlora import model as model_module
from minilora.qlora.attention import AttentionGroup
from minilora.qlora.batch import MicroBatch, SegmentGroup
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.nf4 import Linear4bit

DEVICE = torch.device("lazy")
TABLES = ("input_ids", "position_ids", "supervised_positions", "targets", "example_indices", "weights")


def moved(value: Any) -> Any:
    """Tensors as fake ones on the device, within tuples and the dataclasses of attention too; all else as it is."""
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device=DEVICE)
    if isinstance(value, tuple):
        return tuple(map(moved, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: moved(getattr(value, f.name)) for f in fields(value)})
    return value


def moved_batch(batch: MicroBatch) -> MicroBatch:
    """A micro-batch as `MicroBatch.to` moves it: groups stay on the CPU."""
    return replace(batch, **{name: moved(getattr(batch, name)) for name in TABLES})


@contextmanager
def on_device(model: Qwen2ForCausalLM, has_flash: bool = False) -> Iterator[None]:
    """Makes the model's tensors fake ones on the device, for good; tables of indices are made of values on the CPU."""
    make, pack_segments = model_module.split_heads, model_module.pack_segments

    def split_heads(groups: Sequence[SegmentGroup], *heads: int, like: torch.Tensor, **named: Any) -> Any:
        with unset_fake_temporarily():
            split: tuple[AttentionGroup, ...] = make(groups, *heads, like=torch.empty(0, dtype=like.dtype), **named)
        return tuple(moved(group) for group in split)

    def on_cpu(*given: Any) -> tuple[SegmentGroup, ...]:
        with unset_fake_temporarily():
            return pack_segments(*given)

    def fused_rms_norm(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """One kernel, as on a GPU: without one PyTorch would take its nine operators."""
        return x.clone(), x.new_empty(len(x), 1, dtype=torch.promote_types(x.dtype, torch.float32))

    fused_rms_norm.default = torch.ops.aten._fused_rms_norm.default  # which PyTorch's own modules look up
    with (
        patch.object(torch.ops.aten, "_fused_rms_norm", fused_rms_norm),
        patch.object(model_module, "split_heads", split_heads),
        patch.object(model_module, "pack_segments", on_cpu),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(moved(parameter.data), parameter.requires_grad))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, moved(buffer))
            if isinstance(module, Linear4bit) and module.stacked is not None:
                stack: Any = module.stacked.func.__self__  # type: ignore[attr-defined]
                vars(stack).update({name: moved(value) for name, value in vars(stack).items()})
        head = model.head_weight
        model.model.flash_attention = (head.device, head.dtype) if has_flash else None
        yield
