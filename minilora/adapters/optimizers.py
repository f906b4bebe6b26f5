"""The optimizer that `train.optim` names, over an adapter's trained parameters.

`adamw_torch_fused` is `qlora/optim.py`'s AdamW. The others are bitsandbytes', with moments in 8 bits (arXiv 2110.02861)
or in memory that a GPU may page out.
"""

from collections.abc import Sequence
from typing import Any

import torch

from minilora.qlora.optim import AdamW, AdamWSettings, Optimizer, parameters_of
from minilora.system import bnb

# bitsandbytes' optimizers, by transformers' names: bits of a moment, and whether it may be paged out.
BITSANDBYTES_OPTIMIZERS = {
    "adamw_bnb_8bit": (8, False),
    "paged_adamw_8bit": (8, True),
    "paged_adamw_32bit": (32, True),
}
ParameterGroup = tuple[list[torch.nn.Parameter], float]  # parameters, and what their learning rate is multiplied by
SMALLEST_8BIT = 4096  # elements; a smaller tensor's moments stay in 32 bits
BLOCK_8BIT = 256  # elements under one scale
SMALLEST_PAGED = 100_000  # elements; a smaller tensor's moments are never paged


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
    groups: Sequence[ParameterGroup], settings: AdamWSettings | None = None, optim: str = "adamw_torch_fused"
) -> Optimizer:
    """AdamW over the groups of `attach.parameter_groups`; UserError as `check_optimizer`."""
    settings = settings or AdamWSettings()
    param_groups = [{"params": list(parameters), "lr": 0.0, "lr_ratio": ratio} for parameters, ratio in groups]
    if optim in BITSANDBYTES_OPTIMIZERS:
        return BitsAndBytesAdamW(param_groups, settings, *BITSANDBYTES_OPTIMIZERS[optim])
    return AdamW(param_groups, settings)
