"""validation.safetensors keeps what a final adapter says of each validation record, and of which records."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minilora.data.examples import Examples
from minilora.data.records import Record
from minilora.errors import UserError
from minilora.evaluation.score import Scores
from minilora.runs.predictions import PREDICTIONS, prediction_bytes, read_predictions
from tests.runs.conftest import Fit, read

PROBABILITIES = np.array([[0.25, 0.75], [1 / 3, 2 / 3]])


class Store:
    """The arrays of a token store, strided as they are in one."""

    def __init__(self, labels: list[int], lines: list[int]):
        table = np.array(list(zip(labels, lines, strict=True)), dtype=[("label", "<i4"), ("line", "<u4")])
        self.labels, self.lines = table["label"], table["line"]


def split(labels: list[int], lines: list[int]) -> Any:
    return Examples([Record("a", "b") for _ in labels], Store(labels, lines), 8, "error")  # type: ignore[arg-type]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (tmp_path / PREDICTIONS).write_bytes(prediction_bytes(split([1, 0], [4, 9]), "ab", Scores(0.1, PROBABILITIES)))
    found = read_predictions(tmp_path)
    assert found.labels.tolist() == [1, 0]
    assert found.loss == 0.1
    assert np.array_equal(found.probabilities, PROBABILITIES)


@pytest.mark.parametrize("other", [("cd", [4, 9]), ("ab", [4, 8])])
def test_other_records_have_another_hash(tmp_path: Path, other: tuple[str, list[int]]) -> None:
    hashes = []
    for digest, lines in (("ab", [4, 9]), other):
        (tmp_path / PREDICTIONS).write_bytes(prediction_bytes(split([1, 0], lines), digest, Scores(0.1, PROBABILITIES)))
        hashes.append(read_predictions(tmp_path).data)
    assert hashes[0] != hashes[1]


def test_conversations_have_a_loss_and_no_labels(tmp_path: Path) -> None:
    (tmp_path / PREDICTIONS).write_bytes(prediction_bytes(split([-1, -1], [1, 2]), "ab", Scores(0.5, None)))
    found = read_predictions(tmp_path)
    assert (found.loss, found.is_labelled) == (0.5, False)


@pytest.mark.parametrize("content", [None, b"", b"damaged"])
def test_what_cannot_be_read_is_said_with_what_writes_it_anew(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / PREDICTIONS).write_bytes(content)
    with pytest.raises(UserError, match="the same command"):
        read_predictions(tmp_path)


def test_a_run_writes_those_of_its_final_adapter(run: Fit) -> None:
    """The last validation's, where it was the best."""
    final = run(**{"train.metric_for_best_model": "eval_f1", "train.eval_steps": 4})
    found = read_predictions(final.parent.parent)
    assert found.score("f1", 1) == read(final / "metrics.json")["validation"]["eval_f1"]
