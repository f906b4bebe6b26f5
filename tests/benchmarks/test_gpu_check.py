"""gpu_check.py: a wrong operation fails, a stage that crashes or hangs loses nothing, the exit status tells."""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from minilora.qlora import ops

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu_check.py"


def run_check(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The scripts' modules, which are imported from their own folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_check
    import gpu_kernels
    import gpu_stage

    return {"check": gpu_check, "kernels": gpu_kernels, "stage": gpu_stage}


@pytest.fixture
def options(modules: dict[str, ModuleType], tmp_path: Path) -> Any:
    return modules["stage"].Options("kernels", "cpu", True, output_dir=str(tmp_path), work_dir=str(tmp_path))


def test_one_stage_runs_on_a_cpu_and_ends_in_a_table(tmp_path: Path) -> None:
    done = run_check("--device", "cpu", "--small", "--stage", "environment", "--output_dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    findings = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text("utf-8").splitlines()]
    assert {row["stage"] for row in findings} == {"environment"}
    assert findings[-1]["passed"] is True
    assert sum(line.startswith("| environment |") for line in done.stdout.splitlines()) == len(findings)
    assert "not measured on a cpu" in done.stdout
    # What a figure was measured with stays what it was.
    again = run_check("--device", "cpu", "--small", "--stage", "environment", "--output_dir", str(tmp_path))
    assert again.returncode == 2
    assert "--output_dir" in again.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("arguments", [[], ["--device", "cpu"]], ids=["no GPU", "real sizes"])
def test_what_cannot_be_checked_here_is_a_users_mistake(arguments: list[str], tmp_path: Path) -> None:
    done = run_check(*arguments, "--output_dir", str(tmp_path))
    assert done.returncode == 2
    assert "--device cpu --small" in done.stderr


def test_a_wrong_operation_fails_its_check(
    modules: dict[str, ModuleType], options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ops.rms_norm
    names = {}
    for name, function in (("right", right), ("wrong", lambda x, w, eps: right(x, w, eps) * 1.03)):
        monkeypatch.setattr(ops, "rms_norm", function)
        findings = modules["stage"].Findings(options)
        modules["kernels"].check_operation(modules["kernels"].elementwise_operations()[0], "cpu", findings)
        names[name] = modules["stage"].read_findings(Path(options.output_dir))[-1]
    assert [names["right"]["passed"], names["wrong"]["passed"]] == [True, False]
    assert len(modules["check"].failed_checks(names.values())) == 1
    report = modules["check"].format_report(list(names.values()), options)
    assert report.splitlines()[-1].startswith("FAILED kernels: RMSNorm")


def test_nan_is_larger_than_every_limit(modules: dict[str, ModuleType], options: Any) -> None:
    findings, limits = modules["stage"].Findings(options), {torch.float32: 1.0}
    modules["kernels"].report_errors("attention", {"float32": {"y": float("nan"), "d0": 0.5}}, limits, findings)
    (row,) = modules["stage"].read_findings(Path(options.output_dir))
    assert row["passed"] is False
    assert row["values"] == {"float32": "nan"}


def test_an_exception_is_a_failed_check_and_the_stage_continues(modules: dict[str, ModuleType], options: Any) -> None:
    findings = modules["stage"].Findings(options)
    with findings.attempt("first"):
        raise RuntimeError("CUDA error: no kernel image is available")
    findings.check("second", True)
    first, second = modules["stage"].read_findings(Path(options.output_dir))
    assert first["passed"] is False
    assert "no kernel image" in first["values"]["error"]
    assert second["passed"] is True


def test_a_wait_is_counted_and_the_modes_own_notice_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words are those of PyTorch 2.13."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_state

    notice = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for text in (notice, "called a synchronizing CUDA operation (Triggered internally at x.cpp:1.)"):
            warnings.warn(text, stacklevel=1)
    assert list(gpu_state.count_waits(caught).values()) == [1]
    assert next(iter(gpu_state.count_waits(caught))).startswith("test_gpu_check.py:")


@pytest.mark.parametrize(
    ("code", "limit_s", "expected"),
    [
        ("print('done')", 30, ""),
        ("import os; os.abort()", 30, "SIGABRT"),
        ("raise SystemExit(3)", 30, "status 3"),
        ("import time; time.sleep(60)", 1, "did not end within 1 s"),
    ],
)
def test_how_a_stage_ended_is_known(
    code: str, limit_s: float, expected: str, modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    ended = modules["check"].run_process([sys.executable, "-c", code], limit_s, tmp_path / "log")
    assert expected in ended
    assert bool(ended) == bool(expected)


def test_a_stage_ends_on_windows_too(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "killpg", raising=False)
    ended = modules["check"].run_process([sys.executable, "-c", "import time; time.sleep(60)"], 1, tmp_path / "log")
    assert "did not end within 1 s" in ended


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs /proc")
def test_what_a_stage_started_ends_with_it(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    """A training process that is left behind would hold the GPU's memory."""
    code = "import subprocess; child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); child.wait()"
    modules["check"].run_process([sys.executable, "-c", code], 2, tmp_path / "log")
    stat = Path(f"/proc/{int((tmp_path / 'log').read_text())}/stat")
    deadline = time.monotonic() + 10
    while stat.is_file() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stage_that_crashes_leaves_the_findings_of_the_others(
    modules: dict[str, ModuleType], options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = iter(["ended by SIGSEGV", ""])

    def run_process(command: list[str], limit_s: float, log: Path) -> str:
        log.write_text("Fatal Python error: Segmentation fault\n")
        return next(ends)

    monkeypatch.setattr(modules["check"], "run_process", run_process)
    modules["check"].run_stages(["kernels", "state"], options)
    kernels, state = modules["stage"].read_findings(Path(options.output_dir))
    assert (kernels["stage"], kernels["passed"], kernels["values"]["error"]) == ("kernels", False, "ended by SIGSEGV")
    assert "Segmentation fault" in kernels["detail"][-1]
    assert (state["stage"], state["passed"]) == ("state", True)


def test_no_stage_is_started_without_time(
    modules: dict[str, ModuleType], options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules["check"], "BUDGET_S", 5)
    modules["check"].run_stages(["state"], options)
    (row,) = modules["stage"].read_findings(Path(options.output_dir))
    assert row["passed"] is False
    assert "no time was left" in row["values"]["error"]


def test_the_attention_mask_is_that_of_each_example_by_itself(modules: dict[str, ModuleType]) -> None:
    """Two examples behind a prefix of two: 0 1 | 2 3 | 4, and padding."""
    example = modules["stage"].Example
    examples = [example([7, 8, 1, 2, 3], [False] * 4 + [True]), example([7, 8, 4, 5], [False] * 3 + [True])]
    seen = ~modules["kernels"].dense_mask(examples, 6)
    assert [row.nonzero().flatten().tolist() for row in seen[:5]] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4]]
