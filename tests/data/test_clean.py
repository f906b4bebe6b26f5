"""No record is dropped without a count, and none is on both sides of a split."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.data.clean import PLAIN, first_of_equal, normalized
from minilora.data.records import read_records
from tests.data import reference
from tests.data.arrays import clean_records, find_leaks, records_of, split_records


def test_normalised_text_ignores_width_space_and_punctuation() -> None:
    assert normalized("Ａ b，好 ！_\u200b\n") == normalized("Ab好") == "Ab好"


def test_every_character_is_ignored_or_kept_as_the_definition_says() -> None:
    characters = "".join(map(chr, range(sys.maxunicode + 1)))
    plain = [character for character in characters if PLAIN.fullmatch(character)]
    assert len(plain) > 20_000
    for text in [*plain, *(characters[start : start + 256] for start in range(0, len(characters), 256))]:
        assert normalized(text) == reference.normalized(text), f"U+{ord(text[0]):04X}"


@settings(deadline=None)
@given(st.text("好a1，。！？、；：“”‘’（）《》【】…— \u3000\u0301é한ᄒ①Ａ🙂\U000e0001", max_size=12))
def test_texts_of_several_scripts_are_normalised_as_the_definition_says(text: str) -> None:
    assert normalized(text) == reference.normalized(text)


def test_keys_that_agree_in_one_half_are_two_keys() -> None:
    halves = {"high": np.array([7, 7, 1, 7, 1, 0]), "low": np.array([1, 2, 7, 1, 2, 0])}
    assert first_of_equal(halves.__getitem__).tolist() == [0, 1, 2, 0, 4, 5]
    assert first_of_equal(lambda half: halves[half][:0]).tolist() == []


def test_symbols_tell_reviews_apart() -> None:
    clean, dropped = clean_records({"a": records_of(("很好👍", 1), ("很好👎", 0), ("👍", 1))})
    assert len(clean["a"]) == 3
    assert dropped == {"empty": 0, "contradictory": 0, "duplicate": 0}


def test_each_cause_is_counted() -> None:
    files = {
        "a": records_of((" 好 ", 1), ("  ", 1), ("！！", 0), ("矛盾", 1)),
        "b": records_of(("好！", 1), ("矛盾。", 0)),
    }
    clean, dropped = clean_records(files)
    assert [record.text for record in clean["a"] + clean["b"]] == [" 好 "]
    assert dropped == {"empty": 2, "contradictory": 2, "duplicate": 1}


def test_a_review_with_two_labels_is_dropped_wherever_it_is() -> None:
    files = {"a": records_of(("矛盾", 1), ("矛盾！", 1), ("好", 1)), "b": records_of(("矛盾", 0), ("差", 0))}
    for across_files in (True, False):
        clean, dropped = clean_records(files, across_files)
        assert [record.text for part in clean.values() for record in part] == ["好", "差"]
        assert dropped == {"empty": 0, "contradictory": 3, "duplicate": 0}


def test_kept_splits_keep_what_is_in_another_file() -> None:
    files = {"a": records_of(("好", 1), ("好。", 1)), "b": records_of(("好", 1))}
    clean, dropped = clean_records(files, across_files=False)
    assert [len(part) for part in clean.values()] == [1, 1]
    assert dropped["duplicate"] == 1


def test_one_label_as_text_and_as_a_number_is_no_contradiction(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"label": 1, "text": "好"}\n', "utf-8")
    (tmp_path / "a.tsv").write_text("label\ttext\n1\t好\n", "utf-8")
    files = {
        "tsv": read_records(tmp_path / "a.tsv"),
        "jsonl": read_records(tmp_path / "a.jsonl"),
    }
    assert clean_records(files)[1] == {"empty": 0, "contradictory": 0, "duplicate": 1}


@settings(deadline=None)
@given(st.lists(st.tuples(st.text("好差a ，。", max_size=4), st.integers(0, 1)), max_size=30))
def test_records_in_equal_records_out_and_records_dropped(pairs: list[tuple[str, int]]) -> None:
    files = {"a": records_of(*pairs[::2]), "b": records_of(*pairs[1::2])}
    clean, dropped = clean_records(files)
    kept = [record for records in clean.values() for record in records]
    assert len(kept) + sum(dropped.values()) == len(pairs)
    assert len({normalized(record.content) for record in kept}) == len(kept)


def test_splits_are_8_1_1_stratified_disjoint_and_deterministic() -> None:
    records = records_of(*((f"评论{number}", int(number % 4 == 0)) for number in range(400)))
    splits = split_records(records, 42)
    assert {name: len(part) for name, part in splits.items()} == {"train": 320, "validation": 40, "test": 40}
    assert all(Counter(record.label for record in part)[1] * 4 == len(part) for part in splits.values())
    texts = [record.text for part in splits.values() for record in part]
    assert len(set(texts)) == 400
    assert split_records(records, 42) == splits
    assert split_records(records, 43) != splits


@settings(deadline=None)
@given(st.integers(3, 60), st.integers(3, 60), st.integers())
def test_every_label_is_split_in_the_same_proportion(zeros: int, ones: int, seed: int) -> None:
    records = records_of(*((f"评论{number}", int(number < ones)) for number in range(zeros + ones)))
    splits = {name: Counter(record.label for record in part) for name, part in split_records(records, seed).items()}
    for label, count in ((0, zeros), (1, ones)):
        tenth = max(1, round(count / 10))
        assert [splits[name][label] for name in ("train", "validation", "test")] == [count - 2 * tenth, tenth, tenth]


@settings(deadline=None)
@given(st.lists(st.tuples(st.text("好差很 ，。", min_size=1, max_size=5), st.integers(0, 1)), min_size=1, max_size=80))
def test_splits_share_no_text_and_lose_no_record(pairs: list[tuple[str, int]]) -> None:
    clean, _ = clean_records({"a": records_of(*pairs)})
    splits = split_records(clean["a"], 42)
    assert Counter(record for part in splits.values() for record in part) == Counter(clean["a"])
    texts = {name: {normalized(record.content) for record in part} for name, part in splits.items()}
    assert sum(map(len, texts.values())) == len(set().union(*texts.values()))


@settings(deadline=None)
@given(st.permutations(["a", "b", "c"]))
def test_no_order_of_the_files_makes_them_leak(order: list[str]) -> None:
    files = {
        name: records_of(*((f"{'，' * index}评论{n}", n % 2) for n in range(30))) for index, name in enumerate("abc")
    }
    clean, dropped = clean_records({name: files[name] for name in order})
    assert [len(clean[name]) for name in order] == [30, 0, 0]
    assert dropped["duplicate"] == 60
    splits = split_records(clean[order[0]], 42)
    assert not find_leaks(splits["train"], [*splits["validation"], *splits["test"]])


def test_empty_texts_do_not_leak_into_each_other() -> None:
    train = records_of(("！", 1), ("好", 1))
    assert find_leaks(train, records_of(("。", 0), ("好。", 1))) == train[1:]
