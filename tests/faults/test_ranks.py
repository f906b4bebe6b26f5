"""Two ranks of one run: whichever is killed or signalled, and whenever, both end, and the same command resumes."""

import contextlib
import errno
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from minilora.runs.checkpoint import list_checkpoints
from minilora.runs.metrics_log import read_metrics
from minilora.system.manifest import recover_folders, verify_folder
from tests.faults.conftest import Count, Finishes, HowMany, outcome
from tests.faults.runner import SCRIPTS, Runs

HANGING_S = 60  # ranks that have not ended by then never will: it takes 3 s


@pytest.fixture(scope="module")
def rank_keys(keys: list[str]) -> list[str]:
    """The run of `keys` for two ranks: 3 examples each in a step."""
    return [*keys, "train.gradient_accumulation_steps=1"]


def wait(runs: Runs, pids: list[int]) -> list[int]:
    """The ranks' statuses; those that hang are killed."""

    def end() -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    watchdog = threading.Timer(HANGING_S, end)
    watchdog.start()
    try:
        return [runs.wait(pid) for pid in pids]
    finally:
        watchdog.cancel()


def errors_of(output: Path) -> list[str]:
    """What each rank wrote to standard error."""
    return [Path(f"{output}{ending}").read_text("utf-8") for ending in (".err", ".1.err")]


@pytest.fixture(scope="module")
def whole(runs: Runs, rank_keys: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks end in when nothing happens to them, and how long that takes from the first file on."""
    folder, seconds = tmp_path_factory.mktemp("whole"), []
    for name in ("first", "second"):
        pids = runs.start_ranks(2, rank_keys, folder / name)
        while not (folder / name).exists():
            time.sleep(0.001)
        started = time.perf_counter()
        assert wait(runs, pids) == [0, 0], errors_of(folder / name)
        seconds.append(time.perf_counter() - started)
    assert outcome(folder / "first") == outcome(folder / "second")
    return {"outcome": outcome(folder / "first"), "seconds": min(seconds)}


@pytest.fixture
def finishes(runs: Runs, rank_keys: list[str], whole: dict[str, Any]) -> Finishes:
    """Holds that nothing in a run's folder is torn, and that the same command ends as if nothing had happened."""

    def check(output: Path) -> None:
        checkpoints = output / "checkpoints"
        recover_folders(checkpoints)
        kept = list_checkpoints(checkpoints)
        assert all(verify_folder(path) is None for path in kept)
        is_finished = (checkpoints / "final").is_dir()
        assert wait(runs, runs.start_ranks(2, rank_keys, output)) == [0, 0], errors_of(output)
        printed = Path(f"{output}.out").read_text("utf-8")
        if not is_finished:
            assert (f"resuming from {kept[-1]}\n" in printed) if kept else "resuming" not in printed
        assert outcome(output) == whole["outcome"]
        shutil.rmtree(output)

    return check


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_other_and_the_run_resumes_to_the_same_bytes(
    runs: Runs,
    rank_keys: list[str],
    whole: dict[str, Any],
    finishes: Finishes,
    tmp_path: Path,
    count: Count,
    how_many: HowMany,
    is_small: bool,
) -> None:
    chooser = random.Random(3)
    kills, late, saved = how_many(2, 10, 200), 0, 0
    for index in range(kills):
        output, victim = tmp_path / f"kill-{index}", index % 2
        pids = runs.start_ranks(2, rank_keys, output)
        while not output.exists():
            time.sleep(0.001)
        time.sleep(chooser.random() * whole["seconds"])
        os.kill(pids[victim], signal.SIGKILL)
        statuses, errors = wait(runs, pids), errors_of(output)
        assert statuses[victim] in (-signal.SIGKILL, 0)
        assert statuses[1 - victim] in (2, 0), errors
        if statuses[1 - victim] == 2:
            assert "another rank is gone or does not answer (" in errors[1 - victim]
            assert "Traceback" not in errors[1 - victim]
        saved += " is saved; another rank is gone" in errors[0]
        late += statuses == [0, 0]
        finishes(output)
    count(f"kill -9 of one of two ranks: {kills}, {saved} saved by the first, {late} after the end, lost: 0")
    assert is_small or late < kills / 2


@pytest.mark.slow
def test_a_signal_at_a_random_instant_ends_all_ranks_and_loses_nothing(
    runs: Runs,
    rank_keys: list[str],
    whole: dict[str, Any],
    finishes: Finishes,
    tmp_path: Path,
    count: Count,
    how_many: HowMany,
    is_small: bool,
) -> None:
    chooser = random.Random(4)
    signals, late, saved = how_many(2, 9, 200), 0, 0
    for index in range(signals):
        output, whom = tmp_path / f"signal-{index}", ((0, 1), (0,), (1,))[index % 3]
        signum = (signal.SIGTERM, signal.SIGINT)[index % 2]
        pids = runs.start_ranks(2, rank_keys, output)
        while not output.exists():
            time.sleep(0.001)
        time.sleep(chooser.random() * whole["seconds"])
        for rank in whom:
            os.kill(pids[rank], signum)
        statuses, errors = wait(runs, pids), errors_of(output)
        # A rank that got none, or got it while it waited for one that had gone by then, says that it lost the other.
        assert set(statuses) <= {128 + signum, 2, 0}, errors
        assert "Traceback" not in "".join(errors)
        assert set(statuses) == {0} or f"stopped by {signum.name}" in "".join(errors)
        saved += "the same command resumes there" in errors[0]
        late += statuses == [0, 0]
        finishes(output)
    count(f"SIGTERM, SIGINT to two ranks or one of them: {signals}, {saved} saved, {late} late, lost: 0")
    assert is_small or late < signals / 2


def start_long_run(runs: Runs, rank_keys: list[str], output: Path) -> list[int]:
    """Two ranks that are within their loop, and will be for minutes."""
    keys = [*rank_keys, "train.max_steps=5000", "train.eval_steps=9999", "train.save_steps=9999"]
    pids = runs.start_ranks(2, keys, output)
    while not (output / "metrics.jsonl").exists() or not (output / "metrics.jsonl").read_bytes():
        time.sleep(0.001)
    return pids


@pytest.mark.parametrize("victim", [0, 1])
def test_within_the_loop_the_first_rank_saves_what_is_done_when_another_is_killed(
    runs: Runs, rank_keys: list[str], tmp_path: Path, victim: int
) -> None:
    output = tmp_path / "run"
    pids = start_long_run(runs, rank_keys, output)
    os.kill(pids[victim], signal.SIGKILL)
    assert wait(runs, pids)[1 - victim] == 2
    message = errors_of(output)[1 - victim].splitlines()[-1]
    kept = [int(path.name[5:]) for path in list_checkpoints(output / "checkpoints")]
    assert len(kept) == victim
    begin = f"error: step {kept[0]} is saved; another" if victim else f"error: rank 1 on {platform.node()}: another"
    assert message.startswith(f"{begin} rank is gone or does not answer (")
    assert message.endswith("run the same command again")


@pytest.mark.parametrize("whom", [(0, 1), (0,), (1,)], ids=["both", "the first", "the other"])
def test_within_the_loop_a_signal_to_any_rank_stops_all_at_the_same_step(
    runs: Runs, rank_keys: list[str], tmp_path: Path, whom: tuple[int, ...]
) -> None:
    output = tmp_path / "run"
    pids = start_long_run(runs, rank_keys, output)
    # One rank is stopped, so that the other waits for it in the middle of an exchange when its signal comes.
    os.kill(pids[0], signal.SIGSTOP)
    time.sleep(0.2)
    for rank in whom:
        os.kill(pids[rank], signal.SIGTERM)
    os.kill(pids[0], signal.SIGCONT)
    assert wait(runs, pids) == [143, 143]
    (saved,) = list_checkpoints(output / "checkpoints")
    first, second = errors_of(output)
    assert f"\nstopped by SIGTERM: saved step {int(saved.name[5:])}; the same command resumes there\n" in first
    assert second == ""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_without_memory_ends_both_and_the_first_saves_what_was_done(
    runs: Runs, rank_keys: list[str], tmp_path: Path, victim: int
) -> None:
    output, keys = tmp_path / "run", [*rank_keys, "train.eval_steps=99", "train.save_steps=99"]
    assert wait(runs, runs.start_ranks(2, keys, output, {victim: {"no_memory": 3}})) == [2, 2]
    assert [path.name for path in list_checkpoints(output / "checkpoints")] == ["step-000002"]
    errors = errors_of(output)
    assert "after step 2: memory ran out in training (MemoryError); to resume from " in errors[victim]
    assert "memory ran out" not in errors[1 - victim]
    assert "note: step 2 is saved" in errors[0]


@pytest.mark.slow
def test_a_full_disk_of_the_first_rank_ends_both_with_one_message(
    runs: Runs, rank_keys: list[str], finishes: Finishes, tmp_path: Path, how_many: HowMany
) -> None:
    logged = {0: {"log": str(tmp_path / "log")}}
    assert wait(runs, runs.start_ranks(2, rank_keys, tmp_path / "logged", logged)) == [0, 0]
    operations = len((tmp_path / "log").read_text("utf-8").splitlines())
    for number in range(3, operations, operations // how_many(1, 5, 5)):
        output = tmp_path / f"full-{number}"
        fault = {"fail": number, "errno": errno.ENOSPC, "for_good": True}
        statuses = wait(runs, runs.start_ranks(2, rank_keys, output, {0: fault}))
        first, second = errors_of(output)
        if statuses != [0, 0]:  # what is left behind or drawn at the end is no reason to fail
            assert statuses == [2, 2], first
            assert "No space left on device" in first
            assert second == ""
        assert "Traceback" not in first
        finishes(output)


@pytest.mark.slow
def test_torchrun_restarts_the_ranks_after_one_was_killed(
    runs: Runs, rank_keys: list[str], tmp_path: Path, is_small: bool
) -> None:
    if is_small:
        pytest.skip("with --faults: torchrun starts its processes twice, ten seconds")
    keys = [*rank_keys, "train.max_steps=200", "train.eval_steps=50", "train.save_steps=40"]
    assert wait(runs, runs.start_ranks(2, keys, tmp_path / "whole")) == [0, 0]
    output = tmp_path / "run"
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    command = [sys.executable, *launch, str(SCRIPTS / "train.py"), *keys, f"train.output_dir={output}"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent), "OMP_NUM_THREADS": "1"}
    torchrun = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", env=environment
    )
    while not (output / "metrics.jsonl").exists() or not (output / "metrics.jsonl").read_bytes():
        assert torchrun.poll() is None, torchrun.communicate()
        time.sleep(0.001)
    ranks = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text("ascii").split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    printed, errors = torchrun.communicate(timeout=2 * HANGING_S)
    assert torchrun.returncode == 0, errors
    assert "resuming from" in printed
    assert "another rank is gone" in errors
    found, expected = (
        [(entry["step"], entry["train_loss"], entry.get("eval_loss")) for entry in read_metrics(folder)]
        for folder in (output, tmp_path / "whole")
    )
    assert found == expected
    name = Path("checkpoints/final/adapter_model.safetensors")
    assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
