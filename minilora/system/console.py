"""What a program prints while it works. `--quiet` leaves results, warnings and errors.

print          results, on standard output                  always
write_results  results that come one by one                 always
info           what the program does, on standard output    not with --quiet
note           the same beside results, on standard error   not with --quiet
warn           warnings, on standard error                  always
progress       a bar on standard error                      not with --quiet; lines if it is not a terminal
"""

import os
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

LINE_EVERY_S = 30.0
LINE_FORMAT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"

_is_quiet = False
_is_silent = False


def set_quiet(quiet: bool) -> None:
    """Whether `info`, `note` and `progress` print nothing, for the whole process."""
    global _is_quiet
    _is_quiet = quiet


def set_silent(silent: bool) -> None:
    """Whether this process prints errors only, because rank 0 prints the rest."""
    global _is_silent
    _is_silent = silent


def is_silent() -> bool:
    return _is_silent


def is_quiet() -> bool:
    return _is_quiet or _is_silent


def uses_colour() -> bool:
    """Whether standard output is a terminal on which colours are wanted (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def info(text: str) -> None:
    if not is_quiet():
        print(text)


def note(text: str) -> None:
    if not is_quiet():
        print(text, file=sys.stderr)


def write_results(text: str) -> None:
    """Prints results, whole lines, at once, above a progress bar on the same terminal."""
    from tqdm import tqdm

    with tqdm.external_write_mode():
        sys.stdout.write(text)
        sys.stdout.flush()


def warn(text: str) -> None:
    if not _is_silent:
        print(text, file=sys.stderr)


def progress(
    desc: str, total: int | None, unit: str, initial: int = 0, *, leave: bool = False, delay_s: float = 0
) -> "tqdm[Any]":
    """A progress bar; in a log file or a pipe a line at the beginning, one every LINE_EVERY_S, and one at the end.

    `total` is None if unknown, `initial` what is done already; `leave` keeps the bar on the screen when it is done.
    What is done within `delay_s` has no bar.
    """
    from tqdm import tqdm  # here: a script answers signals before this slow import

    settings: dict[str, Any] = {"dynamic_ncols": True, "leave": leave}
    if not sys.stderr.isatty():
        settings = {"file": _Lines(sys.stderr), "mininterval": LINE_EVERY_S, "maxinterval": LINE_EVERY_S}
        settings["bar_format"] = LINE_FORMAT
    return tqdm(desc=desc, total=total, unit=unit, initial=initial, delay=delay_s, disable=is_quiet(), **settings)


class _Lines:
    """A stream for tqdm that writes whole lines, without the characters that move a terminal's cursor."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            self._stream.write(line + "\n")

    def flush(self) -> None:
        self._stream.flush()
