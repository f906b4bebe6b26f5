"""Predictions in, text out: a table for a terminal, JSONL or CSV."""

import csv
import io
import itertools
import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from minilora.data.records import Record
from minilora.evaluation.predict import Prediction


class Renderer:
    """Predictions as text: a table, JSONL or CSV, with the input's other columns behind the results.

    A table's line fits into `width` columns of a terminal. CSV has the columns of the first record. Where labels are
    given only from some probability on, `says_answered` adds a column that says whether one is.
    """

    def __init__(self, kind: str, labels: Sequence[str], width: int | None = None, says_answered: bool = False):
        self._kind = kind
        self._labels = labels
        self._width = width
        self._answered = ["answered"] if says_answered else []
        self._other: dict[str, str] | None = None  # CSV's columns beside the results, by the input's names

    def render(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> str:
        """The lines of a window's predictions, the first time after a header."""
        header = "" if self._other is not None else self._begin(records[0].other or {} if records else {})
        return header + "".join(map(self._line, predictions))

    def _begin(self, first: Mapping[str, Any]) -> str:
        self._other = self._names(first)
        if self._kind == "table":
            answered = "".join(f"{name}  " for name in self._answered)
            return f"{'index':>7}  {padded('label', column_width(self._labels))}  probability  {answered}text\n"
        if self._kind == "csv":
            scores = (f"probability_{label}" for label in self._labels)
            begin = ["index", "text", "label", "probability", *self._answered]
            return csv_line([*begin, *scores, *self._other.values()])
        return ""

    def _names(self, other: Mapping[str, Any]) -> dict[str, str]:
        """What the input's columns are called in the output: input_label, because `label` is the predicted one."""
        taken = {"index", "text", "label", "probability", "probabilities", *self._answered}
        taken |= {f"probability_{label}" for label in self._labels}
        names: dict[str, str] = {}
        for name in filter(None, other):
            names[name] = name
            while names[name] in taken:
                names[name] = f"input_{names[name]}"
            taken.add(names[name])
        return names

    def _line(self, prediction: Prediction) -> str:
        found, scores, other = prediction, prediction.probabilities, prediction.other or {}
        answered = ["yes" if found.is_answered else "no" for _ in self._answered]
        if self._kind == "csv":
            carried = [as_csv(other.get(name)) for name in self._other or {}]
            results = [found.index, found.text, found.label, found.probability, *answered]
            return csv_line([*results, *scores.values(), *carried])
        if self._kind == "jsonl":
            line = {"index": found.index, "text": found.text, "label": found.label, "probability": found.probability}
            line |= dict.fromkeys(self._answered, found.is_answered)
            line["probabilities"] = scores
            line |= {given: other[name] for name, given in self._names(other).items()}
            return json.dumps(line, ensure_ascii=False, default=str) + "\n"
        label = padded(found.label, column_width(list(scores)))
        begin = f"{found.index:7}  {label}  {found.probability:11.4f}  " + "".join(f"{word:8}  " for word in answered)
        return begin + fitted(found.text, None if self._width is None else self._width - columns(begin)) + "\n"


def as_csv(value: Any) -> Any:
    """A value of another column: text and numbers as they are, the rest as JSON."""
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else value


def csv_line(values: Sequence[object]) -> str:
    """A line of CSV; text is always quoted, so that a carriage return in it does no harm."""
    line = io.StringIO()
    csv.writer(line, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n").writerow(values)
    return line.getvalue()


def column_width(labels: Sequence[str]) -> int:
    """Columns of the table's labels."""
    return max(map(columns, [*labels, "label"]))


def columns(text: str) -> int:
    """Columns that a text takes on a terminal: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else unicodedata.combining(c) == 0 for c in text)


def padded(text: str, width: int) -> str:
    """The text, padded with spaces to `width` columns."""
    return text + " " * (width - columns(text))


def fitted(text: str, width: int | None) -> str:
    """The text on one line, cut to `width` columns, and without characters that would move a terminal's cursor."""
    text = "".join(c if c.isprintable() else " " for c in text)
    if width is None or columns(text) <= width:
        return text
    widths = itertools.accumulate(map(columns, text))
    return text[: sum(1 for _ in itertools.takewhile(lambda taken: taken < width, widths))] + "…"
