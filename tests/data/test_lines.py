"""Bytes become the lines that were meant, or the message says what they are."""

import codecs
import gzip
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from minilora.data.lines import count_lines, encoding_named, iter_blocks, iter_file_lines, iter_lines
from minilora.data.records import ReadOptions, iter_line_records, read_records
from minilora.errors import UserError
from tests.data.conftest import write

ENCODED = ("utf-8", "utf-8-sig", "gb18030", "utf-16", "utf-16-le", "utf-16-be")
# 上 (U+4E0A), 一 (U+4E00) and ਊ (U+0A0A) hold a byte 10 in UTF-16.
LETTERS = 'a好上ਊ一😀 \t\r\u2028\x85\x0b\x00"'


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
        (
            "早餐很好".encode()[:-1],
            "utf-8",
            r"^a pipe:1: is not UTF-8 \(byte 0xE5, though .*: damaged.*correct the line",
        ),
        (b"1\t\xff" + "早餐很好".encode()[1:], "utf-8", r"^a pipe:1: is not UTF-8 \(byte 0xFF, .*: damaged"),
        (
            "早餐\n".encode() + "很好，推荐".encode("gb18030"),
            "utf-8",
            r"^a pipe:2: .*damaged, or added from another",
        ),
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


@pytest.mark.parametrize(
    ("names", "encoding"),
    [
        (("utf-8", "UTF8", "utf_8", "utf-8-sig", "UTF8-SIG", "ascii", "cp65001"), "utf-8"),
        (("gb18030", "GB-18030", "GBK", "gb2312", "GB_2312", "cp936", "euc-cn"), "gb18030"),
        (("utf-16", "UTF16", "utf-16le", "UTF-16LE", "utf_16_le"), "utf-16"),
        (("big5", "Big-5", "cp950"), "big5hkscs"),
    ],
)
def test_an_encoding_has_any_of_its_names(names: tuple[str, ...], encoding: str, tmp_path: Path) -> None:
    for name in names:
        assert encoding_named(name) == encoding
        text = "label,text\n1,早餐很好\n" if name != "ascii" else "label,text\n1,ok\n"
        path = write(tmp_path / "a.csv", text.encode("ascii" if name == "ascii" else encoding))
        assert read_records(path, ReadOptions(encoding=name))[0].text == text[13:-1]


def test_an_encoding_that_is_not_read_is_refused() -> None:
    for name in ("latin-1", "utf-7", "base64", "", "nonsense"):
        with pytest.raises(UserError, match=r"is not one of utf-8, gb18030, gbk, big5, utf-16"):
            encoding_named(name)


def test_one_damaged_byte_never_makes_utf8_another_encoding(tmp_path: Path) -> None:
    text = "label\ttext\n" + "1\t早餐很好，推荐！房间也很干净\n" * 3
    sound = text.encode()
    generator = random.Random(0)
    for _ in range(200):
        damaged = bytearray(sound)
        position = generator.randrange(len(sound))
        damaged[position] = generator.randrange(128, 256)
        said = ""
        try:
            list(iter_file_lines(write(tmp_path / "a.tsv", bytes(damaged))))
        except UserError as error:
            said = str(error)
        line = 1 + sound[:position].count(b"\n")
        assert not said or f"a.tsv:{line}: is not UTF-8 (byte 0x" in said
        assert "gb18030" not in said


@pytest.mark.parametrize("encoding", ["gbk", "big5", "utf-16"])
@pytest.mark.parametrize("text", ["label,text\n1,早餐很好\n", "label,text\n1,好\n1,早餐很好，推荐\n", "评论，标签\n"])
def test_utf8_is_never_read_as_another_encoding(text: str, encoding: str, tmp_path: Path) -> None:
    """Text of an even number of bytes would decode as GB18030, to other characters."""
    for name, read in (("a.csv", iter_file_lines), ("a.json", iter_blocks)):
        with pytest.raises(UserError, match=r"\d: is UTF-8, .*; leave out --encoding|leave out .* if it is UTF-8"):
            list(read(write(tmp_path / name, text), encoding))


@pytest.mark.parametrize("name", ["a.csv.gz", "a.CSV.GZ", "a.csv"])
def test_a_compressed_file_is_read_whatever_its_name(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, gzip.compress("label,text\n1,好\n".encode()))
    assert [record.text for record in read_records(path)] == ["好"]
    gb = write(tmp_path / "gb.jsonl.gz", gzip.compress('{"label": 1, "text": "好"}'.encode("utf-16")))
    assert [record.text for record in read_records(gb, ReadOptions(encoding="UTF-16LE"))] == ["好"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            gzip.compress(b"label,text\n1,a\n" * 99, mtime=0)[:-20],
            r"cannot be unpacked .*download or compress it again",
        ),
        (b"\x1f\x8b garbage", r"cannot be unpacked"),
        (b"PK\x03\x04...", r"is an Excel workbook or a zip archive; rename it to \.xlsx, or unpack it"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", r"is a workbook of an older Excel; save it as"),
        (b"PAR1...", r"is a parquet file; rename it"),
        (b"\x28\xb5\x2f\xfd...", r"is compressed by zstd; unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"is only Git LFS's pointer .*git lfs pull"),
        (b"<!DOCTYPE html>", r"is a web page; download"),
    ],
)
def test_a_file_that_is_no_text_is_named_as_what_it_is(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"a\.csv: {message}"):
        list(iter_file_lines(write(tmp_path / "a.csv", content)))


def test_blocks_are_the_text(tmp_path: Path) -> None:
    text = "一二\n三，" * 30_000
    for encoding in ENCODED[:-1]:  # without a mark, UTF-16 begins with the little end
        path = write(tmp_path / "a", text.encode(encoding))
        assert "".join(iter_blocks(path, encoding)) == text
    path = write(tmp_path / "a", text.encode() + b"\xff")
    with pytest.raises(UserError, match=r"a:30001: is not UTF-8 \(byte 0xFF"):
        list(iter_blocks(path))
    with pytest.raises(UserError, match=r"a: is empty"):
        list(iter_blocks(write(tmp_path / "a", " \n")))


def test_a_file_that_is_not_there_names_the_one_that_is(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = write(tmp_path / "data" / "reviews.csv", "x")
    for missing in (tmp_path / "data" / "review.csv", tmp_path / "dta" / "reviews.csv"):
        with pytest.raises(UserError, match=rf"cannot be read .*; did you mean {path}\?$"):
            list(iter_file_lines(missing))
