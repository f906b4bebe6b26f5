"""What a program prints while it works, and what --quiet leaves of it."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator

import pytest

from minilora.system import console
from minilora.system.cli import build_parser
from minilora.system.signals import Interrupted, SafePoints


@pytest.fixture(autouse=True)
def not_quiet() -> Iterator[None]:
    yield
    console.set_quiet(False)
    console.set_silent(False)


def test_quiet_leaves_warnings_and_results(capsys: pytest.CaptureFixture[str]) -> None:
    build_parser("does something", "examples:").parse_args(["--quiet"])
    console.info("going on")
    console.note("read as")
    console.warn("note: look at this")
    with console.progress("train", 3, "step") as bar:
        bar.update(3)
    print("result")
    assert capsys.readouterr() == ("result\n", "note: look at this\n")


def test_what_is_done_at_once_needs_no_bar_where_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for delay_s in (60, 0):
        with console.progress("read", 3, "record", delay_s=delay_s) as bar:
            bar.update(3)
        assert ("read: 3/3" in capsys.readouterr().err) == (delay_s == 0)


def test_a_silent_rank_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    console.set_silent(True)
    console.info("going on")
    console.note("read as")
    console.warn("note: look at this")
    with console.progress("train", 3, "step") as bar:
        bar.update(3)
    with contextlib.suppress(Interrupted), SafePoints():
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr() == ("", "")


def test_progress_in_a_log_file_is_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("train", 3, "step") as bar:
        for _ in range(3):
            bar.update()
    lines = capsys.readouterr().err.split("\n")
    assert [line.partition(" [")[0] for line in lines] == ["train: 0/3", "train: 3/3", ""]
    assert not any(character in "".join(lines) for character in "\r\x1b")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with console.progress("train", 3, "step", leave=True) as bar:
        bar.update(3)
    assert "\rtrain: 100%|" in sys.stderr.getvalue()


def test_results_are_on_lines_of_their_own_above_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    with console.progress("predict", 3, "review") as bar:
        bar.update(1)
        console.write_results("a result\n")
    before, result, after = terminal.getvalue().partition("a result\n")
    assert result
    assert before.endswith("\r")  # the bar's line is blank, and the cursor at its beginning
    assert not before.rpartition("\r")[0].rpartition("\r")[2].strip()
    assert "predict:" in after


def test_results_are_written_at_once_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("predict", 3, "review") as bar:
        console.write_results("one\ntwo\n")
        assert capsys.readouterr().out == "one\ntwo\n"
        bar.update(3)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("terminal", "environment", "expected"),
    [
        (True, {}, True),
        (True, {"NO_COLOR": ""}, True),  # https://no-color.org: where it is not empty
        (True, {"NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (False, {}, False),
    ],
)
def test_colours_are_for_terminals_where_they_are_wanted(
    terminal: bool, environment: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", stream)
    assert console.uses_colour() is expected
