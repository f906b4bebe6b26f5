"""AdamW over the adapter, and the learning rate as a pure function of the step.

PyTorch's own AdamW (decoupled weight decay, arXiv 1711.05101) does the update, or one of bitsandbytes' with moments
in 8 bits (arXiv 2110.02861) or in memory that a GPU may page out. There is no scheduler object: its state would be one
more thing to save, and the rate of any step can be asked for at any time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.optim.adamw import adamw

from minilora.qlora import bnb

# bitsandbytes' optimizers, by transformers' names: bits of a moment, and whether it may be paged out.
BITSANDBYTES_OPTIMIZERS = {
    "adamw_bnb_8bit": (8, False),
    "paged_adamw_8bit": (8, True),
    "paged_adamw_32bit": (32, True),
}


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


ParameterGroup = tuple[list[torch.nn.Parameter], float]  # parameters, and what their learning rate is multiplied by
SMALLEST_8BIT = 4096  # elements; a smaller tensor's moments stay in 32 bits
BLOCK_8BIT = 256  # elements under one scale
SMALLEST_PAGED = 100_000  # elements; a smaller tensor's moments are never paged


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


class BitsAndBytesAdamW(Optimizer):
    """bitsandbytes' AdamW, its state by the same kind of names: state1, state2, step, and the scales of 8-bit moments.

    A tensor of fewer than SMALLEST_8BIT elements keeps its moments in 32 bits, and only moments of SMALLEST_PAGED
    elements and more are paged: in a 0.5B from r = 32 on. On a CPU nothing is. bitsandbytes waits for the GPU after
    each parameter.
    """

    def __init__(self, param_groups: list[dict[str, Any]], settings: AdamWSettings, bits: int, paged: bool):
        self._bits = bits
        self._adamw = bnb.adamw()(
            param_groups,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            optim_bits=bits,
            min_8bit_size=SMALLEST_8BIT,
            is_paged=paged and param_groups[0]["params"][0].is_cuda,
        )
        self.param_groups = self._adamw.param_groups

    def step(self) -> None:
        self._adamw.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: torch.as_tensor(x).detach().to("cpu", copy=True) for name, x in self._named_state().items()}

    def state_shapes(self) -> dict[str, torch.Size]:
        shapes: dict[str, torch.Size] = {}
        for i, parameter in enumerate(parameters_of(self)):
            shapes |= {f"{i}.step": torch.Size(), f"{i}.state1": parameter.shape, f"{i}.state2": parameter.shape}
            if self._bits == 8 and parameter.numel() >= SMALLEST_8BIT:
                blocks = torch.Size([-(-parameter.numel() // BLOCK_8BIT)])
                shapes |= {f"{i}.absmax1": blocks, f"{i}.absmax2": blocks}
        return shapes

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self._adamw.state.clear()
        if not tensors:
            return
        for group_index, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                self._adamw.init_state(group, parameter, group_index, index)
        for name, value in self._named_state().items():
            if isinstance(value, torch.Tensor):
                value.copy_(tensors[name])  # in place: paged memory stays paged
        for i, parameter in enumerate(parameters_of(self)):
            self._adamw.state[parameter]["step"] = int(tensors[f"{i}.step"])

    def _named_state(self) -> dict[str, Any]:
        """Everything except the levels of 8-bit numbers, which are constants; nothing before the first step."""
        if self._adamw.is_paged:  # the CPU touches it next, which on Windows and WSL it must not while a kernel runs
            torch.cuda.synchronize()
        return {
            f"{i}.{name}": value
            for i, parameter in enumerate(parameters_of(self))
            for name, value in self._adamw.state.get(parameter, {}).items()
            if not name.startswith("qmap")
        }


def check_optimizer(optim: str) -> None:
    """UserError for an optimizer of bitsandbytes where that cannot be imported."""
    if optim in BITSANDBYTES_OPTIMIZERS:
        bnb.adamw()


def build_optimizer(
    groups: Sequence[ParameterGroup], settings: AdamWSettings = AdamWSettings(), optim: str = "adamw_torch_fused"
) -> Optimizer:
    """AdamW over the groups of `attach.parameter_groups`; UserError as `check_optimizer`."""
    param_groups = [{"params": list(parameters), "lr": 0.0, "lr_ratio": ratio} for parameters, ratio in groups]
    if optim in BITSANDBYTES_OPTIMIZERS:
        return BitsAndBytesAdamW(param_groups, settings, *BITSANDBYTES_OPTIMIZERS[optim])
    return AdamW(param_groups, settings)
