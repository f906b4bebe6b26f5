"""How a script begins and ends: its arguments, a message in place of a traceback, a status that says why, signals.

    0     done
    2     UserError: what is wrong and what to do, or a disk that is full
    129   SIGHUP: the terminal was closed
    130   SIGINT (Ctrl-C)
    141   whoever read the output has enough and went, as `head` does
    143   SIGTERM

A signal ends a script at once, from its first imports on (`answer_signals`); in a training run it waits while weights
change or something is written, a second or so (`SafePoints`). A second signal waits for nothing; what is being written
is left unfinished under its temporary name.
"""

import argparse
import codecs
import contextlib
import errno
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from minilora.errors import UserError
from minilora.system.console import is_silent, set_quiet

Handler = Callable[[int, FrameType | None], None]
SIGNALS = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGINT", "SIGTERM") if hasattr(signal, name))
GRACE_S = 10.0  # SLURM, Kubernetes and torchrun kill 30 s after SIGTERM
# What a disk or a path may be to blame for; any other OSError is the program's.
DISK_ERRORS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EFBIG", "ENAMETOOLONG", "ELOOP", "EACCES", "EPERM", "EMFILE")
    if hasattr(errno, name)
}


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came; the text says what was saved."""

    def __init__(self, signum: int, text: str = ""):
        super().__init__(text or f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
        self.is_explained = bool(text)


def answer_signals() -> None:
    """Lets a signal end the program with its status from now on: for a script's first line, before it imports PyTorch.

    It ends at once, because what a library makes of an error while it is imported is anybody's guess, and nothing is
    at stake before `run_script` takes over.
    """
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _exit_before_start)


def build_parser(description: str | None, examples: str) -> argparse.ArgumentParser:
    """A script's argument parser, with what all of them have: examples in --help, and --quiet.

    Args:
        description: the script's docstring.
        examples: printed as it stands below the arguments.
    """
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-q", "--quiet", action=_Quiet, help="print results, warnings and errors, and nothing else")
    return parser


class _Quiet(argparse.Action):
    """Silences `console.say` and `console.progress` as soon as it is read."""

    def __init__(self, **settings: Any):
        super().__init__(**{**settings, "nargs": 0})

    def __call__(self, *_: Any) -> None:
        set_quiet(True)


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main` and leaves with the status that the module's docstring lists.

    Text that the terminal's encoding lacks is escaped, because a label that cannot be shown is no reason to lose a
    result.
    """
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # standard error escapes by itself
        sys.stdout.reconfigure(errors="json_escape")
    try:
        at_once = _AtOnce()
        with _handling(at_once.answer), _dropped_to(at_once):
            try:
                main()
            except BaseException as error:
                with contextlib.suppress(OSError):  # the first reason counts
                    sys.stdout.flush()
                if at_once.caught is not None and isinstance(error, Exception) and not isinstance(error, UserError):
                    raise Interrupted(at_once.caught) from error  # a library's C code had made another error of it
                raise
            sys.stdout.flush()  # here, not when the interpreter ends, where a closed pipe can no longer be caught
    except UserError as error:
        _leave(2, f"error: {error}")
    except Interrupted as error:
        _leave(128 + error.signum, str(error))
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT, "interrupted")
    except BrokenPipeError:
        _discard_output()
        raise SystemExit(141) from None
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        _discard_output()
        where = error.filename or "the output"
        _leave(2, f"error: {where}: cannot be read or written ({error.strerror}); check path, room and rights")


def _open_closed_streams() -> None:
    """A standard stream that was closed (`>&-`) leads nowhere from now on, lest the next file that is opened take its
    number."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _leave(status: int, message: str) -> None:
    """Prints and ends; a standard error that cannot be written either does not change the status."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()
    raise SystemExit(status) from None


def _discard_output() -> None:
    """What is still in standard output's buffer goes nowhere, or the interpreter's own flush would fail as well."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class SafePoints:
    """Makes signals wait while a run's state changes: a context manager around its loop.

    Within it a signal is noted. `check()` raises `Interrupted` if one came; so does, at once, the signal itself within
    `anywhere()`, which stands around what may be thrown away at any moment: forward, backward, validation.
    """

    def __init__(self) -> None:
        self._caught: int | None = None
        self._is_anywhere = False
        self._handling = _handling(self._note)

    def __enter__(self) -> "SafePoints":
        self._handling.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._handling.__exit__(None, None, None)
        if error is None:  # one that came behind the last check
            self.check()

    def check(self) -> None:
        """A place where it is safe to stop."""
        if self._caught is not None:
            raise Interrupted(self._caught)

    @contextlib.contextmanager
    def anywhere(self) -> Iterator[None]:
        """A stretch where it is safe to stop in the middle of anything."""
        self._is_anywhere = True
        try:
            self.check()
            yield
        except Exception:
            self.check()  # a library's C code may have made another error of the interruption
            raise
        finally:
            self._is_anywhere = False
        self.check()  # or have dropped it

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._caught is not None:
            _exit_now(signum, frame)
        self._caught = signum
        _write(f"\n{signal.Signals(signum).name}: saves and stops; a second one stops at once\n")
        if self._is_anywhere:
            self.check()


class Stopped(Interrupted):
    """SIGINT came within `Interruptible`."""


class Interruptible:
    """A stretch that Ctrl-C ends, and nothing but the stretch: a context manager behind which the script goes on.

    Attributes:
        came: whether it did.
    """

    def __init__(self) -> None:
        self.came = False
        self._is_within = False
        self._handling = _handling(self._note, (signal.SIGINT,))

    def __enter__(self) -> "Interruptible":
        self._handling.__enter__()
        self._is_within = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        self._is_within = False
        self._handling.__exit__(None, None, None)
        return self.came and isinstance(error, Exception | Stopped)  # C code may have made another error of it

    def check(self) -> None:
        """To be called now and then, for an interruption that Python dropped."""
        if self.came:
            raise Stopped(signal.SIGINT)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.came = True
        if self._is_within:
            raise Stopped(signum)


class _AtOnce:
    """The handler outside a run's loop: ends what is going on."""

    def __init__(self) -> None:
        self.caught: int | None = None

    def answer(self, signum: int, frame: FrameType | None) -> None:
        """Raises, and after GRACE_S ends the process, whatever its threads still wait for."""
        if self.caught is not None:
            _exit_now(signum, frame)
        self.caught = signum

        timer = threading.Timer(GRACE_S, self.give_up)
        timer.daemon = True
        timer.start()
        raise Interrupted(signum)

    def give_up(self) -> None:
        """Ends the process where raising did not."""
        if self.caught is not None:
            _write(f"\nstopped by {signal.Signals(self.caught).name}, without waiting for what does not end\n")
            os._exit(128 + self.caught)


@contextlib.contextmanager
def _dropped_to(at_once: _AtOnce) -> Iterator[None]:
    """Within it an `Interrupted` that Python drops, because it came in a finaliser or a weak reference's callback, is
    not printed as a traceback: it ends the process, or within a run's loop waits for the next safe point."""
    plain = sys.unraisablehook

    def hook(dropped: "sys.UnraisableHookArgs") -> None:
        if not isinstance(dropped.exc_value, Interrupted):
            plain(dropped)
        at_once.give_up()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = plain


def _exit_before_start(signum: int, frame: FrameType | None) -> None:
    _write(f"stopped by {signal.Signals(signum).name}\n")
    os._exit(128 + signum)


def _exit_now(signum: int, frame: FrameType | None) -> None:
    _write(f"\n{signal.Signals(signum).name} again: stopped at once\n")
    os._exit(128 + signum)


def _write(text: str) -> None:
    """Past Python's buffers, which the signal may have interrupted in the middle of a write."""
    if not is_silent():
        with contextlib.suppress(OSError):
            os.write(2, text.encode())


@contextlib.contextmanager
def _handling(handler: Handler, signals: Sequence[signal.Signals] = SIGNALS) -> Iterator[None]:
    """Sets the handler of `signals`, but for those that are ignored, as `nohup` and shells ask for."""
    if threading.current_thread() is not threading.main_thread():  # only there may they be set
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


def _json_escape(error: UnicodeError) -> tuple[str, int]:
    """The part that cannot be encoded, as JSON writes it: a line of JSON stays one, which "backslashreplace"
    would break with its \\xe9 and \\U0001f600."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error("json_escape", _json_escape)
