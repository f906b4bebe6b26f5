"""Every kind of file gives the same fields, with their file and line."""

import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from minilora.data.readers import data_files, iter_fields, split_folders
from minilora.data.records import Record, iter_texts, read_records
from minilora.data.split_files import split_of
from minilora.errors import UserError
from tests.data.conftest import write

RECORDS = [(1, '很好，"推荐"'), (0, "差")]


@pytest.mark.parametrize(
    "kind",
    [
        "tsv",
        "TSV",
        "tsv-bom-crlf",
        "tsv-quoted",
        "csv-semicolon",
        "csv-sep",
        "csv-tab",
        "csv-bar",
        "tsv-comma",
        "tsv-sep",
        "json",
        "json-lines",
        "csv",
        "csv-bom-crlf",
        "jsonl",
        "jsonl-bom-crlf",
        "parquet",
        "arrow",
        "arrow-file",
    ],
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
            "tsv-quoted": 'label\ttext\n1\t"很好，""推荐"""\n0\t差\n',
            "csv-semicolon": 'label;text\n1;"很好，""推荐"""\n0;差\n',
            "csv-sep": 'sep=;\r\nlabel;text\r\n1;"很好，""推荐"""\r\n0;差\r\n',
            "csv-tab": '\nlabel\ttext\n1\t"很好，""推荐"""\n0\t差\n',
            "csv-bar": 'label|text\n1|"很好，""推荐"""\n0|差\n',
            "tsv-comma": 'label,text\n1,"很好，""推荐"""\n0,差\n',
            "tsv-sep": 'sep=;\nlabel;text\n1;"很好，""推荐"""\n0;差\n',
            "json": ' [{"label": 1, "text": "很好，\\"推荐\\""},\n {"label": "0", "text": "差"}]\n',
            "json-lines": '{"label": 1, "text": "很好，\\"推荐\\""}\n{\n"label": "0", "text": "差"\n}\n',
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


def test_a_quoted_csv_field_may_hold_newlines_and_commas(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'label,text\n1,"一,\n二"\n0,三\n')
    records = read_records(path)
    assert [record.text for record in records] == ["一,\n二", "三"]
    assert [record.where for record in records] == [f"{path}:2", f"{path}:4"]


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


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_without_pyarrow_its_files_ask_for_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=rf"{name}: cannot be read: pyarrow is not installed; pip install pyarrow"):
        read_records(tmp_path / name)


def test_without_pyarrow_text_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert len(read_records(write(tmp_path / "a.tsv", "label\ttext\n1\t好\n"))) == 1


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


def test_a_parquet_file_of_several_batches_keeps_its_order(tmp_path: Path) -> None:
    texts = [str(number) for number in range(2500)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=700)
    records = list(iter_texts(tmp_path / "a.parquet"))
    assert [record.text for record in records] == texts
    assert records[-1].where == f"{tmp_path / 'a.parquet'}:2500"


@pytest.mark.parametrize(
    ("content", "is_quoted"),
    [
        ('1\t"他说""好"""\n', True),
        ('1\t"一\t二"\n', True),
        ('1\t"一\n二"\n', True),
        ('1\t"好"\n', False),  # a review in quotes
        ('1\t""\n', False),
        ('1\t"从前\n0\t后来\n1\t完"\n', False),  # three reviews
        ('1\t"他说""好"""\n0\t样子"不错"\n', False),
        ('1\t"他说""好"""\n0\t"从前\n', False),
        ('1\t"他说""好"""\n0\t"从前\n1\t完"\n', False),
    ],
)
def test_a_tsv_is_quoted_where_only_a_csv_writer_writes_so(content: str, is_quoted: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", f"label\ttext\n{content}0\t差\n")
    texts = [fields["text"] for _, fields in iter_fields(path, "utf-8")]
    raw = [line.partition("\t")[2] for line in content.splitlines()]
    assert (texts[:-1] == raw) != is_quoted
    assert texts[-1] == "差"


def test_a_tsv_whose_header_is_quoted_is_quoted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", '"label"\t"text"\n"1"\t"好"\n')
    assert read_records(path) == [Record(f"{path}:2", "好", 1)]


def test_a_line_that_is_cut_is_no_sign_of_another_kind_of_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "好", "label": 1}\n{\n[\n{"text": "差", "label": 0}\n')
    errors: list[str] = []
    assert len(list(iter_fields(path, "utf-8", lambda _, error: errors.append(str(error))))) == 2
    assert len(errors) == 2
    assert all(error.endswith("; correct the line") for error in errors)


def test_semicolons_and_tabs_within_a_comma_csv_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'label,text,"a;b"\n1,"好;坏\t",x\n')
    assert [fields for _, fields in iter_fields(path, "utf-8")] == [{"label": "1", "text": "好;坏\t", "a;b": "x"}]
    both = write(tmp_path / "b.csv", "label;x,text\n1;2,好\n")
    assert [fields for _, fields in iter_fields(both, "utf-8")] == [{"label;x": "1;2", "text": "好"}]
    neither = write(tmp_path / "c.csv", "label;text|x\n1;好\n")  # two marks, and nothing tells which is meant
    assert [fields for _, fields in iter_fields(neither, "utf-8")] == [{"label;text|x": "1;好"}]


def test_empty_fields_behind_the_last_column_are_nothing(tmp_path: Path) -> None:
    """Excel writes them where a cell was once filled."""
    for name, mark in (("a.csv", ","), ("a.tsv", "\t")):
        path = write(tmp_path / name, mark.join(["text", "label\n好", "1", "", "\n差", "0\n"]))
        assert [(record.text, record.label) for record in read_records(path)] == [("好", 1), ("差", 0)]


def test_lines_are_counted_behind_a_line_that_names_the_delimiter(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "sep=;\ntext;label\n好;1;2\n")
    with pytest.raises(UserError, match=r"a\.csv:3: 3 fields, expected 2"):
        read_records(path)


@pytest.mark.parametrize("content", ['[{"label": 1, "text": "好"}]', '[\n{"label": 1, "text": "好"},\n{}\n]', "{\n}"])
def test_json_that_is_not_a_line_a_record_is_told_its_name(content: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*; rename it to a\.json$") as refused:
        read_records(write(tmp_path / "a.jsonl", content))
    assert "好" not in str(refused.value)


def write_xlsx(path: Path, rows: list[list[object]], *more: str) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    for title in more:
        book.create_sheet(title)
    book.save(path)
    return path


def test_a_workbook_is_read_as_excel_would_save_it_as_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["label", "text", "note"], [1, "很好", None], [], [0.0, 666, "x"], [True, "一\n二"]]
    path = write_xlsx(tmp_path / "a.xlsx", rows, "other")
    assert list(iter_fields(path, "utf-8")) == [
        (f"{path}:2", {"label": "1", "text": "很好", "note": ""}),
        (f"{path}:4", {"label": "0", "text": "666", "note": "x"}),
        (f"{path}:5", {"label": "TRUE", "text": "一\n二", "note": ""}),
    ]
    assert "its first sheet 'Sheet' is read, 1 more are not" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"a\.xlsx: cannot be read as \.xlsx .*; save it as CSV UTF-8"):
        list(iter_fields(path, "utf-8"))


def test_a_workbook_that_cannot_be_read_here_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(UserError, match=r"a\.xlsx: .*pip install openpyxl, or save it as CSV UTF-8"):
        list(iter_fields(write(tmp_path / "a.xlsx", b"PK"), "utf-8"))
    with pytest.raises(UserError, match=r"a\.xls: is not one of .*; save it as \.xlsx or as CSV UTF-8"):
        list(iter_fields(write(tmp_path / "a.xls", b"x"), "utf-8"))


def save_to_disk(folder: Path, *shards: list[str]) -> Path:
    """A folder as `Dataset.save_to_disk` writes it, with what `map` leaves in it."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
    for name, texts in zip([*names, "cache-0.arrow"], [*shards, ["无"]], strict=True):
        table = pyarrow.table({"text": texts, "label": [1] * len(texts)})
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}), "utf-8")
    return folder


def test_a_folder_of_save_to_disk_is_its_files(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "reviews" / "train", ["一", "二"], ["三"])
    assert [record.text for record in read_records(folder)] == ["一", "二", "三"]
    assert [split_of(path) for path in data_files(folder)] == ["train", "train"]
    save_to_disk(tmp_path / "reviews" / "test", ["四"])
    (tmp_path / "reviews" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}', "utf-8")
    assert split_folders(tmp_path / "reviews") == [folder, tmp_path / "reviews" / "test"]
    with pytest.raises(UserError, match=r"reviews: has the splits .*reviews.train, .*reviews.test; name one of these"):
        read_records(tmp_path / "reviews")
    with pytest.raises(UserError, match=r"is a folder, .*; name the files in it"):
        read_records(tmp_path)
