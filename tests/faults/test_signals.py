"""SIGTERM and SIGINT wherever they come: saved, said, the right status; a second one within a save tears nothing."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from minilora.runs.checkpoint import list_checkpoints
from minilora.system.manifest import verify_folder
from tests.faults.conftest import Harness

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.mark.slow
def test_a_signal_at_a_random_instant_loses_nothing(harness: Harness, tmp_path: Path) -> None:
    chooser = random.Random(2)
    signals, slowest, saved, late = harness.how_many(4, 20, 1000), 0.0, 0, 0
    for index in range(signals):
        output = tmp_path / f"signal-{index}"
        signum = (signal.SIGTERM, signal.SIGINT)[index % 2]
        pid = harness.begin(output)
        time.sleep(chooser.random() * harness.seconds)
        sent = time.perf_counter()
        try:
            os.kill(pid, signum)
        finally:
            status = harness.runs.wait(pid)
        slowest = max(slowest, time.perf_counter() - sent)
        errors = Path(f"{output}.err").read_text("utf-8")
        assert status in (STATUS[signum], 0), errors
        assert "Traceback" not in errors
        if status:
            assert f"stopped by {signum.name}" in errors
            saved += "the same command resumes there" in errors
        late += status == 0
        harness.finishes(output)
    assert harness.is_small or late < signals / 2
    harness.count(
        f"SIGTERM, SIGINT at a random instant: {signals}, {saved} saved on the way, {late} late, lost: 0, "
        f"slowest {slowest:.2f} s"
    )
    assert harness.is_small or slowest < 5  # README: within a second or so


@pytest.mark.slow
def test_a_second_signal_within_a_save_tears_nothing(harness: Harness, tmp_path: Path) -> None:
    saving = [
        operation["number"]
        for operation in harness.operations
        if operation["path"].startswith(("checkpoints/.writing-step-000004", "checkpoints/step-000004"))
    ]
    assert len(saving) > 10
    chosen = saving[:: harness.how_many(7, 1, 1)]
    for number in chosen:
        output = tmp_path / f"twice-{number}"
        fault = {"signal": number, "signum": int(signal.SIGTERM), "twice": True}
        assert harness.run(output, fault) == 143
        assert "stopped at once" in Path(f"{output}.err").read_text("utf-8")
        kept = list_checkpoints(output / "checkpoints")
        assert kept
        assert all(verify_folder(path) is None for path in kept)
        harness.finishes(output)
    harness.count(f"a second SIGTERM at {len(chosen)} of {len(saving)} operations of a save: lost: 0")
