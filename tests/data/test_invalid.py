"""However many records cannot be used, and for whatever reasons, the message stays short and its counts are right."""

import pytest

from minilora.data.invalid import SHOWN_KINDS, InvalidRecords
from minilora.errors import UserError


def test_messages_that_differ_in_figures_are_one_kind_and_places_are_few() -> None:
    invalid = InvalidRecords()
    invalid.are_all = False
    for n in range(2, 2002):
        invalid.add(f"data/a.csv:{n}", UserError(f"data/a.csv:{n}: {n} fields, expected 2; correct the line"))
    shown = "also a.csv:3, a.csv:4, a.csv:5, a.csv:6, ..."
    assert invalid.lines() == [
        f"data/a.csv:2: 2 fields, expected 2; correct the line (2,000 such records, {shown})",
        "  --drop_invalid of preprocess_data.py drops the 2,000 records that cannot be used",
    ]


def test_of_many_kinds_the_last_are_counted_together() -> None:
    invalid = InvalidRecords()
    for n in range(500):
        invalid.add(f"a:{n}", UserError(f"a:{n}: label is {'x' * n}"))
    assert len(invalid.lines()) == SHOWN_KINDS + 1
    assert invalid.lines()[-1].startswith(f"a:{SHOWN_KINDS}: the first of other invalid records (490 such records, ")


def test_a_file_without_a_record_that_can_be_used_is_given_up_after_a_thousand() -> None:
    def add(invalid: InvalidRecords, count: int) -> InvalidRecords:
        for n in range(count):
            invalid.add(f"a:{n}", UserError(f"a:{n}: is bad"))
        return invalid

    with pytest.raises(UserError, match="none of the first 1,000 records can be used:\na:0: is bad"):
        add(InvalidRecords(gives_up=True), 1000)
    assert add(InvalidRecords(gives_up=True), 999).count == 999
    has_valid = InvalidRecords(gives_up=True)
    has_valid.are_all = False
    assert add(has_valid, 2000).count == 2000
