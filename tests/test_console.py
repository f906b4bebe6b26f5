"""What is said while a program works, and what --quiet leaves of it."""

import io
import sys
from collections.abc import Iterator

import pytest

from minilora import console, script
from minilora.script import build_parser


@pytest.fixture(autouse=True)
def loud_again() -> Iterator[None]:
    yield
    console.set_quiet(False)
    console.set_silent(False)


def test_quiet_leaves_warnings_and_results(capsys: pytest.CaptureFixture[str]) -> None:
    build_parser("does something", "examples:").parse_args(["--quiet"])
    console.say("going on")
    console.warn("note: look at this")
    with console.progress("train", 3, "step") as bar:
        bar.update(3)
    print("result")
    assert capsys.readouterr() == ("result\n", "note: look at this\n")


def test_one_that_another_process_speaks_for_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    console.set_silent(True)
    console.say("going on")
    console.warn("note: look at this")
    with console.progress("train", 3, "step") as bar:
        bar.update(3)
    script._write("stopped at once")
    assert capfd.readouterr() == ("", "")
    console.set_silent(False)
    script._write("stopped at once")
    assert capfd.readouterr() == ("", "stopped at once")


def test_progress_in_a_log_file_is_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("train", 3, "step") as bar:
        for _ in range(3):
            bar.update()
    lines = capsys.readouterr().err.split("\n")
    assert [line.partition(" [")[0] for line in lines] == ["train: 0/3", "train: 3/3", ""]
    assert not any(character in "".join(lines) for character in "\r\x1b")


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with console.progress("train", 3, "step", leave=True) as bar:
        bar.update(3)
    assert "\rtrain: 100%|" in sys.stderr.getvalue()
