"""Time and memory of one process, and what machine it ran on."""

import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from minilora.system.memory import peak_memory_bytes

_CLEAR = Path("/proc/self/clear_refs")
PACKAGES = ("torch", "bitsandbytes", "transformers", "peft", "trl", "tokenizers", "safetensors", "numpy")


class Meter:
    """Collects what a contestant reports of itself; `results` is plain JSON."""

    def __init__(self, device: str):
        self._device = torch.device(device)
        self._started = time.perf_counter()
        self.results: dict[str, Any] = {"steps": []}

    def loaded(self) -> None:
        """Ends the loading phase: the peak counts anew from here, where the system can do that."""
        self._wait()
        self.results["load_s"] = time.perf_counter() - self._started
        self.results["load_peak_bytes"] = peak_memory_bytes(self._device)
        self.results["peaks_are_separate"] = reset_peak(self._device)

    @contextmanager
    def step(self, real_tokens: int, computed_tokens: int) -> Iterator[dict[str, float]]:
        """Times a step; the contestant puts its `loss` into the dict that it is given."""
        row: dict[str, float] = {"real_tokens": real_tokens, "computed_tokens": computed_tokens}
        self._wait()
        started = time.perf_counter()
        yield row
        self._wait()
        row["seconds"] = time.perf_counter() - started
        self.results.setdefault("first_step_s", time.perf_counter() - self._started)
        self.results["steps"].append(row)

    def finish(self) -> None:
        """Ends the training phase."""
        self.results["train_peak_bytes"] = peak_memory_bytes(self._device)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def reset_peak(device: torch.device) -> bool:
    """Lets the peak begin again at what is in use now; False where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR.write_text("5")  # proc(5): resets VmHWM to VmRSS
    except OSError:
        return False
    return True


def environment() -> dict[str, Any]:
    """Versions, processor and commit: what a figure is worth nothing without."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), **_versions()},
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    model = fields.get("model name", "")
    if "cpu family" in fields:  # a virtual machine's name says no more than AMD EPYC
        model += f" family {fields['cpu family']} model {fields.get('model')}"
    native = [name for name in ("avx512_bf16", "amx_bf16") if any(name in line for line in lines)]
    return " ".join([model or platform.processor() or platform.machine(), *native])


def _commit() -> str | None:
    folder = Path(__file__).parent
    try:
        shown = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return shown.stdout.strip()
