"""A label is the class that its file means, or it is refused."""

import pytest

from minilora.data.labels import as_label, class_indices
from minilora.errors import UserError

WORDS = ("负面", "正面")


@pytest.mark.parametrize(
    ("words", "found", "index"),
    [
        (WORDS, "正面", 1),
        (WORDS, 1, 1),
        (WORDS, "0", 0),
        (("1", "0"), "0", 1),
        (("1", "0"), 1, 0),
        (("1", "2", "3", "4", "5"), "5", 4),
        (("1", "2", "3", "4", "5"), 1, 0),
        (("01", "02"), "02", 1),
        (("-1", "1"), -1, 0),
    ],
)
def test_a_label_is_its_word_and_else_an_index(words: tuple[str, ...], found: str | int, index: int) -> None:
    assert class_indices([("a.tsv:2", as_label(found))], words) == [index]


@pytest.mark.parametrize(
    ("words", "found", "message"),
    [
        (WORDS, "postive", r"label 'postive' .*\['负面', '正面'\] nor an index 0 to 1;.*prompt\.labels"),
        (WORDS, 2, r"label 2 .*\['负面', '正面'\] nor an index 0 to 1;.*prompt\.labels"),
        (("1", "2", "3"), 0, r"label 0 .*\['1', '2', '3'\];.*prompt\.labels"),
    ],
)
def test_a_label_that_is_neither_word_nor_index_is_refused(
    words: tuple[str, ...], found: str | int, message: str
) -> None:
    with pytest.raises(UserError, match=rf"a\.tsv:2: {message}"):
        class_indices([("a.tsv:2", found)], words)


def test_a_file_of_other_labels_is_answered_with_the_key_that_takes_them() -> None:
    found = [(f"a.csv:{line}", label) for line, label in enumerate((5, 1, 10, "无", 5), start=2)]
    words = r"\[\"1\", \"5\", \"10\", \"无\"\]"
    with pytest.raises(UserError, match=rf"a\.csv:2: label 5 .*; all labels there: prompt\.labels='{words}'$"):
        class_indices(found, WORDS)
    with pytest.raises(UserError, match=r"prompt\.labels$"):
        class_indices([("a.csv:2", f"word {number}") for number in range(21)], WORDS)
