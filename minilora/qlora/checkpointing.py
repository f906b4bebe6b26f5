"""Gradient checkpointing: a layer keeps only its input, and is recomputed in backward.

A third more work, for most of the memory that activations take: the last product, down_proj's, is not recomputed, since
no gradient needs it. torch.utils.checkpoint would, and import PyTorch's compiler: 70 MB and some seconds.
Source: arXiv 1604.06174.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn


class _Checkpoint(torch.autograd.Function):
    """Recomputes with the same dropout masks, a function of the micro-batch's seed (`lora.py`). The trained parameters
    are inputs too: the first layer's input needs no gradient, and a Function without one that does has no backward.
    """

    @staticmethod
    def forward(
        ctx: Any, layer: nn.Module, offload: bool, inputs: Any, hidden: torch.Tensor, *parameters: torch.Tensor
    ) -> torch.Tensor:
        ctx.layer, ctx.inputs, ctx.parameters, ctx.device = layer, inputs, parameters, hidden.device
        output: torch.Tensor = layer(hidden, inputs)
        if offload and hidden.is_cuda:  # pinned, so that neither copy makes the processor wait
            hidden = torch.empty_like(hidden, device="cpu", pin_memory=True).copy_(hidden, non_blocking=True)
        ctx.save_for_backward(hidden)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs_dhidden = ctx.needs_input_grad[3]
        hidden = ctx.saved_tensors[0].to(ctx.device, non_blocking=True).detach().requires_grad_(needs_dhidden)
        with torch.enable_grad():
            output = ctx.layer(hidden, replace(ctx.inputs, is_recomputed=True))
        wanted = (*((hidden,) if needs_dhidden else ()), *ctx.parameters)
        found = torch.autograd.grad(output, wanted, grads, allow_unused=True)
        return None, None, None, *(() if needs_dhidden else (None,)), *found


def checkpoint_layer(layer: nn.Module, hidden: torch.Tensor, inputs: Any, offload: bool) -> torch.Tensor:
    """`layer(hidden, inputs)`, recomputed in backward: a layer that gives the same whenever it is called.

    Only `hidden` (T, C) is kept, with `offload` on a GPU in the computer's memory. No gradient flows to `inputs`, a
    dataclass whose `is_recomputed` is set in backward.
    """
    trained = (parameter for parameter in layer.parameters() if parameter.requires_grad)
    return _Checkpoint.apply(layer, offload, inputs, hidden, *trained)
