"""What the tests of files and folders share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*_: object) -> None:
        raise error

    return function
