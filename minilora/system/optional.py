"""Packages that minilora can do without, imported when they are needed.

One that is installed may still fail: built for another numpy or protobuf, without a library of the system's, without a
home folder to write to. What it then raises is its own affair, so any exception counts as absence, with its reason.
"""

import contextlib
import importlib
import io
from types import ModuleType

from minilora.errors import UserError, capped


class MissingPackageError(UserError):
    """A package is not installed, or fails; the text says which, why, and what to install."""


def import_optional(name: str) -> ModuleType:
    """The module `name`, as "matplotlib.figure"; MissingPackageError where it cannot be had, whatever the reason."""
    package = name.partition(".")[0]
    for part in (package, name):
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # numpy prints a traceback of its own before it raises
                module = importlib.import_module(part)
        except (Exception, SystemExit) as error:
            if isinstance(error, ModuleNotFoundError) and error.name == package:
                raise MissingPackageError(f"{package} is not installed; pip install {package}") from None
            raise broken(part, error) from None
    return module


def broken(name: str, error: BaseException) -> MissingPackageError:
    """`error`, which the module `name` met when it was imported or used, as a message of one line."""
    reason = capped(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".removesuffix(": "), 200)
    package = name.partition(".")[0]
    return MissingPackageError(f"{name} is installed and fails ({reason}); pip install --upgrade {package}")
