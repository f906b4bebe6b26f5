"""bitsandbytes, imported when it is first used.

No other module imports it. `nf4.py` takes its 4-bit kernels from here and `optim.py` its optimizers; where it cannot be
imported, 4 bits are done in PyTorch, and its optimizers are refused.
"""

import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch

from minilora.errors import UserError

_without_compiler = False


def import_without_compiler() -> None:
    """For a script, before it loads a model: `torch.compile` does nothing while bitsandbytes is imported, later.

    bitsandbytes decorates functions that nothing here calls with `torch.compile`, and PyTorch marks its kernels as not
    to be compiled; either imports the whole compiler, 185 MB and five seconds, for a program that never compiles. Both
    are as they were when the import ends, but what bitsandbytes decorated stays uncompiled in this process.
    """
    global _without_compiler
    _without_compiler = True


@functools.cache
def functional() -> ModuleType | None:
    """bitsandbytes.functional, or None with one notice; imported on first use, for it takes a second."""
    source = logging.getLogger("bitsandbytes.backends.cpu.ops")
    source.addFilter(_is_worth_showing)
    try:
        with _compiler_left_out() if _without_compiler else nullcontext(), _kernels_left_out():
            import bitsandbytes.functional
    except Exception as error:  # a broken installation fails with whatever its loader meets
        logging.getLogger("minilora").warning(
            "nf4: bitsandbytes cannot be imported (%s); equal but slower PyTorch code takes over; "
            "for speed: pip install bitsandbytes",
            error,
        )
        return None
    finally:
        source.removeFilter(_is_worth_showing)
    return bitsandbytes.functional


@contextmanager
def _compiler_left_out() -> Iterator[None]:
    """`import_without_compiler`, while it lasts."""

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
def _kernels_left_out() -> Iterator[None]:
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


def _is_worth_showing(record: logging.LogRecord) -> bool:
    """False for the notice that `kernels` is not there."""
    return "kernels-community" not in record.getMessage()


def is_available() -> bool:
    """Whether bitsandbytes does the work; False, after one notice, where it cannot be imported."""
    return functional() is not None


def adamw() -> Any:
    """The class `bitsandbytes.optim.AdamW`.

    Raises:
        UserError: bitsandbytes cannot be imported.
    """
    if not is_available():
        raise UserError("train.optim: needs bitsandbytes; pip install bitsandbytes, or use adamw_torch_fused")
    from bitsandbytes.optim import AdamW

    return AdamW
