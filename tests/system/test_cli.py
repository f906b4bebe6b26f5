"""A script's options in both spellings, its messages and exit statuses, and signals from its first line on."""

import argparse
import ast
import errno
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from minilora.errors import UserError
from minilora.system.cli import COMMANDS, QUICKSTART, build_parser, run_command, run_script
from minilora.system.signals import Interrupted
from tests.scripts.conftest import SCRIPTS, load_script

TEXT = "负面 é 😀"
FULL = "cannot be read or written (No space left on device)"
HEAD = "import errno, os, signal, sys, time\nfrom minilora.errors import UserError\n"
HEAD += "from minilora.system.cli import begin_script, run_script\nfrom minilora.system.signals import Interrupted\n"
PATHS = sorted(SCRIPTS.glob("*.py"))

no_windows = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals and pipes")
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, which is a full disk")


def program(body: str) -> list[str]:
    """A command that runs `body` as the main of a script."""
    lines = "\n    ".join(["def main():", *body.splitlines()])
    return [sys.executable, "-c", f"{HEAD}{lines}\nrun_script(main)\n"]


def run(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`body` as the main of a script, in a process of its own; its output is read as ASCII."""
    return subprocess.run(
        program(body), capture_output=True, encoding="ascii", env={**os.environ, **environment}, timeout=60
    )


# Options.


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = build_parser("does something", "examples:")
    parser.add_argument("--output_dir")
    parser.add_argument("--allow_bin", action="store_true")
    parser.add_argument("words", nargs="*")
    return parser


@pytest.mark.parametrize(
    "words",
    [["--output_dir", "a-b", "--allow_bin"], ["--output-dir=a-b", "--allow-bin"], ["--output", "a-b", "--allow"]],
)
def test_an_option_has_both_spellings_and_may_be_abbreviated(parser: argparse.ArgumentParser, words: list[str]) -> None:
    for arguments in (parser.parse_args(words), parser.parse_intermixed_args([*words, "c-d"])):
        assert (arguments.output_dir, arguments.allow_bin) == ("a-b", True)


@pytest.mark.parametrize("words", [["--lora.r", "4"], ["--lora.r=4"], ["lora.r=4"]])
def test_a_key_may_be_spelled_as_an_option(parser: argparse.ArgumentParser, words: list[str]) -> None:
    assert parser.parse_intermixed_args([*words, "--output_dir", "a", "b"]).words == ["lora.r=4", "b"]


def test_after_two_hyphens_and_in_values_nothing_is_respelled(parser: argparse.ArgumentParser) -> None:
    arguments = parser.parse_args(["--output_dir=--a-b", "a-b", "--", "--c-d"])
    assert arguments.output_dir == "--a-b"
    assert arguments.words == ["a-b", "--c-d"]


def test_a_path_begins_with_the_home_folder_where_no_shell_expands_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(tmp_path))
    parser = build_parser("does something", "examples:")
    parser.add_argument("--input", type=Path, nargs="+")
    parser.add_argument("--output_dir", type=Path, default=Path("data"))
    assert parser.parse_args(["--input", "~/a", "b/~", "c"]).input == [tmp_path / "a", Path("b/~"), Path("c")]
    assert parser.parse_args(["--output-dir=~/my data"]).output_dir == tmp_path / "my data"
    assert parser.parse_args([]).output_dir == Path("data")


def test_the_command_line_is_the_default(parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", "--output-dir", "here"])
    assert parser.parse_args().output_dir == "here"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_help_has_examples_and_one_style_of_options(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as stop:
        load_script(path.stem).main()
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert f"\nexamples:\n  python scripts/{path.name}" in printed
    assert "--quiet" in printed
    assert "%%" not in printed
    words = printed.replace("--nproc-per-node", "").split()  # torchrun's
    assert not [word for word in words if word.startswith("--") and "-" in word[2:]]


@pytest.mark.parametrize("name", ["train", "plan", "inspect_batch"])
def test_the_default_configuration_is_the_quickstart(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, paths = load_script(name), []

    def note(path: Path, overrides: list[str]) -> None:
        paths.append(path)
        raise UserError("noted")

    monkeypatch.setattr(script, "load_config", note)
    monkeypatch.setattr(sys, "argv", [name, *(["--budget", "1GB"] if name == "plan" else [])])
    with pytest.raises(UserError, match="noted"):
        script.main()
    assert paths == [QUICKSTART]
    assert QUICKSTART.is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_a_script(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[str, list[str]]] = []
    monkeypatch.setattr("runpy.run_path", lambda path, run_name: ran.append((path, sys.argv)))
    monkeypatch.setattr(sys, "argv", ["minilora", command, "--quiet"])
    run_command()
    assert ran == [(sys.argv[0], [sys.argv[0], "--quiet"])]
    assert Path(sys.argv[0]) in PATHS


@pytest.mark.parametrize("arguments", [[], ["trian"], ["--help"]])
def test_another_command_is_named_with_those_that_exist(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["minilora", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_command()
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert all(word in printed for word in (*COMMANDS, *arguments))


# Messages and statuses.


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("a.tsv: is empty; add records"), 2, "error: a.tsv: is empty; add records\n"),
        (Interrupted(signal.SIGINT), 130, "stopped by SIGINT\n"),
        (Interrupted(signal.SIGTERM, "stopped by SIGTERM: saved step 3"), 143, "stopped by SIGTERM: saved step 3\n"),
    ],
)
def test_each_end_has_its_status_and_message(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert caught.value.code == status
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")], ids=repr)
def test_a_lack_of_memory_is_a_message(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert caught.value.code == 2
    assert re.match(
        r"error: memory ran out \((MemoryError|CUDA out of memory\. Tried)\); lower train\.", capsys.readouterr().err
    )


def test_another_error_of_pytorch_is_a_traceback() -> None:
    def main() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run_script(main)


def test_a_script_that_is_done_returns() -> None:
    ran: list[bool] = []
    run_script(lambda: ran.append(True))
    thread = threading.Thread(target=run_script, args=[lambda: ran.append(True)])
    thread.start()
    thread.join()
    assert ran == [True, True]


@pytest.mark.parametrize(("body", "status"), [("print({!r})", 0), ("raise UserError({!r})", 2)])
def test_characters_that_the_encoding_lacks_are_escaped(body: str, status: int) -> None:
    done = run(body.format(TEXT), PYTHONIOENCODING="ascii")
    assert done.returncode == status
    assert r"\u8d1f\u9762 \xe9 \U0001f600" in done.stdout + done.stderr


@no_windows
@pytest.mark.parametrize("lines", [1, 100_000], ids=["at the end", "on the way"])
def test_a_reader_that_closes_the_output_ends_the_script_without_a_message(lines: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(program(f"print('x\\n' * {lines})"), stdout=writer, stderr=subprocess.PIPE, encoding="utf-8")
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@needs_full
@pytest.mark.parametrize("lines", [1, 100_000], ids=["at the end", "on the way"])
def test_a_full_output_is_one_message(lines: int) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            program(f"print('x\\n' * {lines})"), stdout=full, stderr=subprocess.PIPE, encoding="utf-8"
        )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the output: {FULL}; ")
    assert done.stderr.count("\n") == 1


@needs_full
def test_a_message_that_cannot_be_written_does_not_change_the_status() -> None:
    with Path("/dev/full").open("w") as full:
        # Buffered, as users run Python: the interpreter's own last flush must not find the message and end with 120.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        command = program("raise UserError('a')")
        done = subprocess.run(command, stderr=full, stdout=subprocess.PIPE, env=environment)
    assert (done.returncode, done.stdout) == (2, b"")


def test_a_disk_error_is_a_message_with_the_file() -> None:
    done = run("print('begun')\nraise OSError(errno.ENOSPC, 'No space left on device', 'out/a.json')")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: out/a.json: {FULL}; ")


def test_another_error_of_the_system_is_a_traceback() -> None:
    def main() -> None:
        raise OSError(errno.ENODEV, "No such device")

    with pytest.raises(OSError, match="No such device"):
        run_script(main)


# Signals.


@no_windows
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_ends_a_script_and_its_output_is_complete(name: str, status: int) -> None:
    done = run(f"print('printed')\nos.kill(os.getpid(), signal.{name})\nprint('not stopped')")
    assert (done.returncode, done.stdout, done.stderr) == (status, "printed\n", f"stopped by {name}\n")


@no_windows
def test_a_signal_from_outside_ends_a_script_that_waits() -> None:
    process = subprocess.Popen(
        program("print('printed')\nos.write(2, b'begun\\n')\ntime.sleep(60)"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="ascii",
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=50) == ("printed\n", "stopped by SIGTERM\n")
    assert process.returncode == 143


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_script_answers_signals_before_it_imports_anything_else(path: Path) -> None:
    _, first, second, *_ = ast.parse(path.read_text("utf-8")).body
    assert isinstance(first, ast.ImportFrom)
    assert first.module == "minilora.system.cli"
    assert ast.unparse(second) == "if __name__ == '__main__':\n    begin_script()"


# Runs a script, and sends a signal when it begins its N-th import after `minilora.system.cli`.
STRIKE = """
import os, runpy, sys
path, signum, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
class Striking:
    imports = 0
    def find_spec(self, name, *_):
        self.imports += "begin_script" in vars(sys.modules.get("minilora.system.cli", object))
        if self.imports == count:
            os.kill(os.getpid(), signum)
sys.meta_path.insert(0, Striking())
sys.path[0], sys.argv = os.path.dirname(path), [path, "--help"]
runpy.run_path(path, run_name="__main__")
"""


@no_windows
@pytest.mark.parametrize("count", [3, 500])  # the latter in the middle of PyTorch
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_a_script_that_still_imports(name: str, status: int, count: int) -> None:
    command = [sys.executable, "-c", STRIKE, SCRIPTS / "train.py", str(int(getattr(signal, name))), str(count)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", f"\nstopped by {name}\n")


@no_windows
def test_a_signal_that_is_ignored_stays_ignored() -> None:
    body = f"{HEAD}begin_script()\nos.kill(os.getpid(), signal.SIGINT)\n"
    body += "run_script(lambda: os.kill(os.getpid(), signal.SIGINT))\nprint('done')"
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", body]
    done = subprocess.run(command, capture_output=True, encoding="ascii", timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("name", ["preprocess_data", "predict", "evaluate", "merge", "inspect_batch", "plan"])
def test_every_script_that_reads_data_is_told_how(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit):
        load_script(name).main()
    options = {"--text_column", "--encoding", *({"--label_column"} if name != "predict" else set())}
    assert options <= set(capsys.readouterr().out.replace("[", " ").split())
