"""Gradient checkpointing: a layer keeps its input alone, and runs a second time in backward.

Half as much work again, for most of the memory that activations take. torch.utils.checkpoint does the same and more;
it would import PyTorch's compiler, 70 MB. Source: arXiv 1604.06174.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class _Recomputed(torch.autograd.Function):
    """A layer that keeps its input alone and runs again in backward.

    Its second run gets the same dropout masks: they are a function of a seed that stays set until the next micro-batch
    (`dropout.py`). The trained parameters are inputs too, because the first layer's rows need no gradient, and a
    function of which no input needs one has no backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layer: nn.Module,
        offload: bool,
        arguments: Sequence[Any],
        hidden: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        ctx.layer, ctx.arguments, ctx.parameters, ctx.device = layer, arguments, parameters, hidden.device
        output: torch.Tensor = layer(hidden, *arguments)
        if offload and hidden.is_cuda:  # pinned, so that neither copy makes the processor wait
            hidden = torch.empty_like(hidden, device="cpu", pin_memory=True).copy_(hidden, non_blocking=True)
        ctx.save_for_backward(hidden)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs_dhidden = ctx.needs_input_grad[3]
        hidden = ctx.saved_tensors[0].to(ctx.device, non_blocking=True).detach().requires_grad_(needs_dhidden)
        with torch.enable_grad():
            output = ctx.layer(hidden, *ctx.arguments)
        inputs = (*((hidden,) if needs_dhidden else ()), *ctx.parameters)
        found = torch.autograd.grad(output, inputs, grads, allow_unused=True)
        return None, None, None, *(() if needs_dhidden else (None,)), *found


def checkpoint_layer(layer: nn.Module, hidden: torch.Tensor, arguments: Sequence[Any], offload: bool) -> torch.Tensor:
    """`layer(hidden, *arguments)`, computed again in backward.

    Args:
        layer: gives the same output for the same input, whenever it runs.
        hidden: (T, C); all that is kept.
        arguments: what else it takes; no gradient flows to them.
        offload: on a GPU, `hidden` waits in the computer's memory.
    """
    trained = (parameter for parameter in layer.parameters() if parameter.requires_grad)
    return _Recomputed.apply(layer, offload, arguments, hidden, *trained)
