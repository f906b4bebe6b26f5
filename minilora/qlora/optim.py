"""AdamW over the adapter, and the learning rate as a pure function of the step.

PyTorch's own AdamW (decoupled weight decay, arXiv 1711.05101) does the update. There is no scheduler object: its state
would be one more thing to save, and the rate of any step can be asked for at any time.
Left out: bitsandbytes' AdamW, with moments in 8 bits or paged out (`adapters/optimizers.py`).
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.optim.adamw import adamw


def lr_at(step: int, total_steps: int, *, peak: float, schedule: str = "cosine", warmup_ratio: float = 0.0) -> float:
    """Learning rate of optimizer step `step`, counted from 1.

    Rises linearly to `peak` over the first ceil(warmup_ratio * total_steps) steps, then falls towards 0 along half a
    cosine ("cosine"), a line ("linear"), or not at all ("constant"). No step is taken at rate 0, not even the last.
    """
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step <= warmup_steps:
        return peak * step / warmup_steps
    remaining = (total_steps - step + 1) / (total_steps - warmup_steps)
    if schedule == "cosine":
        return peak * 0.5 * (1 - math.cos(math.pi * remaining))
    return peak * remaining if schedule == "linear" else peak


@dataclass(frozen=True)
class AdamWSettings:
    """What AdamW is told, beside the rate."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0  # decoupled


class Optimizer(Protocol):
    """What training asks of an optimizer."""

    param_groups: list[dict[str, Any]]  # `params`, `lr` and `lr_ratio`; `torch.amp.GradScaler` reads it too

    def step(self) -> None:
        """Moves every parameter by its gradient, which it must have."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state as `{i}.{name}`, i the parameter's index, on the CPU; nothing before the first step."""

    def state_shapes(self) -> dict[str, torch.Size]:
        """Name and shape of all that `tensors` gives after a step."""

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restores what `tensors` gave, of those shapes."""

    def zero_grad(self) -> None:
        for parameter in parameters_of(self):
            parameter.grad = None


def parameters_of(optimizer: Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def set_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Sets the learning rate of the next step, in each group times its `lr_ratio`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_ratio", 1.0)


class AdamW(Optimizer):
    """PyTorch's fused AdamW over all parameters, and its state (exp_avg, exp_avg_sq, step) as plain lists of tensors.

    The update is PyTorch's. Its `torch.optim.Optimizer` around it is not used: constructing one imports the compiler,
    70 MB and a second or two for nothing, and its state is harder to name than these lists.
    """

    def __init__(self, param_groups: list[dict[str, Any]], settings: AdamWSettings):
        self.param_groups = param_groups
        self._settings = settings
        self._moments: dict[str, list[torch.Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        parameters = parameters_of(self)
        if not self._moments:  # all of them or, where memory runs out, none
            moments = {name: [torch.zeros_like(p) for p in parameters] for name in ("exp_avg", "exp_avg_sq")}
            self._moments = {**moments, "step": [torch.zeros((), device=p.device) for p in parameters]}
        start = 0
        for group in self.param_groups:
            own = slice(start, start + len(group["params"]))
            start = own.stop
            adamw(
                group["params"],
                grads=[p.grad for p in group["params"]],
                exp_avgs=self._moments["exp_avg"][own],
                exp_avg_sqs=self._moments["exp_avg_sq"][own],
                max_exp_avg_sqs=[],
                state_steps=self._moments["step"][own],
                fused=True,
                amsgrad=False,
                beta1=self._settings.betas[0],
                beta2=self._settings.betas[1],
                lr=group["lr"],
                weight_decay=self._settings.weight_decay,
                eps=self._settings.eps,
                maximize=False,
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        named = ((f"{i}.{name}", t) for name, moments in self._moments.items() for i, t in enumerate(moments))
        return {name: tensor.detach().cpu().contiguous() for name, tensor in named}

    def state_shapes(self) -> dict[str, torch.Size]:
        return {
            f"{i}.{name}": torch.Size() if name == "step" else parameter.shape
            for i, parameter in enumerate(parameters_of(self))
            for name in ("exp_avg", "exp_avg_sq", "step")
        }

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        names = ("exp_avg", "exp_avg_sq", "step") if tensors else ()
        self._moments = {
            name: [tensors[f"{i}.{name}"].to(p.device) for i, p in enumerate(parameters_of(self))] for name in names
        }
