"""AdamW over the adapter, and the learning rate as a pure function of the step.

PyTorch's own AdamW (decoupled weight decay, arXiv 1711.05101) does the update. There is no scheduler object:
its state would be one more thing to save, and the rate of any step can be asked for at any time.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw


def lr_at(step: int, total_steps: int, peak: float, schedule: str = "cosine", warmup_ratio: float = 0.0) -> float:
    """Learning rate of optimizer step `step`, counted from 1.

    Rises linearly to `peak` over the first ceil(warmup_ratio * total_steps) steps, then falls towards 0 along
    half a cosine, a line, or not at all. No step is taken at rate 0: neither the first nor the last.

    Args:
        step: 1 to total_steps.
        total_steps: steps of the whole run.
        peak: the highest rate.
        schedule: "cosine", "linear" or "constant".
        warmup_ratio: share of the run spent rising.
    """
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step <= warmup_steps:
        return peak * step / warmup_steps
    remaining = (total_steps - step + 1) / (total_steps - warmup_steps)
    if schedule == "cosine":
        return peak * 0.5 * (1 - math.cos(math.pi * remaining))
    return peak * remaining if schedule == "linear" else peak


class AdamW:
    """PyTorch's fused AdamW over all parameters, and its state as plain lists of tensors.

    The update is PyTorch's. Its `torch.optim.Optimizer` around it is not used: constructing one imports the compiler,
    70 MB and a second or two for nothing, and its state is harder to name than these lists.

    Attributes:
        param_groups: one group, `params` and `lr`; what `step.py` and `torch.amp.GradScaler` ask for.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], betas: tuple[float, float], eps: float, weight_decay: float
    ):
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": 0.0}]
        self._betas, self._eps, self._weight_decay = betas, eps, weight_decay
        self._moments: dict[str, list[torch.Tensor]] = {}

    def step(self) -> None:
        """Moves every parameter by its gradient, which it must have."""
        (group,) = self.param_groups
        parameters = group["params"]
        if not self._moments:
            self._moments = {name: [torch.zeros_like(p) for p in parameters] for name in ("exp_avg", "exp_avg_sq")}
            self._moments["step"] = [torch.zeros((), device=p.device) for p in parameters]
        with torch.no_grad():
            adamw(
                parameters,
                [p.grad for p in parameters],
                self._moments["exp_avg"],
                self._moments["exp_avg_sq"],
                [],
                self._moments["step"],
                fused=True,
                amsgrad=False,
                beta1=self._betas[0],
                beta2=self._betas[1],
                lr=group["lr"],
                weight_decay=self._weight_decay,
                eps=self._eps,
                maximize=False,
            )

    def zero_grad(self) -> None:
        """Frees all gradients."""
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """`{i}.exp_avg`, `{i}.exp_avg_sq`, `{i}.step`, i the parameter's place; nothing before the first step."""
        named = ((f"{i}.{name}", t) for name, moments in self._moments.items() for i, t in enumerate(moments))
        return {name: tensor.detach().cpu().contiguous() for name, tensor in named}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Puts back what `tensors` gave."""
        parameters = self.param_groups[0]["params"]
        names = ("exp_avg", "exp_avg_sq", "step") if tensors else ()
        self._moments = {
            name: [tensors[f"{i}.{name}"].to(p.device) for i, p in enumerate(parameters)] for name in names
        }


def build_optimizer(
    parameters: Sequence[torch.nn.Parameter],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> AdamW:
    """AdamW over all of `parameters`; `step.py` sets the rate."""
    return AdamW(parameters, betas, eps, weight_decay)
