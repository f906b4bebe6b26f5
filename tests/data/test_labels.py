"""A label is the class that its file means, or it is refused."""

import json
import re
import shlex
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from minilora.data.labels import (
    alike_note,
    as_label,
    check_label_map,
    class_indices,
    index_note,
    mapped,
    missing_classes,
    read_label_map,
)
from minilora.data.records import ReadOptions, read_records
from minilora.errors import UserError
from minilora.system.cli import add_reading_options

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
    with pytest.raises(UserError, match=r"--map_labels of preprocess_data\.py or .*prompt\.labels$"):
        class_indices([("a.csv:2", f"word {number}") for number in range(21)], WORDS)


STARS = ("很差", "差", "一般", "好", "很好")


@pytest.mark.parametrize(
    ("found", "words", "option"),
    [
        (["negative", "positive"], WORDS, "negative=负面,positive=正面"),
        (["正面", "Neg", "POS"], WORDS, "Neg=负面,POS=正面"),
        (["差评", "好评"], ("negative", "positive"), "好评=positive,差评=negative"),
        ([1, 2], WORDS, "1=负面,2=正面"),
        ([3, 1, 5, 4, 2], STARS, "1=很差,2=差,3=一般,4=好,5=很好"),
        (["０", "１"], WORDS, "０=负面,１=正面"),
        ([1, -1], WORDS, "=-1=负面,1=正面"),  # with "=", because argparse takes -1 for an option
        (["postive"], ("negative", "positive"), "postive=positive"),
        (["体育", "正面"], WORDS, "体育=..."),
        (["体育,娱乐"], WORDS, """'{"体育,娱乐": "..."}'"""),
    ],
)
def test_the_message_offers_the_mapping_that_is_likely_meant(
    found: list[str | int], words: tuple[str, ...], option: str
) -> None:
    with pytest.raises(UserError) as caught:
        class_indices([("a.csv:2", label) for label in found], words, is_trained=True)
    assert str(caught.value).endswith(f": --map_labels{'' if option[0] == '=' else ' '}{option}")
    assert "prompt.labels" not in str(caught.value)  # the adapter would be asked for words that it never learned
    if "..." not in option:  # and it is what --map_labels takes
        meant = read_label_map(option.removeprefix("="))
        indices = class_indices([("a.csv:2", mapped(label, meant)) for label in found], words, is_trained=True)
        assert len(set(indices)) == len({meant.get(str(label), label) for label in found})


@pytest.mark.parametrize(
    "text",
    [
        "negative=负面,1=正面",
        "negative＝负面，1＝正面",
        " negative = 负面 , 1 = 正面 ",
        '{"negative": "负面", "1": "正面"}',
    ],
)
def test_a_mapping_is_read_as_it_is_typed(text: str) -> None:
    meant = read_label_map(text)
    assert meant == {"negative": "负面", "1": "正面"}
    assert [mapped(found, meant) for found in ("negative", " 1 ", 1, 1.0, "other", 0)] == [
        *("负面", "正面", "正面", "正面", "other", 0)
    ]


@pytest.mark.parametrize("text", ["negative", "a=b=c", "a=", "=b", '{"a": [1]}', '{"a"', "a=b,", "1=x,1=y"])
def test_what_is_no_mapping_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^--map_labels: got "):
        read_label_map(text)


def test_a_mapping_is_for_capital_letters_too_and_knows_indices() -> None:
    meant = read_label_map('{"negative": 0, "POS": "1"}')
    assert [mapped(found, meant) for found in ("Negative", "NEGATIVE", "POS", "pos")] == [0, 0, 1, "pos"]


def test_what_a_message_leaves_open_is_not_taken_for_a_word() -> None:
    with pytest.raises(UserError, match=r"^--map_labels: .*write the word that is meant in place of \.\.\."):
        read_label_map("negative=负面,体育=...")


def test_words_that_an_adapter_does_not_answer_with_are_refused() -> None:
    check_label_map(read_label_map("a=负面,b=1"), WORDS)
    with pytest.raises(UserError, match=r"^--map_labels: got b=pos, expected one of \['负面', '正面'\]"):
        check_label_map(read_label_map("a=负面,b=pos"), WORDS)


def test_texts_that_are_taken_for_labels_are_not_printed() -> None:
    with pytest.raises(UserError, match=r"name the label's column with --label_column") as refused:
        class_indices([("a.csv:2", "房间很干净" * 1000), ("a.csv:3", 1)], WORDS, is_trained=True)
    assert len(str(refused.value)) < 400


def given(*options: str) -> ReadOptions:
    parser = ArgumentParser()
    add_reading_options(parser, "--data")
    return ReadOptions.given(parser.parse_args(options), {})


def test_mappings_add_up() -> None:
    assert given("--map_labels", "a=x", "--map_labels", "b=y").map_labels == {"a": "x", "b": "y"}


def test_one_column_is_not_both_text_and_label() -> None:
    with pytest.raises(UserError, match=r"^--label_column: got 'text', as --text_column did"):
        given("--text_column", "text", "--label_column", "text")


@pytest.mark.parametrize(("option", "is_said"), [("a=正面", True), ("0=正面", False), ("a=正面,1=负面", False)])
def test_a_mapping_that_no_label_has_is_said(
    option: str, is_said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "好", "label": 1}\n{"text": "差", "label": 0}\n', "utf-8")
    read_records(path, given("--map_labels", option))
    assert ("--map_labels: no label there is a" in capsys.readouterr().err) == is_said


def test_labels_that_differ_in_spelling_only_are_named_with_what_makes_them_one() -> None:
    note = alike_note(["Positive", "positive", "负面", "负 面", "1", "１", "2"])
    assert note is not None
    (option,) = re.findall(r"if one is meant: --map_labels (.*)$", note)
    meant = read_label_map(shlex.split(option)[0])
    assert [mapped(label, meant) for label in ("Positive", "positive", "负面", "负 面", "1", "１")] == [
        *("Positive", "Positive", "负 面", "负 面", 1, 1)
    ]
    assert alike_note(["positive", "negative", "好" * 99, "好" * 99 + " "]) is None


def test_values_that_are_no_labels_by_themselves_can_be_mapped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "好", "label": true}\n{"text": "差", "label": 2.5}\n', "utf-8")
    records = read_records(path, ReadOptions(map_labels={"true": "正面", "2.5": "负面"}))
    assert [record.label for record in records] == ["正面", "负面"]
    with pytest.raises(UserError, match=r"a\.jsonl:1: label is True, .*--map_labels"):
        read_records(path)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_indices_with_names_in_the_files_own_metadata_are_these_names(kind: str, tmp_path: Path) -> None:
    """As `datasets.Dataset.to_parquet` and `save_to_disk` write them; -1 is their missing label."""
    other = {"text": {"dtype": "string", "_type": "Value"}, "list": [{"dtype": "int8"}], "struct": {"a": {}}}
    features = {**other, "label": {"names": [*"正负"], "_type": "ClassLabel"}}
    table = pyarrow.table({"text": ["好", "差", "?"], "label": [0, 1, -1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    records = read_records(path)
    assert [record.label for record in records] == ["正", "负", -1]
    # By name, and not by position, as the words are in another order.
    assert class_indices([(record.where, record.label or 0) for record in records[:2]], ("负", "正")) == [1, 0]


@pytest.mark.parametrize("metadata", [{}, {"huggingface": "no JSON"}, {"huggingface": '{"info": null}'}])
def test_metadata_of_another_kind_is_not_read(metadata: dict[str, str], tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["好"], "label": [1]}).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [record.label for record in read_records(tmp_path / "a.parquet")] == [1]


@pytest.mark.parametrize(
    ("found", "words", "note"),
    [
        ([0, 1, "正面"], WORDS, "labels 0, 1 are read as indices: 0 = 负面, 1 = 正面"),
        (
            [1, 2],
            ("a", "b", "c"),
            "labels 1, 2 are read as indices: 1 = b, 2 = c; if they begin at 1 there: --map_labels 1=a,2=b",
        ),
        ([1, "负面"], WORDS, "labels 1 are read as indices: 1 = 正面"),  # one label alone begins nothing
        (["正面"], WORDS, None),
        ([1, 2], ("1", "2"), None),
    ],
)
def test_indices_are_said_to_be_read_as_such(found: list[Any], words: tuple[str, ...], note: str | None) -> None:
    assert index_note(found, words) == note


def test_classes_without_an_example_are_named() -> None:
    assert missing_classes([0, 1, 1], WORDS) is None
    assert missing_classes([1] * 1200, WORDS) == (
        "none of 1,200 examples is 负面: nothing is learned or measured of it there"
    )
    assert str(missing_classes([3], STARS)).startswith("none of 1 examples is 很差 or 差 or 一般 or 很好: ")
