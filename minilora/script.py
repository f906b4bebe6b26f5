"""How a script starts and ends: a message in place of a traceback, a status that says why, and signals answered.

    0     done
    2     UserError: what is wrong and what to do, or a disk that is full
    130   SIGINT (Ctrl-C)
    141   whoever read the output has enough and went, as `head` does
    143   SIGTERM

A signal ends a script at once, or in a training run at the next safe point, where nothing is lost (`safe_points`). A
second one does not wait for anything; what is being written is then left unfinished under its temporary name.
"""

import codecs
import contextlib
import errno
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from minilora.errors import UserError

Handler = Callable[[int, FrameType | None], None]
GRACE_S = 10.0  # SLURM, Kubernetes and torchrun kill 30 s after SIGTERM
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came; the text says what was saved."""

    def __init__(self, signum: int, text: str = ""):
        super().__init__(text or f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main` and leaves with the status that the module's docstring lists.

    Text that the terminal's encoding lacks is escaped, because a label that cannot be shown is no reason to lose a
    result.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # standard error escapes by itself
        sys.stdout.reconfigure(errors="json_escape")
    try:
        with _handling(_raise):
            try:
                main()
            finally:
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
        _leave(2, f"error: {where}: cannot be read or written ({error.strerror}); make room or mend the disk")


def _leave(status: int, message: str) -> None:
    """Prints and ends; a standard error that cannot be written either does not change the status."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)
    raise SystemExit(status) from None


def _discard_output() -> None:
    """What is still in standard output's buffer goes nowhere, or the interpreter's own flush would fail as well."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def safe_points() -> Iterator[Callable[[], None]]:
    """Within it a signal waits: call what you get wherever it is safe to stop; it raises `Interrupted` if one came."""
    caught: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if caught:
            _exit_now(signum, frame)
        caught.append(signum)
        _write(f"\n{signal.Signals(signum).name}: stops after this micro-batch and saves; a second one stops at once\n")

    def check() -> None:
        if caught:
            raise Interrupted(caught[0])

    with _handling(note):
        yield check
        check()


def _raise(signum: int, frame: FrameType | None) -> None:
    """Ends what is going on, and after GRACE_S the process, whatever its threads still wait for."""
    timer = threading.Timer(GRACE_S, os._exit, (128 + signum,))
    timer.daemon = True
    timer.start()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) == _raise:
            signal.signal(number, _exit_now)
    raise Interrupted(signum)


def _exit_now(signum: int, frame: FrameType | None) -> None:
    _write(f"\n{signal.Signals(signum).name} again: stopped at once\n")
    os._exit(128 + signum)


def _write(text: str) -> None:
    """Past Python's buffers, which the signal may have interrupted in the middle of a write."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


@contextlib.contextmanager
def _handling(handler: Handler) -> Iterator[None]:
    """Sets the handler of SIGINT and SIGTERM, but for those that are ignored, as `nohup` and shells ask for."""
    if threading.current_thread() is not threading.main_thread():  # only there may they be set
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
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
