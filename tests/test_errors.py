"""A script ends with a message and a status, and its output arrives whatever reads it."""

import json
import os
import subprocess
import sys

import pytest

from minilora.errors import UserError, run_script

TEXT = "负面 é 😀"


def run(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`body` as the main of a script, in a process of its own; what it printed is read as ASCII."""
    lines = "\n    ".join(["def main():", *body.splitlines()])
    code = f"import json\nfrom minilora.errors import UserError, run_script\n{lines}\nrun_script(main)\n"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="ascii", env={**os.environ, **environment}
    )


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("a.tsv: is empty; add rows"), 2, "error: a.tsv: is empty; add rows\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
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
    assert message in capsys.readouterr().err


def test_text_that_the_terminal_cannot_show_is_escaped_and_json_stays_json() -> None:
    done = run(f"print(json.dumps({TEXT!r}, ensure_ascii=False))", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == TEXT


def test_a_message_that_the_terminal_cannot_show_is_escaped() -> None:
    done = run(f"raise UserError({TEXT!r})", PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert done.stderr.startswith(r"error: \u8d1f\u9762")


@pytest.mark.parametrize("lines", [1, 100_000], ids=["at the end", "on the way"])
@pytest.mark.skipif(os.name == "nt", reason="no SIGPIPE's status on Windows")
def test_a_reader_that_goes_ends_the_script_without_a_word(lines: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = f"from minilora.errors import run_script\nrun_script(lambda: print('x\\n' * {lines}))"
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, encoding="utf-8")
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
