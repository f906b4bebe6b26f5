"""Signals wait for a safe point, end what may be thrown away, and a second one ends everything."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from minilora.errors import UserError
from minilora.system.signals import Interrupted, Interruptible, SafePoints, Stopped, handling

STATUSES = [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)]
HEAD = "import os, signal, time\nfrom minilora.system.signals import Interruptible, SafePoints\n"

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")


def send(name: str = "SIGTERM") -> None:
    """Sends this process a signal; Python answers it before the next line."""
    os.kill(os.getpid(), getattr(signal, name))


@contextlib.contextmanager
def interrupted(name: str = "SIGTERM") -> Iterator[None]:
    """Holds that the signal's Interrupted leaves the block."""
    with pytest.raises(Interrupted, match=name) as caught:
        yield
    assert caught.value.signum == getattr(signal, name)


def run(body: str) -> subprocess.CompletedProcess[str]:
    """`body` in a process of its own, which a signal may end."""
    return subprocess.run([sys.executable, "-c", HEAD + body], capture_output=True, encoding="ascii", timeout=60)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_between_safe_points_a_signal_waits(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    reached = []
    with interrupted(name), SafePoints() as safe_points:
        safe_points.check()
        send(name)
        reached.append("after the signal")
        safe_points.check()
        reached.append("after the check")
    assert reached == ["after the signal"]
    assert f"{name}: saves and stops" in capfd.readouterr().err


def test_a_signal_after_the_last_check_is_not_lost() -> None:
    with interrupted(), SafePoints():
        send()


@pytest.mark.parametrize(("name", "status"), STATUSES)
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_second_signal_ends_the_process_at_once(name: str, status: int, everywhere: bool) -> None:
    body = f"with SafePoints({everywhere}) as safe_points:\n    try:\n        os.kill(os.getpid(), signal.{name})\n"
    body += f"    finally:\n        os.kill(os.getpid(), signal.{name})\n        print('not stopped', flush=True)"
    done = run(body)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.endswith(f"{name} again: stopped at once\n")


def test_anywhere_a_signal_raises_at_once() -> None:
    with interrupted(), SafePoints() as safe_points, safe_points.anywhere():
        send()
        pytest.fail("not stopped")


def test_anywhere_begins_with_a_check() -> None:
    with interrupted(), SafePoints() as safe_points:
        send()
        with safe_points.anywhere():
            pytest.fail("not stopped")


def test_after_anywhere_a_signal_waits_again() -> None:
    reached = []
    with interrupted(), SafePoints() as safe_points:
        with safe_points.anywhere():
            pass
        send()
        reached.append("after the signal")
        safe_points.check()
    assert reached


def test_an_error_between_safe_points_is_not_hidden_by_a_signal() -> None:
    def fail() -> None:
        send()
        raise UserError("no room")

    with pytest.raises(UserError, match="no room"), SafePoints():
        fail()


@pytest.mark.parametrize("everywhere", [False, True])
def test_an_interruption_that_a_library_made_another_error_of_is_one(everywhere: bool) -> None:
    """As matplotlib's renderer does: a signal in its callbacks came out as a ValueError."""

    def render() -> None:
        try:
            send()
        except KeyboardInterrupt:
            raise ValueError("Invalid bounding box") from None

    with interrupted(), SafePoints(everywhere) as points, nullcontext() if everywhere else points.anywhere():
        render()


@pytest.mark.parametrize("everywhere", [False, True])
def test_an_interruption_that_was_dropped_is_one_at_the_next_check(everywhere: bool) -> None:
    def drop() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            send()

    with interrupted(), SafePoints(everywhere) as points, nullcontext() if everywhere else points.anywhere():
        drop()


@pytest.mark.parametrize("everywhere", [False, True])
def test_without_a_signal_an_error_is_itself(everywhere: bool) -> None:
    def fail() -> None:
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"), SafePoints(everywhere) as safe_points, safe_points.anywhere():
        fail()


def test_a_users_mistake_is_itself_also_after_a_signal() -> None:
    """Another rank's failure counts more than the signal that this one got."""

    def fail() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            send()
        raise UserError("another rank failed")

    with pytest.raises(UserError, match="another rank failed"), SafePoints(everywhere=True):
        fail()


def test_ignored_signals_stay_ignored() -> None:
    with handling(signal.SIG_IGN, [signal.SIGINT]), SafePoints() as safe_points:  # type: ignore[arg-type]
        send("SIGINT")
        safe_points.check()
        with Interruptible() as interruption:
            send("SIGINT")
        assert not interruption.came


def test_handlers_are_restored() -> None:
    before = [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]
    with SafePoints():
        assert signal.getsignal(signal.SIGTERM) != before[1]
        with Interruptible():
            assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)] == before


def test_in_another_thread_no_signal_is_handled_and_the_work_is_done() -> None:
    done: list[str] = []

    def work() -> None:
        with SafePoints() as safe_points, Interruptible():
            safe_points.check()
            done.append("work")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["work"]


def test_ctrl_c_ends_a_block_and_not_the_script() -> None:
    for _ in range(2):
        with Interruptible() as interruption:
            send("SIGINT")
            pytest.fail("not stopped")
        assert interruption.came
    with Interruptible() as interruption:
        pass
    assert not interruption.came


def test_another_signal_ends_the_script_within_such_a_block() -> None:
    with interrupted(), SafePoints(everywhere=True), Interruptible():
        send("SIGTERM")


def test_a_ctrl_c_that_was_dropped_or_became_another_error_ends_the_block() -> None:
    with Interruptible() as interruption:
        with contextlib.suppress(Stopped):
            send("SIGINT")
        interruption.check()
        pytest.fail("not stopped")
    with Interruptible():
        try:
            send("SIGINT")
        except Stopped:
            raise RuntimeError("a library's error") from None


def test_an_error_without_ctrl_c_leaves_the_block() -> None:
    def divide() -> None:
        with Interruptible() as interruption:
            interruption.check()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        divide()


def test_a_closed_terminal_does_not_hide_the_status() -> None:
    body = "os.close(2)\nwith SafePoints():\n    os.kill(os.getpid(), signal.SIGHUP)\n"
    done = run(f"{body}    os.kill(os.getpid(), signal.SIGHUP)\n    time.sleep(60)")
    assert done.returncode == 129
