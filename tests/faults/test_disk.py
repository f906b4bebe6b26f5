"""A disk that is full or broken: a message, a status, the last checkpoint intact, and no growing leftovers."""

import errno
import shutil
from pathlib import Path

import pytest

from minilora.runs.checkpoint import list_checkpoints
from minilora.system.locks import LOCK
from minilora.system.manifest import verify_folder
from tests.faults.conftest import Harness, printed_by

CAN_FAIL = ("open", "write", "fsync", "mkdir", "rename", "replace")


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
def test_every_write_may_fail(harness: Harness, tmp_path: Path, code: int, for_good: bool) -> None:
    writing = [operation for operation in harness.operations if operation["name"] in CAN_FAIL]
    chosen, refused = writing[:: harness.how_many(29, 1, 1)], 0
    for operation in chosen:
        output = tmp_path / f"fail-{operation['number']}"
        status = harness.run(output, {"fail": operation["number"], "errno": code, "for_good": for_good})
        printed, errors = printed_by(output)
        assert "Traceback" not in errors
        if status != 0:
            refused += 1
            assert status == 2
            assert str(output) in errors
            assert "No space left on device" in errors or "Input/output error" in errors
            kept = list_checkpoints(output / "checkpoints") if output.is_dir() else []
            assert all(verify_folder(path) is None for path in kept)
            if "trainable parameters" in printed:  # the run had begun
                assert "bytes are free there" in errors
                assert f"the newest checkpoint: {kept[-1] if kept else 'none'}" in errors
            if operation["name"] == "write" and operation["path"] != LOCK:  # the lock holds without its holder's name
                assert "bytes were to be written" in errors
        else:
            assert "final adapter" in printed
            shutil.rmtree(output / "checkpoints" / "final")  # or the same command has nothing to do
        harness.finishes(output)
    how = "for good" if for_good else "once"
    harness.count(f"{errno.errorcode[code]} {how} at {len(chosen)} operations: {refused} runs refused, lost: 0")
    assert refused > 0.9 * len(chosen) - 1


@pytest.mark.slow
def test_repeating_the_command_on_a_full_disk_leaves_nothing_more_behind(harness: Harness, tmp_path: Path) -> None:
    output = tmp_path / "run"
    first = next(one["number"] for one in harness.operations if one["path"].endswith("optimizer.safetensors"))
    sizes = []
    for _ in range(harness.how_many(3, 10, 10)):
        assert harness.run(output, {"fail": first, "errno": errno.ENOSPC, "for_good": True}) == 2
        sizes.append(sum(1 for _ in output.rglob("*")))
    assert len(set(sizes)) == 1
    message = Path(f"{output}.err").read_text("utf-8")
    assert "bytes were to be written" in message
    assert "bytes are free there" in message
    assert "the newest checkpoint: none" in message
