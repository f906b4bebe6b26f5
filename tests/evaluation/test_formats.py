"""A table's lines fit the terminal; the other formats are tested with scripts/predict.py."""

import pytest

from minilora.data.records import Record
from minilora.evaluation.formats import Renderer, columns
from minilora.evaluation.predict import Prediction


@pytest.mark.parametrize("text", ["short", "短", "中文" * 30, "latin " * 30, "é" * 100, "长" * 200_000])
def test_a_tables_line_fits_the_terminal(text: str) -> None:
    prediction = Prediction(0, text, {"a": 0.75, "一二": 0.25})
    rendered = Renderer("table", ("a", "一二"), 60).render([Record("a:1", text)], [prediction])
    line = rendered.partition("\n")[2]
    assert columns(line.rstrip("\n")) <= 60
    assert line.count("\n") == 1
    assert line.endswith("…\n") == (columns(text) > 30)
