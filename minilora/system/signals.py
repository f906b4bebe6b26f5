"""Signals set a flag; a program checks it where it is safe to stop.

    with SafePoints() as safe_points:            from here on a signal waits
        for ...:
            with safe_points.anywhere():         raises at once: forward, backward, validation may be thrown away
                ...
            save()
            safe_points.check()                  raises where one came since the last check

A second signal exits at once; what is being written stays unfinished under its temporary name. Signals that are
ignored, as `nohup` and shells ask for, stay ignored. Python answers signals in the main thread only; elsewhere the flag
is never set.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NoReturn

from minilora.errors import UserError
from minilora.system.console import is_silent

Handler = Callable[[int, FrameType | None], None]
SIGNALS = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGINT", "SIGTERM") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """The signal `signum` came; a script's exit status is 128 + signum."""

    def __init__(self, signum: int, text: str = ""):
        super().__init__(text or f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
        self.is_explained = bool(text)  # it says what was saved


class SafePoints:
    """The flag and its checks: a context manager around what must not be stopped in the middle.

    With `everywhere` no signal waits: a script outside such a loop.
    """

    def __init__(self, everywhere: bool = False) -> None:
        self._signum: int | None = None
        self._everywhere = self._is_anywhere = everywhere
        self._listening = self._listen()

    def __enter__(self) -> "SafePoints":
        self._listening.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._listening.__exit__(None, None, None)
        is_unclear = self._everywhere and isinstance(error, Exception) and not isinstance(error, UserError)
        if error is None or is_unclear:
            self.check()  # one that came after the last check, or that a library's C code made another error of

    def check(self) -> None:
        if self._signum is not None:
            raise Interrupted(self._signum)

    @contextlib.contextmanager
    def anywhere(self) -> Iterator[None]:
        """Within it a signal raises at once."""
        self._is_anywhere = True
        try:
            self.check()
            yield
        except Exception:
            self.check()  # C code makes other errors of an exception in its callbacks; matplotlib, a ValueError
            raise
        finally:
            self._is_anywhere = False
        self.check()  # the exception may have been dropped

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None:
            exit_now(signum, f"\n{signal.Signals(signum).name} again: stopped at once\n")
        self._signum = signum
        if not self._everywhere:
            _write(f"\n{signal.Signals(signum).name}: saves and stops; a second one stops at once\n")
        if self._is_anywhere:
            self.check()

    @contextlib.contextmanager
    def _listen(self) -> Iterator[None]:
        """Sets the handlers. Python drops what is raised in a finaliser and prints a traceback. After a signal it does
        not: an Interrupted that is dropped waits for the next check, or without one ends the process, and other errors
        come of what it interrupted."""
        plain = sys.unraisablehook

        def hook(dropped: "sys.UnraisableHookArgs") -> None:
            if self._signum is None:
                plain(dropped)
            elif self._everywhere and isinstance(dropped.exc_value, Interrupted):
                exit_now(self._signum, f"{dropped.exc_value}\n")

        sys.unraisablehook = hook
        try:
            with handling(self._note):
                yield
        finally:
            sys.unraisablehook = plain


class Stopped(Interrupted):
    """SIGINT came within `Interruptible`."""


class Interruptible:
    """A block that Ctrl-C ends without ending the script; `came` says whether it did."""

    def __init__(self) -> None:
        self.came = False
        self._is_within = False
        self._handling = handling(self._note, (signal.SIGINT,))

    def __enter__(self) -> "Interruptible":
        self._handling.__enter__()
        self._is_within = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        self._is_within = False
        self._handling.__exit__(None, None, None)
        return self.came and isinstance(error, Exception | Stopped)  # see `SafePoints.anywhere`

    def check(self) -> None:
        """Raises Stopped if Ctrl-C came and the exception was dropped on its way."""
        if self.came:
            raise Stopped(signal.SIGINT)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.came = True
        if self._is_within:
            raise Stopped(signum)


@contextlib.contextmanager
def handling(handler: Handler, signals: Sequence[signal.Signals] = SIGNALS) -> Iterator[None]:
    """Sets the handler of `signals`, except those that are ignored; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in signals}
    chosen = [number for number, old in before.items() if old != signal.SIG_IGN]
    try:
        for number in chosen:
            signal.signal(number, handler)
        yield
    finally:
        for number in chosen:
            signal.signal(number, before[number])


@contextlib.contextmanager
def nothing_at_stake() -> Iterator[None]:
    """Within it a signal ends a script's process at once, for libraries whose threads would finish their work first.

    Where no script handles signals with `SafePoints`, they stay as they are.
    """
    is_script = isinstance(getattr(signal.getsignal(signal.SIGINT), "__self__", None), SafePoints)
    with handling(stop_now, SIGNALS if is_script else ()):
        yield


def stop_now(signum: int, frame: FrameType | None) -> None:
    """A handler that ends the process at once."""
    exit_now(signum, f"\nstopped by {signal.Signals(signum).name}\n")


def exit_now(signum: int, text: str) -> NoReturn:
    """Ends the process with the signal's status: no cleanup, no waiting for threads."""
    _write(text)
    os._exit(128 + signum)


def _write(text: str) -> None:
    """Past Python's buffers, which the signal may have interrupted in the middle of a write."""
    if not is_silent():
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
