"""One optimizer step does what its definition says, however it is cut."""

import contextlib
import math
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch

from minilora.adapters.attach import attach, iter_lora_weights, lora_parameters, parameter_groups
from minilora.adapters.optimizers import build_optimizer
from minilora.config import LoraConfig
from minilora.qlora import step as step_module
from minilora.qlora.batch import pack
from minilora.qlora.lora import DropoutSeed
from minilora.qlora.loss import head_logits, next_token_nll
from minilora.qlora.model import Qwen2Config, Qwen2ForCausalLM
from minilora.qlora.prompt import Example
from minilora.qlora.step import StepSettings, TrainState, train_step


def build(dropout: float = 0.0) -> tuple[Qwen2ForCausalLM, DropoutSeed]:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(50, 16, 24, 2, 4, 2, 1e-6, 1e4, True))
    dropout_seed = attach(model, LoraConfig(r=2, alpha=4, dropout=dropout))
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    return model.train(), dropout_seed


def examples(count: int) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        length = int(torch.randint(4, 12, (1,), generator=generator))
        ids = [1, 2, 3, *torch.randint(4, 50, (length,), generator=generator).tolist()]
        made.append(Example(ids, [False] * (len(ids) - 2) + [True, True]))
    return made


def take_step(max_grad_norm: float, learning_rate: float = 0.1) -> tuple[list[torch.Tensor], float]:
    model, dropout_seed = build()
    before = [parameter.detach().clone() for parameter in lora_parameters(model)]
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.0)
    result = train_step(
        TrainState(model, optimizer, dropout_seed), [pack(examples(6))], StepSettings(1, learning_rate, max_grad_norm)
    )
    moved = [old - new.detach() for old, new in zip(before, lora_parameters(model), strict=True)]
    return moved, result.grad_norm


def test_loss_is_the_mean_over_all_supervised_tokens() -> None:
    model, dropout_seed = build()
    batch = pack(examples(6))
    with torch.no_grad():
        logits = head_logits(model(batch), model.head_weight)
        expected = torch.nn.functional.cross_entropy(logits, batch.targets).item()
    optimizer = build_optimizer(parameter_groups(model))
    micro_batches = [pack(examples(6)[:1]), pack(examples(6)[1:])]
    result = train_step(TrainState(model, optimizer, dropout_seed), micro_batches, StepSettings(1, 0.001, 1.0))
    assert result.loss == pytest.approx(expected, rel=1e-5)  # another order of float32 sums


WEIGHTS = [0.25, 3.0, 1.0, 0.5, 100.0, 2.0]  # of six examples


@pytest.mark.parametrize("names_total", [False, True])
@pytest.mark.parametrize("cut", [[6], [3, 3], [1, 2, 3], [5, 1], [1] * 6])
def test_a_weighted_step_is_the_weighted_mean_however_it_is_cut(cut: list[int], names_total: bool) -> None:
    model, dropout_seed = build()
    model.double()
    whole = pack(examples(6), weights=WEIGHTS)
    assert whole.weights is not None
    logits = model(whole) @ model.head_weight.T
    nll = torch.nn.functional.cross_entropy(logits, whole.targets, reduction="none")
    loss = (nll * whole.weights).sum() / whole.weights.sum()
    expected = torch.autograd.grad(loss, lora_parameters(model))
    before = [parameter.detach().clone() for parameter in lora_parameters(model)]
    ends = list(accumulate(cut, initial=0))
    micro_batches = [pack(examples(6)[a:b], weights=WEIGHTS[a:b]) for a, b in pairwise(ends)]
    settings = StepSettings(1, 0.5, 0.0, total_weight=2 * sum(WEIGHTS) if names_total else None)
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.0)
    result = train_step(TrainState(model, optimizer, dropout_seed), micro_batches, settings)
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)  # held in float32
    for old, new, gradient in zip(before, lora_parameters(model), expected, strict=True):
        torch.testing.assert_close((old - new.detach()) / 0.5, gradient, rtol=1e-9, atol=1e-13)


def test_gradient_is_clipped_to_the_global_norm() -> None:
    free, norm = take_step(max_grad_norm=0)
    clipped, same_norm = take_step(max_grad_norm=norm / 4)
    assert same_norm == norm
    for ours, theirs in zip(clipped, free, strict=True):
        torch.testing.assert_close(ours, theirs / 4, rtol=1e-3, atol=1e-7)  # clip_grad_norm_ adds 1e-6 to the norm


def test_dropout_differs_between_micro_batches_and_repeats_with_the_step() -> None:
    losses = []
    for step in (1, 1, 2):
        model, dropout_seed = build(dropout=0.5)
        optimizer = build_optimizer(parameter_groups(model))
        losses.append(
            train_step(
                TrainState(model, optimizer, dropout_seed), [pack(examples(6))], StepSettings(step, 0.001, 1.0)
            ).loss
        )
    assert losses[0] == losses[1] != losses[2]


def test_an_overflowed_float16_gradient_leaves_the_weights_alone() -> None:
    model, dropout_seed = build()
    before = [parameter.detach().clone() for parameter in lora_parameters(model)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # times a gradient above 2: infinite in float32
    optimizer = build_optimizer(parameter_groups(model))
    torch.nn.init.normal_(lora_parameters(model)[0], std=1e3)
    before[0] = lora_parameters(model)[0].detach().clone()
    result = train_step(
        TrainState(model, optimizer, dropout_seed, scaler=scaler), [pack(examples(6))], StepSettings(1, 0.001, 1.0)
    )
    assert not result.updated
    assert scaler.get_scale() < 2.0**127
    for old, new in zip(before, lora_parameters(model), strict=True):
        assert torch.equal(old, new)


def test_a_scaled_step_equals_an_unscaled_one() -> None:
    moved = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model, dropout_seed = build()
        optimizer = build_optimizer(parameter_groups(model))
        train_step(
            TrainState(model, optimizer, dropout_seed, scaler=scaler), [pack(examples(6))], StepSettings(1, 0.001, 1.0)
        )
        moved.append([parameter.detach().clone() for parameter in lora_parameters(model)])
    for ours, theirs in zip(*moved, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # a power of two scales float32 exactly


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_step_leaves_no_copies_of_the_adapter(is_stopped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that outlives its step would be what validation and the next step compute with."""

    def look(*arguments: Any) -> Any:
        seen.append([w.cast for _, w in iter_lora_weights(model)])
        if is_stopped:
            raise KeyboardInterrupt
        return next_token_nll(*arguments)

    model, dropout_seed = build()
    model.to(torch.bfloat16)
    for parameter in lora_parameters(model):
        parameter.data = parameter.data.float()
    seen: list[Any] = []
    monkeypatch.setattr(step_module, "next_token_nll", look)
    state = TrainState(model, build_optimizer(parameter_groups(model)), dropout_seed)
    with pytest.raises(KeyboardInterrupt) if is_stopped else contextlib.nullcontext():
        train_step(state, [pack(examples(6))], StepSettings(1, 0.01))
    assert None not in seen[0]
    assert all(w.cast is None for _, w in iter_lora_weights(model))


def contents(model: Qwen2ForCausalLM, optimizer: Any) -> list[torch.Tensor]:
    """Copies of all weights of the adapter and all moments."""
    return [t.detach().clone() for t in (*lora_parameters(model), *optimizer.tensors().values())]


def spoil_micro_batch(monkeypatch: pytest.MonkeyPatch, number: int, factor: float) -> None:
    """Multiplies the loss of micro-batch `number` of the next step by `factor`."""
    plain, calls = step_module.next_token_nll, iter(range(100))

    def spoiled(*arguments: Any) -> tuple[torch.Tensor, int]:
        nll, count = plain(*arguments)
        return (nll * factor if next(calls) == number else nll), count

    monkeypatch.setattr(step_module, "next_token_nll", spoiled)


@pytest.mark.parametrize("has_scaler", [False, True])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("number", [0, 2])
def test_a_loss_that_is_no_number_in_one_micro_batch_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, number: int, factor: float, has_scaler: bool
) -> None:
    model, dropout_seed = build()
    optimizer = build_optimizer(parameter_groups(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if has_scaler else None
    micro_batches = [pack(examples(6)[i : i + 2]) for i in (0, 2, 4)]
    assert train_step(
        TrainState(model, optimizer, dropout_seed, scaler=scaler), micro_batches, StepSettings(1, 0.01, 1.0)
    ).updated
    before = contents(model, optimizer)
    with monkeypatch.context() as patch:
        spoil_micro_batch(patch, number, factor)
        result = train_step(
            TrainState(model, optimizer, dropout_seed, scaler=scaler), micro_batches, StepSettings(2, 0.01, 1.0)
        )
    assert not result.updated
    assert not math.isfinite(result.loss)
    assert all(torch.equal(a, b) for a, b in zip(before, contents(model, optimizer), strict=True))
    assert all(parameter.grad is None for parameter in lora_parameters(model))
    assert train_step(
        TrainState(model, optimizer, dropout_seed, scaler=scaler), micro_batches, StepSettings(3, 0.01, 1.0)
    ).updated


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_one_gradient_that_is_no_number_changes_nothing(value: float) -> None:
    model, dropout_seed = build()
    optimizer = build_optimizer(parameter_groups(model))
    train_step(TrainState(model, optimizer, dropout_seed), [pack(examples(6))], StepSettings(1, 0.01, 1.0))
    before = contents(model, optimizer)

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        spoiled = gradient.clone()
        spoiled[-1, -1] = value
        return spoiled

    hook = lora_parameters(model)[-1].register_hook(spoil)
    result = train_step(TrainState(model, optimizer, dropout_seed), [pack(examples(6))], StepSettings(2, 0.01, 1.0))
    hook.remove()
    assert not result.updated
    assert math.isfinite(result.loss)
    assert not math.isfinite(result.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(before, contents(model, optimizer), strict=True))
    assert all(parameter.grad is None for parameter in lora_parameters(model))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_step_that_is_stopped_is_as_if_it_had_not_begun(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def interruptible() -> Iterator[None]:
        entered.append(None)
        yield

    def loss(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == number:
            raise KeyboardInterrupt
        return next_token_nll(*arguments)

    model, dropout_seed = build(dropout=0.5)
    optimizer = build_optimizer(parameter_groups(model))
    micro_batches = [pack(examples(6)[i : i + 2]) for i in (0, 2, 4)]
    state = TrainState(model, optimizer, dropout_seed)
    train_step(state, micro_batches, StepSettings(1, 1e-2))
    before = contents(model, optimizer)
    calls: list[None] = []
    entered: list[None] = []
    with monkeypatch.context() as patch:
        patch.setattr(step_module, "next_token_nll", loss)
        with pytest.raises(KeyboardInterrupt):
            train_step(state, micro_batches, StepSettings(2, 1e-2), interruptible)
    assert len(entered) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, contents(model, optimizer), strict=True))
    assert all(parameter.grad is None for parameter in lora_parameters(model))

    loss = train_step(state, micro_batches, StepSettings(2, 1e-2)).loss
    undisturbed, seed = build(dropout=0.5)
    other = build_optimizer(parameter_groups(undisturbed))
    for step in (1, 2):
        expected = train_step(TrainState(undisturbed, other, seed), micro_batches, StepSettings(step, 0.01, 1.0)).loss
    assert loss == expected
    assert all(torch.equal(a, b) for a, b in zip(contents(model, optimizer), contents(undisturbed, other), strict=True))
