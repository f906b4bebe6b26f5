"""A package that is there and fails is as good as absent, whatever it raises."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minilora.data.records import read_records
from minilora.errors import UserError
from minilora.system.optional import MissingPackageError, import_optional
from minilora.weights.gguf import check_gguf


def test_a_module_that_can_be_imported_is_returned() -> None:
    assert import_optional("json") is json
    assert import_optional("xml.etree.ElementTree").__name__ == "xml.etree.ElementTree"


def test_an_absent_package_is_named_with_the_command_that_installs_it() -> None:
    with pytest.raises(MissingPackageError, match=r"^no_such_package is not installed; pip install no_such_package$"):
        import_optional("no_such_package.module")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('no home folder')", "RuntimeError: no home folder"),
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("import sys; sys.exit('protobuf')", "SystemExit: protobuf"),
        ("raise KeyError", "KeyError"),
        ("raise ImportError('\\nBuilt for numpy 1.\\nThis is 2.')", "ImportError: Built for numpy 1."),
        ("def", "SyntaxError: invalid syntax"),
    ],
)
def test_whatever_it_raises_becomes_one_line(break_package: Callable[..., None], source: str, reason: str) -> None:
    break_package("fragile", source)
    with pytest.raises(MissingPackageError) as raised:
        import_optional("fragile")
    message = str(raised.value)
    assert message.startswith(f"fragile is installed and fails ({reason}")
    assert message.endswith("; pip install --upgrade fragile")
    assert "\n" not in message


def test_what_a_failing_package_prints_is_not_shown(
    break_package: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    break_package("fragile", "import sys; print('Traceback of numpy', file=sys.stderr); raise ImportError")
    with pytest.raises(MissingPackageError):
        import_optional("fragile")
    assert capsys.readouterr().err == ""


def test_a_signal_during_the_import_is_no_failure_of_the_package(break_package: Callable[..., None]) -> None:
    break_package("fragile", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        import_optional("fragile")
    assert "fragile" not in sys.modules


def test_every_reader_and_writer_names_its_broken_package(break_package: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    break_package("pyarrow", "raise ImportError('libarrow.so')")
    break_package("gguf", "raise ValueError('protobuf')")
    with pytest.raises(UserError, match=r"a\.parquet: .+pyarrow.+libarrow\.so.+pip install"):
        read_records(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"^--gguf: gguf .+ValueError: protobuf.+pip install"):
        check_gguf(tmp_path)
