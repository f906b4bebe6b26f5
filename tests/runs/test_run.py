"""A step's micro-batches are a function of (seed, step), and what is due is a function of the state."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minilora.runs.run import Run, batches
from minilora.runs.setup import open_run
from minilora.system.distributed import Ranks
from tests.runs.conftest import make_config


@pytest.fixture
def opened(tiny_checkpoint: Callable[..., Path], data: Path, tmp_path: Path) -> Run:
    """A run of 3 epochs of 7 steps, the last one short: 48 examples, 7 a step."""
    keys = {"train.max_steps": 21, "train.per_device_train_batch_size": 7}
    return open_run(make_config(data, tmp_path / "run", **keys), tiny_checkpoint())


def test_an_epoch_takes_each_record_once_and_any_step_can_be_made_on_its_own(opened: Run) -> None:
    epochs = [[batches(opened, step).records for step in range(first, first + 7)] for first in (1, 8)]
    for epoch in epochs:
        assert [len(records) for records in epoch] == [7] * 6 + [6]
        assert set(Counter(where for records in epoch for where in records).values()) == {1}
    assert epochs[0] != epochs[1]
    assert batches(opened, 9).records == epochs[1][1]


def test_the_ranks_share_the_examples_of_a_step(opened: Run) -> None:
    config = replace(opened.config, train=replace(opened.config.train, per_device_train_batch_size=4))
    shares = [
        batches(replace(opened, config=config, ranks=Ranks(rank=rank, size=2)), 1).micro_batches for rank in (0, 1)
    ]
    assert [len(share) for share in shares] == [1, 1]
    step = replace(opened, config=config, ranks=Ranks(size=2))
    assert sum(part.num_supervised for share in shares for part in share) == batches(step, 1).settings.total_weight


def test_the_ranks_divide_by_the_weight_of_all_their_tokens(opened: Run) -> None:
    weights = {"负面": 0.5, "正面": 9.0}
    config = replace(opened.config, train=replace(opened.config.train, per_device_train_batch_size=4))
    steps = [batches(replace(opened, config=config, ranks=Ranks(r, 2), class_weights=weights), 1) for r in (0, 1)]
    of_tokens = [part.weights for step in steps for part in step.micro_batches]
    assert [step.settings.total_weight for step in steps] == [sum(float(tensor.sum()) for tensor in of_tokens)] * 2
    example_weights = [weights[opened.prompt.labels[example.label]] for example in steps[0].examples]
    assert {*example_weights} == {0.5, 9.0}
    assert sorted(torch.cat(of_tokens).tolist()) == sorted(2 * example_weights)  # a word and its closing token
    assert all(part.weights is None for part in batches(opened, 1).micro_batches)


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_memory_estimate_is_for_the_largest_share_of_any_rank(opened: Run, ranks: int) -> None:
    run = replace(opened, ranks=Ranks(size=ranks))
    steps = range(1, run.total_steps + 1)
    shares = [
        share
        for step in steps
        for rank in range(ranks)
        for share in batches(replace(run, ranks=Ranks(rank, ranks)), step).micro_batches
    ]
    tokens = max(len(share.input_ids) for share in shares)
    assert run.batch_shape.tokens == tokens
    assert f"activations of {tokens} tokens" in run.memory_estimate.parts


@pytest.mark.parametrize(
    ("step", "saved", "skipped", "validation", "save"),
    [
        (1, 0, 0, False, False),
        (2, 0, 0, True, False),
        (3, 2, 0, False, True),
        (3, 2, 1, False, False),  # skipped: the next step is saved in its place
        (4, 2, 0, True, True),
        (21, 20, 1, True, True),
    ],
)
def test_what_is_due_after_a_step(
    opened: Run, step: int, saved: int, skipped: int, validation: bool, save: bool
) -> None:
    config = replace(opened.config, train=replace(opened.config.train, save_steps=3))
    run = replace(opened, config=config, state=replace(opened.state, step=step, skipped_in_a_row=skipped))
    run.saved = replace(opened.state, step=saved)
    assert (run.is_validation_due, run.is_save_due, run.is_done) == (validation, save, step == 21)


def test_an_interrupted_validation_is_due_and_its_entry_not_yet_logged(opened: Run) -> None:
    run = replace(opened, state=replace(opened.state, step=21, pending_entry={"step": 21}))
    assert run.is_validation_due
    assert not run.is_done
    assert run.logged_steps == 20
