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


@pytest.mark.parametrize(
    ("kind", "header", "lines"),
    [
        (
            "table",
            "index  label  probability  answered  text",
            ["0  a           0.7500  yes       x", "1              0.6000  no        y"],
        ),
        (
            "csv",
            '"index","text","label","probability","answered","probability_a"',
            ['0,"x","a",0.75,"yes"', '1,"y","",0.6,"no"'],
        ),
        (
            "jsonl",
            "",
            [
                '"label": "a", "probability": 0.75, "answered": true',
                '"label": "", "probability": 0.6, "answered": false',
            ],
        ),
    ],
)
def test_a_prediction_below_the_least_probability_has_no_label_and_says_so(
    kind: str, header: str, lines: list[str]
) -> None:
    predictions = [
        Prediction(0, "x", {"a": 0.75, "b": 0.25}, min_probability=0.75),
        Prediction(1, "y", {"a": 0.4, "b": 0.6}, {"answered": "maybe"}, min_probability=0.75),
    ]
    records = [Record("f:1", "x", other={"answered": "maybe"}), Record("f:2", "y", other={"answered": "maybe"})]
    rendered = Renderer(kind, ("a", "b"), says_answered=True).render(records, predictions).splitlines()
    for found, expected in zip(rendered, [header, *lines] if header else lines, strict=True):
        assert expected in found
    if kind == "jsonl":
        assert '"input_answered": "maybe"' in rendered[1]
    other = Renderer(kind, ("a", "b")).render([Record("f:1", "x")], [Prediction(0, "x", {"a": 0.75, "b": 0.25})])
    assert "answered" not in other
