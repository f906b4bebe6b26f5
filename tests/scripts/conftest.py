"""Scripts as modules, so that a test calls `main` without a process of its own."""

import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from minilora.system.console import set_quiet

SCRIPTS = Path(__file__).parents[2] / "scripts"
RunMain = Callable[..., "tuple[str, str]"]


def load_script(name: str) -> ModuleType:
    """scripts/{name}.py as a module; nothing of it runs yet."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunMain:
    """A function: a script, arguments of its command line, text for standard input -> standard output and error."""

    def run(script: ModuleType, *arguments: object, stdin: str = "") -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", [str(script.__file__), *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
        capsys.readouterr()
        try:
            script.main()
        finally:
            set_quiet(False)
        return tuple(capsys.readouterr())

    return run
