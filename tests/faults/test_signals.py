"""SIGTERM and SIGINT wherever they come: saved, said, the right status; a second one within a save tears nothing."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from minilora.runs.checkpoint import list_checkpoints
from minilora.system.manifest import verify_folder
from tests.faults.conftest import Count, Finishes, HowMany
from tests.faults.runner import Runs

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.mark.slow
def test_a_signal_at_a_random_instant_loses_nothing(
    runs: Runs,
    keys: list[str],
    finishes: Finishes,
    undisturbed: dict[str, Any],
    tmp_path: Path,
    count: Count,
    how_many: HowMany,
    is_small: bool,
) -> None:
    chooser = random.Random(2)
    signals, slowest, saved, late = how_many(4, 20, 1000), 0.0, 0, 0
    for index in range(signals):
        output = tmp_path / f"signal-{index}"
        signum = (signal.SIGTERM, signal.SIGINT)[index % 2]
        pid = runs.start(keys, output)
        while not output.exists():  # the program has begun
            time.sleep(0.001)
        time.sleep(chooser.random() * undisturbed["seconds"])
        sent = time.perf_counter()
        try:
            os.kill(pid, signum)
        finally:
            status = runs.wait(pid)
        slowest = max(slowest, time.perf_counter() - sent)
        errors = Path(f"{output}.err").read_text("utf-8")
        assert status in (STATUS[signum], 0), errors
        assert "Traceback" not in errors
        if status:
            assert f"stopped by {signum.name}" in errors
            saved += "the same command resumes there" in errors
        late += status == 0
        finishes(output)
    assert is_small or late < signals / 2
    count(
        f"SIGTERM, SIGINT at a random instant: {signals}, {saved} saved on the way, {late} late, lost: 0, "
        f"slowest {slowest:.2f} s"
    )
    assert is_small or slowest < 5  # README: within a second or so


@pytest.mark.slow
def test_a_second_signal_within_a_save_tears_nothing(
    runs: Runs,
    keys: list[str],
    operations: list[dict[str, Any]],
    finishes: Finishes,
    tmp_path: Path,
    count: Count,
    how_many: HowMany,
) -> None:
    saving = [
        operation["number"]
        for operation in operations
        if operation["path"].startswith(("checkpoints/.writing-step-000004", "checkpoints/step-000004"))
    ]
    assert len(saving) > 10
    chosen = saving[:: how_many(7, 1, 1)]
    for number in chosen:
        output = tmp_path / f"twice-{number}"
        fault = {"signal": number, "signum": int(signal.SIGTERM), "twice": True}
        assert runs.run(keys, output, fault) == 143
        assert "stopped at once" in Path(f"{output}.err").read_text("utf-8")
        kept = list_checkpoints(output / "checkpoints")
        assert kept
        assert all(verify_folder(path) is None for path in kept)
        finishes(output)
    count(f"a second SIGTERM at {len(chosen)} of {len(saving)} operations of a save: lost: 0")
