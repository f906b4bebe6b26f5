"""A chart that cannot be drawn costs no measurement."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def broken_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stub" / "matplotlib").mkdir(parents=True)
    (tmp_path / "stub" / "matplotlib" / "__init__.py").write_text("raise RuntimeError('numpy has another ABI')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "stub"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_the_comparison_is_written_without_its_chart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.jsonl"
    row: dict[str, Any] = {"tokens_per_s": 1.0, "train_peak_bytes": 1}
    load("compare_peft").write_results({"contestants": {"minilora": row}}, path)
    assert json.loads(path.read_text())["contestants"] == {"minilora": row}
    assert (
        "no chart: matplotlib is installed and fails (RuntimeError: numpy has another ABI)" in capsys.readouterr().out
    )


def test_the_scaling_table_ends_without_its_chart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("scaling").plot({"batch": [{"batch": 1, "ms_per_token": 1.0, "peak_bytes": 1}]}, tmp_path)
    assert "no scaling.png: matplotlib is installed and fails (RuntimeError" in capsys.readouterr().out
