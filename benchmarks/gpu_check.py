"""Does minilora compute what it should on this GPU, and how fast? One command of ten minutes, without network.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --stage kernels
    python benchmarks/gpu_check.py --device cpu --small        the same stages with tiny sizes, to see that they run

Weights and texts are random, and made here; the shapes are Qwen2.5's.

    environment   versions, the device, bitsandbytes' library, the floor of the products
    tests         pytest -m gpu
    kernels       every operation against float64 on the CPU, outputs and gradients (gpu_kernels.py)
    state         equal to the bit: gradients, checkpointing, offloading, optimizers; float16; waits (gpu_state.py)
    resume        scripts/train.py, SIGTERM, the same command again
    shapes        time and memory of 0.5B and 7B shapes, beside the memory estimate (gpu_speed.py)
    profile       launches of a step, the share of time in which the device works, the largest kernels
    compare       loss, gradients, speed and memory beside peft's, where peft is installed

Each stage is a process with a time limit, and each finding is a line of OUTPUT_DIR/gpu_check.jsonl, so a crash or a
hang in one stage loses nothing of the others. What a stage prints is in OUTPUT_DIR/STAGE.log. Ends with a Markdown
table for benchmarks/README.md and a list of what failed. Exit status: 0 if all checks pass, 1 if one does not, 2 for a
mistake in the command.
"""

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_stage import FILE, ROOT, Findings, Options, read_findings
from meter import environment

from minilora.errors import UserError
from minilora.system.cli import build_parser, run_script
from minilora.system.console import info
from minilora.system.process import tuned_process

BUDGET_S = 590  # of all stages together
LEAST_S = 10  # no stage is started for less
EXAMPLES = """\
examples:
  python benchmarks/gpu_check.py --output_dir findings
  python benchmarks/gpu_check.py --stage shapes
"""


@dataclass(frozen=True)
class Stage:
    """What runs in a process of its own, which alone imports it, and its time limit in seconds."""

    module: str
    function: str
    limit_s: float


STAGES = {
    "environment": Stage("gpu_speed", "check_environment", 60),
    "tests": Stage("gpu_state", "run_tests", 90),
    "kernels": Stage("gpu_kernels", "check_kernels", 90),
    "state": Stage("gpu_state", "check_state", 100),
    "resume": Stage("gpu_state", "check_resume", 100),
    "shapes": Stage("gpu_speed", "measure_shapes", 150),
    "profile": Stage("gpu_speed", "profile_steps", 60),
    "compare": Stage("gpu_speed", "compare_with_peft", 200),
}


def main() -> None:
    """Runs one stage as a child, or all of them and reports."""
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        options = Options.from_json(sys.argv[1])
        stage = STAGES[options.stage]
        with tuned_process():
            getattr(importlib.import_module(stage.module), stage.function)(options, Findings(options))
        return
    arguments = parse_arguments()
    folder = arguments.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / FILE).exists():
        raise UserError(f"--output_dir: {folder / FILE} holds the findings of an earlier check; name another folder")
    with tempfile.TemporaryDirectory() as work:
        options = Options("", arguments.device, arguments.small, output_dir=str(folder), work_dir=work)
        run_stages([arguments.stage] if arguments.stage else list(STAGES), options)
    findings = read_findings(folder)
    print(format_report(findings, options))
    if failed_checks(findings):
        sys.stdout.flush()
        raise SystemExit(1)


def parse_arguments() -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: a device that is not there, or real sizes on a CPU.
    """
    parser = build_parser(__doc__, EXAMPLES)
    folder = ROOT / "outputs" / f"gpu_check-{time.strftime('%Y%m%d-%H%M%S')}"
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what is checked")
    parser.add_argument("--small", action="store_true", help="tiny sizes: shows that all of it runs")
    parser.add_argument("--stage", choices=tuple(STAGES), help="only this one (default: all)")
    parser.add_argument("--output_dir", type=Path, default=folder, help="folder of the findings (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: cuda is not available here; use --device cpu --small")
    if arguments.device == "cpu" and not arguments.small:
        raise UserError("--device: a cpu would take hours for a 7B's shapes; use --device cpu --small")
    return arguments


# ---- Stages as processes


def run_stages(names: Sequence[str], options: Options) -> None:
    """Runs each stage within its limit and what is left of the budget; how it ended is a finding too."""
    end = time.perf_counter() + BUDGET_S
    for name in names:
        options = replace(options, stage=name)
        findings = Findings(options)
        limit_s = min(STAGES[name].limit_s, end - time.perf_counter())
        if limit_s < LEAST_S:
            findings.check("the stage ended", False, error=f"no time was left of {BUDGET_S} s")
            continue
        started = time.perf_counter()
        log = Path(options.output_dir) / f"{name}.log"
        ended = run_process([sys.executable, __file__, options.to_json()], limit_s, log)
        seconds = round(time.perf_counter() - started, 1)
        lines = log.read_text("utf-8", errors="replace").splitlines()
        detail = lines[-30:] if ended else None
        findings.check("the stage ended", not ended, detail, seconds=seconds, **({"error": ended} if ended else {}))
        own = [row for row in read_findings(Path(options.output_dir)) if row["stage"] == name]
        failed = len(failed_checks(own))
        info(f"{name}: {sum('passed' in row for row in own)} checks, {failed} failed, {seconds:.0f} s")


def run_process(command: Sequence[str], limit_s: float, log: Path) -> str:
    """Runs a command and all that it starts for `limit_s` seconds at most; its output goes to `log`.

    Returns:
        What went wrong, empty if nothing did.
    """
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if not torch.cuda.is_available():
        variables.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: a second thread costs more than it brings
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"did not end within {limit_s:.0f} s"
        finally:
            _kill_group(process)
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"ended with status {status}" if status else ""


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process and its children, on Windows only itself; none is left if it ended by itself."""
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


# ---- Report


def failed_checks(findings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that must hold and do not."""
    return [row for row in findings if row.get("passed") is False]


def format_report(findings: Sequence[dict[str, Any]], options: Options) -> str:
    """Markdown: the machine, a table of all findings, and what failed."""
    machine = environment()
    device = machine["gpu"] if options.is_gpu else machine["processor"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [f"**{device}**{', tiny sizes' if options.small else ''}; {versions}; {machine['commit']}", ""]
    lines += ["| stage | what | result | values |", "|---|---|---|---|"]
    for row in findings:
        lines.append(f"| {row['stage']} | {row['name']} | {_result(row)} | {_values(row)} |")
    checks, failed = sum("passed" in row for row in findings), failed_checks(findings)
    lines += ["", f"{checks} checks, {len(failed)} failed; {Path(options.output_dir) / FILE}"]
    lines += [f"FAILED {row['stage']}: {row['name']}: {_values(row)}" for row in failed]
    return "\n".join(lines)


def _result(row: dict[str, Any]) -> str:
    if "passed" in row:
        return "ok" if row["passed"] else "**failed**"
    return "skipped" if "skipped" in row else ""


def _values(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return str(row["skipped"])
    shown = (f"{name} {_number(value)}" for name, value in row.get("values", {}).items())
    return ", ".join(shown).replace("|", "/").replace("\n", " ")


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    run_script(main)
