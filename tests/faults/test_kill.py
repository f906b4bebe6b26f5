"""SIGKILL at file operations of a run and at random instants, also while it resumes: nothing is lost."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from minilora.system.files import WRITING
from tests.faults.conftest import Harness


def is_within_a_save(output: Path) -> bool:
    checkpoints = output / "checkpoints"
    return checkpoints.is_dir() and any(
        path.name.startswith((".writing-", ".replaced-")) for path in checkpoints.iterdir()
    )


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_file_operation_ends_in_the_same_bytes(harness: Harness, tmp_path: Path) -> None:
    within, numbers = 0, range(1, len(harness.operations) + 1, harness.how_many(17, 1, 1))
    for number in numbers:
        output = tmp_path / f"kill-{number}"
        assert harness.run(output, {"kill": number}) == -signal.SIGKILL
        within += is_within_a_save(output)
        harness.finishes(output)
    of = f"of {len(harness.operations)} file operations of a run"
    harness.count(f"kill -9 at {len(numbers)} {of}: {within} within a save, lost: 0")
    assert within >= 0.3 * len(numbers)


@pytest.mark.slow
def test_a_run_that_is_killed_once_more_while_it_resumes_ends_in_the_same_bytes(
    harness: Harness, tmp_path: Path
) -> None:
    chooser = random.Random(0)
    total, count = len(harness.operations), harness.how_many(2, 12, 500)
    pairs = [(chooser.randint(1, total), chooser.randint(1, 40)) for _ in range(count)]
    second_kills = 0
    for index, (first, second) in enumerate(pairs):
        output = tmp_path / f"twice-{index}"
        assert harness.run(output, {"kill": first}) == -signal.SIGKILL
        second_kills += harness.run(output, {"kill": second}) == -signal.SIGKILL
        harness.finishes(output)
    harness.count(f"kill -9, and once more while resuming: {len(pairs)} pairs, {second_kills} second kills, lost: 0")
    assert second_kills > len(pairs) / 2 - 1


def watch_saves(harness: Harness, output: Path) -> dict[str, float]:
    """How many seconds each save of an undisturbed run is seen under way, by its folder's name."""
    begun: dict[str, float] = {}
    ended: dict[str, float] = {}
    pid = harness.begin(output)
    while "final" not in ended:
        under_way = {path.name.removeprefix(WRITING) for path in (output / "checkpoints").glob(f"{WRITING}*")}
        now = time.perf_counter()
        time.sleep(0.0002)
        for name in under_way:
            begun.setdefault(name, now)
        for name in begun.keys() - under_way:
            ended.setdefault(name, now)
    assert harness.runs.wait(pid) == 0
    return {name: ended[name] - begun[name] for name in begun}


def wait_for_save(output: Path, name: str) -> None:
    """Until the run in `output` begins to write `name`, or has written it unseen."""
    checkpoints = output / "checkpoints"
    while not any((checkpoints / folder).exists() for folder in (WRITING + name, name)):
        time.sleep(0.0002)


@pytest.mark.slow
def test_a_run_that_is_killed_at_a_random_instant_ends_in_the_same_bytes(harness: Harness, tmp_path: Path) -> None:
    """Saves take a tenth of such a run: one kill in four comes anywhere in it, the others during a save."""
    chooser = random.Random(1)
    kills, within, late = harness.how_many(3, 25, 1000), 0, 0
    watched = [watch_saves(harness, tmp_path / f"watched-{number}") for number in range(harness.how_many(1, 3, 3))]
    for index in range(kills):
        output = tmp_path / f"random-{index}"
        pid = harness.begin(output)
        if index % 4 == 0:
            time.sleep(chooser.random() * harness.seconds)
        else:
            name = chooser.choice(list(watched[0]))
            wait_for_save(output, name)
            time.sleep(chooser.random() * min(seconds[name] for seconds in watched))
        os.kill(pid, signal.SIGKILL)
        status = harness.runs.wait(pid)
        assert status in (-signal.SIGKILL, 0)
        late += status == 0
        within += is_within_a_save(output)
        harness.finishes(output)
    harness.count(f"kill -9 at a random instant: {kills}, {within} within a save, {late} after the end, lost: 0")
    assert harness.is_small or within >= 0.3 * kills
    assert harness.is_small or late < kills / 2
