"""AdamW by hand, bitsandbytes' AdamW beside it, and moments that survive a file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.adapters.optimizers import BITSANDBYTES_OPTIMIZERS, build_optimizer
from minilora.errors import UserError
from minilora.planning.memory import moments_bytes
from minilora.qlora.optim import AdamWSettings, Optimizer, set_rate
from minilora.system import bnb


def build(parameters: list[torch.nn.Parameter], optim: str) -> Optimizer:
    if optim in BITSANDBYTES_OPTIMIZERS:
        pytest.importorskip("bitsandbytes")
    groups = [(parameters[:2], 1.0), (parameters[2:], 0.5)]
    return build_optimizer(groups, AdamWSettings((0.8, 0.95), 1e-6, 0.1), optim)


def stepped(steps: int, optim: str = "adamw_torch_fused") -> tuple[list[torch.nn.Parameter], Optimizer]:
    """Three parameters, one large enough for 8-bit moments, after some steps with gradients that differ."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(size)) for size in ((3, 4), (5,), (64, 80))]
    optimizer = build(parameters, optim)
    for step in range(1, steps + 1):
        take_step(parameters, optimizer, step)
    return parameters, optimizer


def take_step(parameters: list[torch.nn.Parameter], optimizer: Optimizer, step: int) -> None:
    for parameter in parameters:
        parameter.grad = torch.sin(parameter.detach() * step)
    set_rate(optimizer, 0.01)
    optimizer.step()


def test_the_update_is_adamw_by_hand() -> None:
    parameters, optimizer = stepped(0)
    mean = torch.zeros(3, 4)
    square = torch.zeros(3, 4)
    value = parameters[0].detach().clone()
    for step in range(1, 4):
        gradient = torch.sin(parameters[0].detach() * step)
        take_step(parameters, optimizer, step)
        value -= 0.01 * 0.1 * value
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.95 * square + 0.05 * gradient**2
        value -= 0.01 * (mean / (1 - 0.8**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-6)
        # float32 rounding of a handful of operations in another order
        torch.testing.assert_close(parameters[0].detach(), value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_bnb_8bit"])
def test_a_group_learns_at_its_own_multiple_of_the_rate(optim: str) -> None:
    """AdamW's first step is the rate times the gradient's sign, whatever the gradient's size."""
    parameters, _ = stepped(0)
    before = [parameter.detach().clone() for parameter in parameters]
    take_step(parameters, build(parameters, optim), 1)
    for old, new, rate in zip(before, parameters, (0.01, 0.01, 0.005), strict=True):
        moved = (old * (1 - rate * 0.1) - new.detach()).abs()
        assert moved.median().item() == pytest.approx(rate, rel=0.01)


OPTIMIZERS = ["adamw_torch_fused", *BITSANDBYTES_OPTIMIZERS]


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_moments_come_back_from_a_file_and_the_run_goes_on_to_the_bit(tmp_path: Path, optim: str) -> None:
    parameters, optimizer = stepped(3, optim)
    save_file(optimizer.tensors(), tmp_path / "optimizer.safetensors")
    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    restored = build(copies, optim)
    saved = load_file(tmp_path / "optimizer.safetensors")
    assert {name: tensor.shape for name, tensor in saved.items()} == restored.state_shapes()
    assert restored.tensors() == {}
    restored.load_tensors(saved)
    for step in (4, 5):
        take_step(parameters, optimizer, step)
        take_step(copies, restored, step)
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))
    first, second = optimizer.tensors(), restored.tensors()
    assert first.keys() == second.keys() == restored.state_shapes().keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["0.step"].item() == 5


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_the_bytes_of_moments_are_counted_beforehand(optim: str) -> None:
    parameters, optimizer = stepped(1, optim)
    sizes = [parameter.numel() for parameter in parameters]
    held = sum(tensor.nbytes for name, tensor in optimizer.tensors().items() if not name.endswith(".step"))
    assert moments_bytes(optim, sizes, "cpu") == held


def test_moments_that_a_gpu_may_page_out_are_not_counted_there() -> None:
    sizes = [99_999, 100_000, 5_000_000]
    for optim in ("adamw_torch_fused", "adamw_bnb_8bit"):
        assert moments_bytes(optim, sizes, "cuda") == moments_bytes(optim, sizes, "cpu")
    for optim in ("paged_adamw_32bit", "paged_adamw_8bit"):
        assert moments_bytes(optim, sizes, "cuda") == moments_bytes(optim, sizes[:1], "cpu")


def test_the_cpu_waits_for_the_gpu_before_it_touches_paged_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = stepped(1, "paged_adamw_8bit")
    adamw: Any = vars(optimizer)["_adamw"]
    saved, events, plain = optimizer.tensors(), list[str](), adamw.init_state
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    monkeypatch.setattr(adamw, "init_state", lambda *arguments: (events.append("kernels"), plain(*arguments)))
    optimizer.tensors()
    assert events == []
    adamw.is_paged = adamw._cpu_paged_warned = True  # as on a GPU
    optimizer.tensors()
    optimizer.load_tensors(saved)
    assert events == ["wait", *["kernels"] * 3, "wait"]


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_before_the_first_step_there_are_no_moments(optim: str) -> None:
    _, optimizer = stepped(0, optim)
    assert optimizer.state_shapes()
    assert optimizer.tensors() == {}
    optimizer.load_tensors({})
    assert optimizer.tensors() == {}


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_gradients_are_freed(optim: str) -> None:
    parameters, optimizer = stepped(1, optim)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize(("optim", "tolerance"), [("paged_adamw_32bit", 1e-6), ("adamw_bnb_8bit", 2e-3)])
def test_bitsandbytes_updates_are_pytorchs_within_the_bits_of_a_moment(optim: str, tolerance: float) -> None:
    (expected, _), (found, optimizer) = stepped(5), stepped(5, optim)
    differences = [(a - b).abs().max().item() for a, b in zip(expected, found, strict=True)]
    assert max(differences) < tolerance  # five steps of 0.01
    assert optimizer.tensors()["2.state1"].dtype == (torch.uint8 if "8bit" in optim else torch.float32)


def test_an_optimizer_of_bitsandbytes_without_bitsandbytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb, "functional", lambda: None)
    with pytest.raises(UserError, match=r"train\.optim: needs bitsandbytes.* adamw_torch_fused"):
        build_optimizer([([torch.nn.Parameter(torch.zeros(2))], 1.0)], optim="adamw_bnb_8bit")
