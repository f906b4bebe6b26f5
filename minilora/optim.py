"""AdamW over the adapter, and the learning rate as a pure function of the step.

PyTorch's own AdamW (decoupled weight decay, arXiv 1711.05101) does the update. There is no scheduler object:
its state would be one more thing to save, and the rate of any step can be asked for at any time.
"""

import math
from collections.abc import Sequence

import torch


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


def build_optimizer(
    parameters: Sequence[torch.nn.Parameter],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.AdamW:
    """AdamW over all of `parameters`, updated together (`foreach`); `step.py` sets the rate."""
    return torch.optim.AdamW(parameters, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, foreach=True)


def optimizer_tensors(optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """The moments as named tensors: `{i}.exp_avg`, `{i}.exp_avg_sq`, `{i}.step`, i the parameter's place."""
    tensors = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.AdamW, tensors: dict[str, torch.Tensor]) -> None:
    """Puts back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    content = optimizer.state_dict()
    content["state"] = state
    optimizer.load_state_dict(content)
