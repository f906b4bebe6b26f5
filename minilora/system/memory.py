"""Measured memory: the peak of this process or GPU, whether an error says that it ran out, and a heap trim.

What a configuration will take is predicted in `planning/memory.py`.
"""

import contextlib
import re
import sys
from pathlib import Path

import torch

from minilora.system.process import call_glibc

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# fmt: off
OUT_OF_MEMORY = (
    "not enough memory", "can't allocate memory", "std::bad_alloc", "could not create a primitive",  # on a CPU
    "Cannot allocate memory",  # a file that is mapped
    "CUDA error: out of memory", "_STATUS_ALLOC_FAILED",  # pinned memory, bitsandbytes, cuBLAS, cuDNN
    "CUDA driver error: out of memory", "'out of memory'",  # segments that grow, NCCL
)
# fmt: on


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is PyTorch's or Python's way to say that memory ran out; PyTorch has no one type for it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory used so far: allocated on a GPU, resident for this process on a CPU; None where unknown.

    `reset_peak_memory` begins anew.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if STATUS.is_file():  # Linux, whose getrusage tells a child the peak of the process that started it
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", STATUS.read_text("utf-8"))[0])
    if sys.platform != "darwin":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak_memory(device: torch.device) -> None:
    """Makes the peaks what is used now; that of a process only on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.is_file():
        with contextlib.suppress(OSError):  # a kernel without it
            CLEAR_REFS.write_text("5", "ascii")


def reserved_memory_bytes(device: torch.device) -> int | None:
    """The most that PyTorch has held of a GPU, with holes: what a card must have beside CUDA's context. Else None."""
    return int(torch.cuda.max_memory_reserved(device)) if device.type == "cuda" else None


def trim_heap() -> None:
    """Returns what was freed to the system, holes between live buffers too; does nothing without glibc.

    glibc keeps freed buffers, and small tensors that settle between them keep it from returning them later. For the
    loops that free a large buffer for each weight: one call takes a fraction of a millisecond and has no effect on
    what is allocated later.
    """
    call_glibc("malloc_trim", 0)
