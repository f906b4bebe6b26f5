"""What a script sets for its whole process, and why. No library function does: an importing program keeps its settings.

    oneDNN, PyTorch   64 compiled matrix products in place of 1,024. Each shape of a product is compiled once and
                      cached, 0.4 MB each. A micro-batch needs some fifty, the next one, of another length, fifty
                      others. By default they take 20 MB more with each new length, and scattered through the heap they
                      keep freed activations from being reused: 0.5 GB after a dozen lengths. Recompiling costs 1 %.
    glibc's malloc    buffers of up to 32 MB come from the heap and up to 64 MB of it stay: a step needs the same
                      buffers in every layer, and a page that comes from the system costs as much as the values on it.
                      One arena, so that any thread reuses what another one has freed.
    bitsandbytes      imported without PyTorch's compiler (`compiler_left_out`). It decorates functions that nothing
                      here calls with `torch.compile`, and PyTorch marks its kernels as not to be compiled; either
                      imports the whole compiler, 185 MB and five seconds. Meanwhile `torch.compile` does nothing.

    CUDA              cuBLAS with the workspaces that make its sums repeatable, and an allocator whose segments grow:
                      micro-batches differ in size, and fixed segments keep holes between them. Not under Windows' WSL
                      and on a Jetson: drivers there refuse the calls, and the first tensor is "out of memory" or an
                      "unknown error" (pytorch issue 192330, unsloth issue 2401).
    NCCL              does not abort this process where a rank is lost: `distributed.py` notices and ends the run, with
                      its checkpoint and a message.

Left out: `GOMP_SPINCOUNT=10000`, by which OpenMP's threads sleep soon. It gains 15 % beside a busy core on one machine,
and costs a third of the speed on another that does nothing else.

Without these settings everything computes the same and takes more memory. Beside them `kernels_left_out`, which any
program gets for the time of one import.
"""

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

COMPILED_PRODUCTS = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")  # read at the first product
VARIABLES = dict.fromkeys(COMPILED_PRODUCTS, "64") | {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
}
GROWING_SEGMENTS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
FIXED_SEGMENTS = ("microsoft", "tegra")  # in the names of kernels of WSL and of a Jetson
LARGEST_IN_HEAP = 32 << 20  # bytes; glibc returns a larger buffer to the system as soon as it is freed
KEPT_IN_HEAP = 64 << 20  # bytes
GLIBC_DEFAULT = 128 << 10  # bytes, of both; by default there are 8 arenas per core
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # malloc.h

_is_tuned = False


def is_tuned() -> bool:
    """Whether a script has chosen these settings."""
    return _is_tuned


@contextmanager
def tuned_process() -> Iterator[None]:
    """The settings above, while the block runs: `with tuned_process(): run_script(main)`.

    A variable that the user has set stays. Afterwards the variables are as they were and malloc's thresholds at glibc's
    defaults. Two things stay, because glibc has no way back: the one arena, where several threads have allocated by
    then, and that the threshold for large buffers no longer adapts. Without glibc (macOS, Windows, musl) malloc stays
    as it is.
    """
    global _is_tuned
    variables = VARIABLES | (GROWING_SEGMENTS if _takes_growing_segments() else {})
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    _set_malloc(LARGEST_IN_HEAP, KEPT_IN_HEAP, arenas=1)
    _is_tuned = True
    try:
        yield
    finally:
        _is_tuned = False
        _set_malloc(GLIBC_DEFAULT, GLIBC_DEFAULT, arenas=8 * (os.cpu_count() or 1))
        for name in added:
            os.environ.pop(name, None)


def _takes_growing_segments() -> bool:
    """Whether PyTorch's allocator may have them; not where the user has set it up by the variable's earlier name."""
    is_refused = any(word in platform.release().lower() for word in FIXED_SEGMENTS)
    return sys.platform == "linux" and not is_refused and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ


def _set_malloc(mmap_threshold: int, trim_threshold: int, arenas: int) -> None:
    call_glibc("mallopt", ARENA_MAX, arenas)
    call_glibc("mallopt", MMAP_THRESHOLD, mmap_threshold)
    call_glibc("mallopt", TRIM_THRESHOLD, trim_threshold)


def call_glibc(name: str, *arguments: int) -> None:
    """Calls a function of glibc, and nothing on macOS, Windows and musl."""
    with suppress(AttributeError, TypeError, OSError):
        getattr(ctypes.CDLL(None), name)(*arguments)


@contextmanager
def compiler_left_out() -> Iterator[None]:
    """`torch.compile` does nothing, as a script may choose for the import of bitsandbytes."""
    import torch  # here: a script imports this module before it

    def unchanged(function: Any = None, *_arguments: Any, **_options: Any) -> Any:
        return (lambda decorated: decorated) if function is None else function

    before = {name: getattr(torch, name) for name in ("compile", "_disable_dynamo") if hasattr(torch, name)}
    try:
        for name in before:
            setattr(torch, name, unchanged)
        yield
    finally:
        for name, original in before.items():
            setattr(torch, name, original)


@contextmanager
def kernels_left_out() -> Iterator[None]:
    """bitsandbytes finds no package `kernels` while it is imported.

    On a processor with AVX512-BF16 it would ask the hub through it for a compiled kernel and load that into this
    process: a network at import, code that nobody asked for, and another order of the codes than `gemv.py` makes.
    """
    before = {"kernels": sys.modules["kernels"]} if "kernels" in sys.modules else {}
    sys.modules["kernels"] = None  # type: ignore[assignment]  # how Python is told that a module cannot be imported
    try:
        yield
    finally:
        del sys.modules["kernels"]
        sys.modules.update(before)
