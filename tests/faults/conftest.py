"""What the fault tests share: the runner, one configuration, what an undisturbed run ends in, and the counts."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from minilora.runs.checkpoint import list_checkpoints
from minilora.system.manifest import recover_folders, verify_folder
from tests.faults.runner import Runs
from tests.runs.conftest import lasting

Count = Callable[[str], None]
Finishes = Callable[[Path], None]
HowMany = Callable[[int, int, int], int]
LINES = pytest.StashKey[list[str]]()

# Kills, forks and signals are those of POSIX; elsewhere what needs none of them still runs.
OF_POSIX = ("damage", "disk", "kill", "power", "ranks", "resume", "signals")
collect_ignore = [f"test_{name}.py" for name in OF_POSIX if os.name != "posix"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def is_small(pytestconfig: pytest.Config) -> bool:
    """Whether the counts are too small for statements about their statistics."""
    return not (pytestconfig.getoption("--faults") or pytestconfig.getoption("--long"))


@pytest.fixture(scope="session")
def how_many(pytestconfig: pytest.Config, is_small: bool) -> HowMany:
    """A function: the count with every pytest, with --faults, with --long -> the one that is asked for."""

    def choose(small: int, normal: int, release: int) -> int:
        return small if is_small else release if pytestconfig.getoption("--long") else normal

    return choose


@pytest.fixture(scope="session")
def count(pytestconfig: pytest.Config) -> Count:
    """Notes a line for the end of the test session: what was tried, and what came of it."""
    lines = pytestconfig.stash.setdefault(LINES, [])
    return lines.append


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    lines = config.stash.get(LINES, [])
    if lines:
        terminalreporter.section("faults")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def runs() -> Iterator[Runs]:
    """Starts runs of scripts/train.py in processes of their own."""
    server = Runs()
    yield server
    server.close()


@pytest.fixture(scope="session")
def keys(tiny_checkpoint: Callable[..., Path], processed_data: Path) -> list[str]:
    """A run of six steps in three validations and three checkpoints, with dropout and accumulation."""
    return [
        f"model.name_or_path={tiny_checkpoint(layers=1)}",
        "model.quantization=none",
        "model.compute_dtype=float32",
        f"data.dir={processed_data}",
        "data.max_length=128",
        "lora.r=2",
        "lora.dropout=0.1",
        "train.max_steps=6",
        "train.per_device_train_batch_size=3",
        "train.gradient_accumulation_steps=2",
        "train.learning_rate=5e-3",
        "train.eval_steps=2",
        "train.save_steps=2",
        "train.save_total_limit=2",
        "train.do_predict=false",
    ]


@pytest.fixture(scope="session")
def operations(runs: Runs, keys: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All file operations of an undisturbed run."""
    folder = tmp_path_factory.mktemp("operations")
    assert runs.run(keys, folder / "logged", {"log": str(folder / "operations")}) == 0
    return [json.loads(line) for line in (folder / "operations").read_text("utf-8").splitlines()]


def outcome(output: Path) -> dict[str, Any]:
    """All that two equal runs have in common: adapter, moments, log without what is measured."""
    checkpoints = output / "checkpoints"
    files = {
        f"{folder}/{name}": (checkpoints / folder / name).read_bytes()
        for folder, name in (
            ("final", "adapter_model.safetensors"),
            ("final", "adapter_config.json"),
            ("step-000006", "adapter_model.safetensors"),
            ("step-000006", "optimizer.safetensors"),
        )
    }
    return {**files, "log": lasting(output)}


@pytest.fixture(scope="session")
def undisturbed(runs: Runs, keys: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run ends in when nothing happens to it; "seconds" says how long it took from its first file on."""
    folder = tmp_path_factory.mktemp("undisturbed")
    seconds = []
    for name in ("first", "second", "third"):
        pid = runs.start(keys, folder / name)
        while not (folder / name).exists():
            time.sleep(0.001)
        started = time.perf_counter()
        assert runs.wait(pid) == 0, (folder / f"{name}.err").read_text("utf-8")
        seconds.append(time.perf_counter() - started)
    assert outcome(folder / "first") == outcome(folder / "second")
    best = json.loads((folder / "third" / "checkpoints" / "final" / "metrics.json").read_text("utf-8"))["step"]
    return {"outcome": outcome(folder / "third"), "seconds": min(seconds), "best": f"step-{best:06d}"}


@pytest.fixture
def finishes(runs: Runs, keys: list[str], undisturbed: dict[str, Any]) -> Finishes:
    """Repeats the command and asserts that it ends as if nothing had happened; removes the folder."""

    def check(output: Path) -> None:
        checkpoints = output / "checkpoints"
        is_finished = (checkpoints / "final").is_dir()
        recover_folders(checkpoints)
        newest = next((path for path in reversed(list_checkpoints(checkpoints)) if verify_folder(path) is None), None)
        status = runs.run(keys, output)
        printed, errors = printed_by(output)
        assert status == 0, errors
        if is_finished:
            assert "this run is finished" in printed
        else:  # it resumes from the newest sound checkpoint and does not begin anew
            assert ("resuming from" in printed) == (newest is not None)
            assert f"resuming from {newest}\n" in printed or newest is None
        assert outcome(output) == undisturbed["outcome"]
        left = {path.name for path in checkpoints.iterdir()}
        assert {"final", "step-000006", undisturbed["best"]} <= left
        assert len(left) <= 4  # final, the best, and two: a signal may have saved another step than the fourth
        assert all(verify_folder(checkpoints / name) is None for name in left)
        shutil.rmtree(output)

    return check


@dataclass(frozen=True)
class Harness:
    """What breaks runs of `keys` and counts what came of it: the fixtures above, for tests that need most of them."""

    runs: Runs
    keys: list[str]
    operations: list[dict[str, Any]]
    seconds: float  # that an undisturbed run takes
    finishes: Finishes
    count: Count
    how_many: HowMany
    is_small: bool

    def run(self, output: Path, fault: dict[str, Any] | None = None) -> int:
        """The exit status of a run in `output`."""
        return self.runs.run(self.keys, output, fault)

    def begin(self, output: Path) -> int:
        """The process id of a run that has made its folder `output`."""
        pid = self.runs.start(self.keys, output)
        while not output.exists():
            time.sleep(0.001)
        return pid


@pytest.fixture
def harness(
    runs: Runs,
    keys: list[str],
    operations: list[dict[str, Any]],
    undisturbed: dict[str, Any],
    finishes: Finishes,
    count: Count,
    how_many: HowMany,
    is_small: bool,
) -> Harness:
    return Harness(runs, keys, operations, undisturbed["seconds"], finishes, count, how_many, is_small)


def printed_by(output: Path) -> tuple[str, str]:
    """What a run in `output` has printed, and its errors."""
    out, errors = (Path(f"{output}{ending}").read_text("utf-8") for ending in (".out", ".err"))
    return out, errors
