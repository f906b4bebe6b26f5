"""The parts of a page on what a model said: confusion matrix, calibration, worst mistakes."""

import re

import numpy as np
import pytest

from minilora.data.records import Record
from minilora.evaluation.metrics import classification_metrics
from minilora.reports import plots
from minilora.reports.answers import CLIPPED_AT, MOST_MISTAKES, ScoredExamples, iter_answer_parts

NAMES = ("负面", "<正面>")


def parts(texts: list[str], labels: list[int], positive: list[float]) -> dict[str, str]:
    """The parts for reviews whose probability of the second label is `positive`."""
    rows = [Record(f"test.jsonl:{number}", text) for number, text in enumerate(texts, start=1)]
    probabilities = np.array([[1 - p, p] for p in positive])
    metrics = classification_metrics(np.array(labels), probabilities, NAMES, 1)
    return dict(iter_answer_parts(ScoredExamples(rows, np.array(labels), probabilities, NAMES), metrics))


def test_the_confusion_matrix_has_labels_down_and_answers_across_shaded_by_the_share_of_the_row() -> None:
    text = parts(["a"] * 5, [0, 0, 0, 1, 1], [0.1, 0.2, 0.7, 0.9, 0.8])["Classes"]
    row = re.search(r'<th scope="row">负面</th>(.+?)</tr>', text)
    assert row is not None
    assert re.findall(r"--share: ([\d.]+)\">(\d+)<", row[1]) == [("0.667", "2"), ("0.333", "1")]
    assert '<th scope="col">&lt;正面&gt;</th>' in text
    assert '<th scope="row">&lt;正面&gt;</th><td>0.6667</td><td>1.0000</td><td>0.8000</td><td>2</td>' in text


def test_a_class_that_never_occurs_has_no_share() -> None:
    text = parts(["a"], [0], [0.1])["Classes"]
    assert text.count("--share: 0.000") == 3


def test_calibration_says_how_many_reviews_each_bin_has() -> None:
    pytest.importorskip("matplotlib")
    # confidences 0.9 (right), 0.9 (wrong) and 0.6 (right): bins 14 and 9 of 15
    text = parts(["a"] * 3, [1, 0, 0], [0.9, 0.9, 0.4])["Calibration"]
    # |1 - 1.8| and |1 - 0.6| of 3 reviews: 0.4
    assert "Expected calibration error 0.4000:" in text
    assert '<th scope="row">0.533 to 0.600</th><td>1</td><td>0.600</td><td>1.000</td>' in text
    assert '<th scope="row">0.867 to 0.933</th><td>2</td><td>0.900</td><td>0.500</td>' in text
    assert "<svg" in text


def test_without_matplotlib_calibration_is_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "is_available", lambda: False)
    text = parts(["a"], [0], [0.1])["Calibration"]
    assert "<svg" not in text
    assert "<td>1</td>" in text


def test_the_worst_mistakes_are_the_surest_wrong_answers_and_right_ones_are_no_mistakes() -> None:
    text = parts(["right", "unsure", "<script>alert(1)</script>"], [1, 0, 0], [0.99, 0.6, 0.9])["Worst mistakes"]
    assert "2 of 3 reviews are answered wrong; the surest first." in text
    assert "right</p>" not in text
    assert "<script" not in text
    assert text.index("&lt;script&gt;alert(1)&lt;/script&gt;") < text.index("unsure")
    assert "label <b>负面</b></span><span>answer <b>&lt;正面&gt;</b></span><span>probability <b>0.9000</b>" in text
    assert '<p class="place">test.jsonl:3</p>' in text


def test_of_many_mistakes_the_surest_are_shown_the_first_of_equals_first() -> None:
    count = MOST_MISTAKES + 3
    text = parts([f"[{n}]" for n in range(count)], [0] * count, [0.9] * (count - 1) + [0.95])["Worst mistakes"]
    assert f"{count} of {count} reviews are answered wrong; the {MOST_MISTAKES} that the model was most sure" in text
    assert re.findall(r"\[(\d+)\]", text) == [str(n) for n in (count - 1, *range(MOST_MISTAKES - 1))]


def test_where_nothing_is_wrong_there_are_no_mistakes() -> None:
    assert parts(["a"], [0], [0.1])["Worst mistakes"] == "<p>None: all 1 reviews are answered right.</p>"


def test_a_long_review_is_clipped_and_opens() -> None:
    whole = "好" * CLIPPED_AT
    short, long = (parts([text], [0], [0.9])["Worst mistakes"] for text in (whole, whole + "！"))
    assert "<details>" not in short
    assert f'<p class="review" dir="auto">{whole}</p>' in short
    assert f"{whole}… </span><small>all {CLIPPED_AT + 1} characters</small></summary>" in long
    assert f'<p class="review" dir="auto">{whole}！</p></details>' in long
