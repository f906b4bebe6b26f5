"""A disk that is full or broken: a message, a status, the last checkpoint intact, and no heap of leftovers."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from minilora.runs.checkpoint import damage_of, list_checkpoints
from minilora.system.files import LOCK
from tests.faults.runner import Runs
from tests.faults.test_kill import operations_of_a_run

CAN_FAIL = ("open", "write", "fsync", "mkdir", "rename", "replace")


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
def test_every_write_may_fail(
    runs: Runs,
    keys: list[str],
    finishes: Callable[[Path], None],
    tmp_path: Path,
    count: Callable[[str], None],
    code: int,
    for_good: bool,
) -> None:
    operations = [row for row in operations_of_a_run(runs, keys, tmp_path) if row["name"] in CAN_FAIL]
    refused = 0
    for row in operations:
        output = tmp_path / f"fail-{row['number']}"
        status = runs.run(keys, output, {"fail": row["number"], "errno": code, "for_good": for_good})
        printed, errors = (Path(f"{output}{ending}").read_text("utf-8") for ending in (".out", ".err"))
        assert "Traceback" not in errors
        if status != 0:
            refused += 1
            assert status == 2
            assert str(output) in errors
            assert "No space left on device" in errors or "Input/output error" in errors
            kept = list_checkpoints(output / "checkpoints") if output.is_dir() else []
            assert all(damage_of(path) is None for path in kept)
            if "adapter parameters" in printed:  # the run had begun
                assert "bytes are free there" in errors
                assert f"the newest checkpoint: {kept[-1] if kept else 'none'}" in errors
            if row["name"] == "write" and row["path"] != LOCK:  # the lock holds without its holder's name
                assert "bytes were to be written" in errors
        else:
            assert "final adapter" in printed
            shutil.rmtree(output / "checkpoints" / "final")  # or the same command has nothing to do
        finishes(output)
    how = "for good" if for_good else "once"
    count(f"{errno.errorcode[code]} {how} at each of {len(operations)} operations: {refused} runs refused, lost: 0")
    assert refused > 0.9 * len(operations)


@pytest.mark.slow
def test_trying_again_on_a_full_disk_leaves_no_heap_behind(runs: Runs, keys: list[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    first = next(
        row["number"]
        for row in operations_of_a_run(runs, keys, tmp_path)
        if row["path"].endswith("optimizer.safetensors")
    )
    sizes = []
    for _ in range(10):
        assert runs.run(keys, output, {"fail": first, "errno": errno.ENOSPC, "for_good": True}) == 2
        sizes.append(sum(1 for _ in output.rglob("*")))
    assert len(set(sizes)) == 1
    message = Path(f"{output}.err").read_text("utf-8")
    assert "bytes were to be written" in message
    assert "bytes are free there" in message
    assert "what is saved is intact; the newest checkpoint: none" in message
