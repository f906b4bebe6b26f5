"""A script ends with a message and a status, its output arrives whatever reads it, and signals find it ready."""

import ast
import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from minilora.errors import UserError
from minilora.system import cli
from minilora.system.cli import Interrupted, Interruptible, SafePoints, Stopped, run_script

TEXT = "负面 é 😀"
FULL = "cannot be read or written (No space left on device); check path, room and rights"
HEAD = "import errno, json, os, signal, sys, time\nfrom minilora.system import cli\n"
HEAD += "from minilora.errors import UserError\nfrom minilora.system.cli import Interrupted, SafePoints, run_script\n"

SCRIPTS = sorted((Path(__file__).parents[2] / "scripts").glob("*.py"))
STATUSES = [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)]

no_windows = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals and pipes")
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, which is a full disk")


def program(body: str) -> list[str]:
    """A command that runs `body` as the main of a script."""
    lines = "\n    ".join(["def main():", *body.splitlines()])
    return [sys.executable, "-c", f"{HEAD}{lines}\nrun_script(main)\n"]


def run(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`body` as the main of a script, in a process of its own; what it printed is read as ASCII."""
    return subprocess.run(
        program(body), capture_output=True, encoding="ascii", env={**os.environ, **environment}, timeout=60
    )


@no_windows
@pytest.mark.parametrize(
    ("closed", "out", "err"),
    [("<&-", "okok", "okok"), (">&-", "", "okok"), ("2>&-", "okok", ""), ("<&- >&- 2>&-", "", "")],
)
def test_a_stream_that_is_closed_takes_nothing_and_lends_its_number_to_no_file(
    tmp_path: Path, closed: str, out: str, err: str
) -> None:
    body = f"file = open({str(tmp_path / 'a')!r}, 'w')\nfile.write(str(file.fileno()))\nfile.flush()\n"
    body += "for name in ('stdout', 'stderr'):\n    print('ok', end='', file=getattr(sys, name), flush=True)\n"
    body += "os.write(1, b'ok')\nos.write(2, b'ok')\nassert sys.stdin.read() == ''"
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *program(body)]
    done = subprocess.run(command, input="", capture_output=True, encoding="ascii", timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, out, err)
    assert int((tmp_path / "a").read_text("ascii")) > 2


@no_windows
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
@pytest.mark.parametrize(
    ("error", "status"),
    [("UserError('a')", 2), ("Interrupted(signal.SIGTERM)", 143), ("BrokenPipeError", 141), ("OSError(28, 'x')", 2)],
)
def test_the_status_is_the_same_where_streams_are_closed(closed: str, error: str, status: int) -> None:
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *program(f"print('lost')\nraise {error}")]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == status


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("a.tsv: is empty; add rows"), 2, "error: a.tsv: is empty; add rows\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Interrupted(signal.SIGINT), 130, "stopped by SIGINT\n"),
        (Interrupted(signal.SIGTERM, "stopped by SIGTERM: saved step 3"), 143, "stopped by SIGTERM: saved step 3\n"),
    ],
)
def test_a_mistake_and_an_interruption_have_a_status_of_their_own(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert caught.value.code == status
    assert capsys.readouterr().err == message


def test_a_script_that_is_done_ends_without_a_status_and_handlers_are_what_they_were() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    during: list[object] = []
    run_script(lambda: during.extend(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert not set(during) & set(before)


def test_text_that_the_terminal_cannot_show_is_escaped_and_json_stays_json() -> None:
    done = run(f"print(json.dumps({TEXT!r}, ensure_ascii=False))", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == TEXT


def test_bytes_that_are_no_text_are_not_escaped_into_some() -> None:
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("utf-8", "json_escape")


def test_a_message_that_the_terminal_cannot_show_is_escaped() -> None:
    done = run(f"raise UserError({TEXT!r})", PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert done.stderr.startswith(r"error: \u8d1f\u9762")


@no_windows
@pytest.mark.parametrize("lines", [1, 100_000], ids=["at the end", "on the way"])
def test_a_reader_that_goes_ends_the_script_without_a_word(lines: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(program(f"print('x\\n' * {lines})"), stdout=writer, stderr=subprocess.PIPE, encoding="utf-8")
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@needs_full
@pytest.mark.parametrize("lines", [1, 100_000], ids=["at the end", "on the way"])
def test_an_output_that_is_full_is_said_and_once(lines: int) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            program(f"print('x\\n' * {lines})"), stdout=full, stderr=subprocess.PIPE, encoding="utf-8"
        )
    assert done.returncode == 2
    assert done.stderr == f"error: the output: {FULL}\n"


@needs_full
def test_a_message_that_cannot_be_written_does_not_change_the_status() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(program("raise UserError('a')"), stderr=full, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (2, b"")


def test_a_disk_error_is_a_message_with_the_file() -> None:
    done = run("raise OSError(errno.ENOSPC, 'No space left on device', 'out/a.json')")
    assert done.returncode == 2
    assert done.stderr == f"error: out/a.json: {FULL}\n"


@pytest.mark.parametrize("number", sorted(cli.DISK_ERRORS))
def test_what_path_room_or_rights_may_be_to_blame_for_is_a_message(number: int) -> None:
    done = run(f"raise OSError({number}, os.strerror({number}), 'out/a.json')")
    assert done.returncode == 2
    reason = os.strerror(number)
    assert done.stderr == f"error: out/a.json: cannot be read or written ({reason}); check path, room and rights\n"


def test_another_error_of_the_system_is_a_traceback() -> None:
    done = run("open('no such file')")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "FileNotFoundError" in done.stderr

    def main() -> None:
        raise OSError(errno.ENODEV, "No such device")

    with pytest.raises(OSError, match="No such device"):
        run_script(main)


@no_windows
@pytest.mark.parametrize(("name", "status"), STATUSES)
def test_a_signal_ends_a_script_at_once(name: str, status: int) -> None:
    done = run(f"os.kill(os.getpid(), signal.{name})\ntime.sleep(30)\nprint('not stopped')")
    assert (done.returncode, done.stdout, done.stderr) == (status, "", f"stopped by {name}\n")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_answers_signals_before_it_imports_anything_else(path: Path) -> None:
    _, first, second, *_ = ast.parse(path.read_text("utf-8")).body
    assert isinstance(first, ast.ImportFrom)
    assert first.module == "minilora.system.cli"
    assert ast.unparse(second) == "if __name__ == '__main__':\n    answer_signals()"


# Runs a script, and sends a signal when it begins its N-th import after `minilora.system.cli`.
STRIKE = """
import os, runpy, sys
path, signum, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
class Striking:
    imports = 0
    def find_spec(self, name, *_):
        self.imports += "answer_signals" in vars(sys.modules.get("minilora.system.cli", object))
        if self.imports == count:
            os.kill(os.getpid(), signum)
sys.meta_path.insert(0, Striking())
sys.path[0], sys.argv = os.path.dirname(path), [path, "--help"]
runpy.run_path(path, run_name="__main__")
"""


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_is_readable_and_has_examples(path: Path) -> None:
    done = subprocess.run([sys.executable, path, "--help"], capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0
    assert done.stderr == ""
    assert f"\nexamples:\n  python scripts/{path.name}" in done.stdout
    assert "--quiet" in done.stdout
    assert "%%" not in done.stdout


@no_windows
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize(("name", "status"), STATUSES[:2])
def test_a_signal_ends_a_script_that_still_imports(path: Path, name: str, status: int) -> None:
    for count in (3, 15, 500):  # that is in the middle of PyTorch, where a script imports it
        command = [sys.executable, "-c", STRIKE, path, str(int(getattr(signal, name))), str(count)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)
        if count == 500 and done.returncode == 0:
            assert path.stem in ("download_data", "preprocess_data")
            break
        assert (done.returncode, done.stdout, done.stderr) == (status, "", f"stopped by {name}\n")


@no_windows
def test_a_signal_from_outside_ends_a_script_that_still_imports() -> None:
    script_path = next(path for path in SCRIPTS if path.stem == "train")
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", script_path], stderr=subprocess.PIPE, encoding="utf-8"
    )
    assert process.stderr is not None
    while "minilora.system.cli" not in (line := process.stderr.readline()):  # it has been imported
        assert line
    for _ in range(100):
        assert process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.endswith("stopped by SIGINT\n")
    assert "Traceback" not in errors


@no_windows
def test_a_signal_that_is_ignored_is_ignored_while_a_script_imports() -> None:
    body = f"{HEAD}cli.answer_signals()\nos.kill(os.getpid(), signal.SIGINT)\nprint('done')"
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", body]
    done = subprocess.run(command, capture_output=True, encoding="ascii", timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@no_windows
def test_a_signal_from_outside_ends_a_script_and_what_it_printed_is_there() -> None:
    process = subprocess.Popen(
        program("print('printed')\nos.write(2, b'begun\\n')\ntime.sleep(30)"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="ascii",
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == ("printed\n", "stopped by SIGTERM\n")
    assert process.returncode == 143


@no_windows
def test_a_second_signal_does_not_wait_for_what_the_first_one_began() -> None:
    done = run(
        "try:\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(30)\n"
        "finally:\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(30)"
    )
    assert (done.returncode, done.stderr) == (143, "\nSIGTERM again: stopped at once\n")


@no_windows
def test_a_script_that_does_not_end_by_itself_is_ended() -> None:
    done = run(
        "cli.GRACE_S = 0.1\ntry:\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(30)\n"
        "finally:\n    time.sleep(30)"
    )
    assert done.returncode == 143


@no_windows
def test_an_ignored_signal_stays_ignored() -> None:
    body = "os.kill(os.getpid(), signal.SIGINT)\nwith SafePoints() as points:\n"
    body += "    os.kill(os.getpid(), signal.SIGINT)\n    points.check()\nprint('done')"
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *program(body)]
    done = subprocess.run(command, capture_output=True, encoding="ascii", timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@no_windows
@pytest.mark.parametrize(("name", "status"), STATUSES)
def test_between_safe_points_a_signal_waits(name: str, status: int) -> None:
    done = run(
        "with SafePoints() as points:\n    points.check()\n"
        f"    os.kill(os.getpid(), signal.{name})\n    print('waited')\n"
        "    points.check()\n    print('not stopped')"
    )
    assert (done.returncode, done.stdout) == (status, "waited\n")
    first, last = done.stderr.strip().split("\n")
    assert first == f"{name}: saves and stops; a second one stops at once"
    assert last == f"stopped by {name}"


@no_windows
def test_a_signal_behind_the_last_safe_point_is_not_lost() -> None:
    done = run(
        "with SafePoints() as points:\n    points.check()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    print('waited')\n"
        "print('not stopped')"
    )
    assert (done.returncode, done.stdout) == (143, "waited\n")
    assert done.stderr.endswith("\nstopped by SIGTERM\n")


@no_windows
@pytest.mark.parametrize(("name", "status"), STATUSES)
def test_between_safe_points_a_second_signal_ends_it_at_once(name: str, status: int) -> None:
    done = run(
        f"with SafePoints() as points:\n    os.kill(os.getpid(), signal.{name})\n"
        f"    os.kill(os.getpid(), signal.{name})\n    time.sleep(30)"
    )
    assert done.returncode == status
    assert done.stderr.endswith(f"\n{name} again: stopped at once\n")
    assert "stopped by" not in done.stderr


@no_windows
def test_where_all_may_be_thrown_away_a_signal_is_answered_at_once() -> None:
    done = run(
        "with SafePoints() as points:\n    with points.anywhere():\n        print('begun')\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n        time.sleep(30)"
    )
    assert (done.returncode, done.stdout) == (143, "begun\n")
    assert done.stderr.endswith("\nstopped by SIGTERM\n")


@no_windows
def test_a_signal_from_before_is_answered_where_all_may_be_thrown_away() -> None:
    done = run(
        "with SafePoints() as points:\n    with points.anywhere():\n        pass\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    print('waited')\n"
        "    with points.anywhere():\n        print('not stopped')"
    )
    assert (done.returncode, done.stdout) == (143, "waited\n")


@no_windows
def test_an_error_between_safe_points_is_not_hidden_by_a_signal() -> None:
    done = run("with SafePoints() as points:\n    os.kill(os.getpid(), signal.SIGTERM)\n    raise UserError('no room')")
    assert done.returncode == 2
    assert done.stderr.endswith("\nerror: no room\n")


def test_in_another_thread_there_are_no_signals_and_the_work_is_done() -> None:
    done: list[str] = []

    def work() -> None:
        with SafePoints() as points:
            points.check()
            done.append("safe points")
        run_script(lambda: done.append("script"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["safe points", "script"]


@no_windows
@pytest.mark.parametrize(
    "body",
    [
        "try:\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(30)\n"
        "except KeyboardInterrupt:\n    raise ValueError('Invalid bounding box') from None",
        "with SafePoints() as points, points.anywhere():\n    try:\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(30)\n    except KeyboardInterrupt:\n"
        "        raise ValueError('Invalid bounding box') from None",
        "with SafePoints() as points:\n    with points.anywhere():\n        try:\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n            time.sleep(30)\n"
        "        except KeyboardInterrupt:\n            pass\n    print('not stopped')",
    ],
    ids=["at once", "anywhere", "dropped"],
)
def test_an_interruption_that_a_librarys_c_code_swallowed_is_one_all_the_same(body: str) -> None:
    """As matplotlib's renderer does: a signal in its callbacks came out as a ValueError."""
    done = run(body)
    assert (done.returncode, done.stdout) == (143, "")
    assert done.stderr.endswith("stopped by SIGTERM\n")
    assert "Traceback" not in done.stderr


@no_windows
def test_an_error_of_the_program_is_no_interruption() -> None:
    done = run("with SafePoints() as points, points.anywhere():\n    raise ValueError('a mistake')")
    assert done.returncode == 1
    assert "ValueError: a mistake" in done.stderr


DROPPING = (
    "class Dropping:\n    def __del__(self):\n        os.kill(os.getpid(), signal.SIGTERM)\n        time.sleep(30)\n"
)


@no_windows
def test_an_interruption_that_python_drops_ends_the_script_all_the_same() -> None:
    done = run(f"{DROPPING}Dropping()\ntime.sleep(30)")
    assert done.returncode == 143
    assert "stopped by SIGTERM" in done.stderr
    assert "Traceback" not in done.stderr


@no_windows
def test_within_a_runs_loop_one_that_python_drops_waits_for_the_next_safe_point() -> None:
    body = f"{DROPPING}with SafePoints() as points:\n    with points.anywhere():\n        Dropping()\n"
    done = run(f"{body}        print('so far')\n    print('not stopped')")
    assert (done.returncode, done.stdout) == (143, "so far\n")
    assert done.stderr.endswith("\nstopped by SIGTERM\n")
    assert "Traceback" not in done.stderr


def test_another_error_that_python_drops_is_shown() -> None:
    done = run("class A:\n    def __del__(self):\n        raise ValueError('a mistake')\nA()\nprint('done')")
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert "ValueError: a mistake" in done.stderr


@no_windows
def test_ctrl_c_ends_a_stretch_and_not_the_script() -> None:
    body = """\
from minilora.system.cli import Interruptible
for _ in range(2):
    with Interruptible() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    print(interruption.came)
with Interruptible() as interruption:
    pass
print(interruption.came)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)"""
    done = run(body)
    assert (done.returncode, done.stdout, done.stderr) == (130, "True\nTrue\nFalse\n", "stopped by SIGINT\n")


@no_windows
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_other_signals_end_the_script_within_such_a_stretch(name: str, status: int) -> None:
    body = f"with cli.Interruptible():\n    os.kill(os.getpid(), signal.{name})\n"
    assert run(f"{body}    time.sleep(60)\nprint('not here')").stdout == ""
    assert run(f"{body}    time.sleep(60)").returncode == status


@no_windows
def test_an_interruption_that_was_dropped_or_became_another_error_ends_the_stretch() -> None:
    with Interruptible() as interruption:
        with contextlib.suppress(Stopped):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        interruption.check()
        pytest.fail("goes on")
    with Interruptible():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except Stopped:
            raise RuntimeError("what C code makes of it") from None


def test_an_error_without_an_interruption_leaves_the_stretch() -> None:
    def divide() -> None:
        with Interruptible() as interruption:
            interruption.check()
            raise ZeroDivisionError

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError):
        divide()
    assert signal.getsignal(signal.SIGINT) == before


@no_windows
def test_where_ctrl_c_is_ignored_it_stays_so() -> None:
    body = "signal.signal(signal.SIGINT, signal.SIG_IGN)\nfrom minilora.system.cli import Interruptible\n"
    body += "with Interruptible():\n    os.kill(os.getpid(), signal.SIGINT)\n    print('goes on')"
    assert run(body).stdout == "goes on\n"
