"""The table of an evaluation stays readable with many classes."""

import numpy as np
import pytest

from minilora.reports.evaluation_table import print_classes
from minilora.reports.report import FEW_CLASSES


def test_of_many_classes_the_worst_and_the_most_confused_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    count = FEW_CLASSES + 3
    confusion = np.diag([5] * (count - 1) + [0])
    confusion[4, 2], confusion[7, 2] = 3, 1
    scores = {"precision": 1.0, "recall": 1.0}
    classes = {
        f"类{index}": {**scores, "f1": 0.5 if index == 4 else 1.0, "support": int(row.sum())}
        for index, row in enumerate(confusion)
    }
    print_classes({"per_class": classes, "confusion_matrix": confusion.tolist()})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("类4: ")
    assert len([line for line in lines if line.endswith("reviews)")]) == FEW_CLASSES
    assert f"of {count} classes" in lines[FEW_CLASSES]
    assert lines[-2:] == ["类4 predicted as 类2: 3 of 8", "类7 predicted as 类2: 1 of 6"]
