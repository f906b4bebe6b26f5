"""bitsandbytes, imported when it is first used.

No other module imports it. `nf4.py` takes its 4-bit kernels from here, `adapters/optimizers.py` its AdamW. Where it
cannot be imported, or its library for this machine does not load, 4 bits are done in PyTorch, and its AdamW is refused.
"""

import functools
import logging
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch

from minilora.errors import UserError
from minilora.system.process import compiler_left_out, is_tuned, kernels_left_out


@functools.cache
def functional() -> ModuleType | None:
    """bitsandbytes.functional, or None with one notice; imported on first use, for it takes a second."""
    sources = [logging.getLogger(f"bitsandbytes.{name}") for name in ("backends.cpu.ops", "cextension")]
    for source in sources:
        source.addFilter(_is_worth_showing)
    try:
        with compiler_left_out() if is_tuned() else nullcontext(), kernels_left_out():
            import bitsandbytes.functional
        _check_library(bitsandbytes.functional.lib)
    except Exception as error:  # a broken installation fails with whatever its loader meets
        logging.getLogger("minilora").warning(
            "nf4: bitsandbytes cannot be used (%s); equal but slower PyTorch code takes over; "
            "for speed: pip install bitsandbytes; python -m bitsandbytes says what it lacks",
            str(error).strip().split("\n")[0],
        )
        return None
    finally:
        for source in sources:
            source.removeFilter(_is_worth_showing)
    return bitsandbytes.functional


def _check_library(library: Any) -> None:
    """Raises where the import succeeded and every call would fail.

    bitsandbytes puts an object in the place of a library that it could not load, which raises when it is called.
    """
    if "Mock" in type(library).__name__:
        raise RuntimeError(getattr(library, "error_msg", "its library does not load"))
    if torch.cuda.is_available() and not getattr(library, "compiled_with_cuda", False):
        raise RuntimeError(f"no library for CUDA {torch.version.cuda} in it")


def _is_worth_showing(record: logging.LogRecord) -> bool:
    """False for the notice that `kernels` is not there, and for the traceback that goes with our own warning."""
    return not any(words in record.getMessage() for words in ("kernels-community", "library load error"))


def is_available() -> bool:
    """Whether bitsandbytes does the work; False, after one notice, where it cannot."""
    return functional() is not None


def adamw() -> Any:
    """The class `bitsandbytes.optim.AdamW`; UserError where bitsandbytes cannot be imported."""
    if not is_available():
        raise UserError("train.optim: needs bitsandbytes; pip install bitsandbytes, or use adamw_torch_fused")
    from bitsandbytes.optim import AdamW

    return AdamW
