"""Lines come one by one, whatever they are written in, and a bad one is named with its place."""

import codecs
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from minilora.data.lines import count_lines, iter_file_lines, iter_lines
from minilora.errors import UserError

ENCODED = ("utf-8", "utf-8-sig", "gb18030", "utf-16", "utf-16-le", "utf-16-be")
# 上 (U+4E0A), 一 (U+4E00) and ਊ (U+0A0A) hold a byte 10 in UTF-16.
LETTERS = 'a好上ਊ一😀 \t\r\u2028\x85\x0b\x00"'


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("encoding", ENCODED)
def test_lines_are_those_of_the_whole_text(tmp_path: Path, encoding: str) -> None:
    chooser = random.Random(0)
    for _ in range(50):
        text = "x" + "".join(chooser.choice(LETTERS + "\n\n") for _ in range(chooser.randrange(200)))
        mark = "\ufeff" if encoding == "utf-16-be" else ""  # without one, UTF-16 is Windows' kind, little end first
        path = write(tmp_path / "a.txt", (mark + text).encode(encoding))
        *ended, rest = text.split("\n")
        expected = [line.removesuffix("\r") for line in ended] + [rest] * bool(rest)
        name = {"utf-8-sig": "utf-8"}.get(encoding, encoding[:6] if encoding.startswith("utf-16") else encoding)
        assert list(iter_file_lines(path, name)) == expected


def test_a_line_is_there_before_the_next_one_is_read() -> None:
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
        (b"a\nb\xff\n", "utf-8", r"^a pipe:2: is not UTF-8 \(byte 3\); save it as UTF-8$"),
        (b"\xef\xbb\xbfa\n\n\xff", "utf-8", r"^a pipe:3: is not UTF-8 \(byte 6\); save it as UTF-8$"),
        (
            "a\n早餐很好，推荐\n".encode("gb18030"),
            "utf-8",
            r"^a pipe:2: .*\(byte 2\); it looks like gb18030: give --encoding gb18030 to the script, or save it as UTF",
        ),
        ("早餐".encode("utf-16"), "utf-8", r"^a pipe:1: is not UTF-8 \(byte 0\); it looks like utf-16: give --enc"),
        # Text that began as UTF-8 is damaged, though GB18030 would make Chinese characters of it.
        ("早餐很好".encode()[:-1], "utf-8", r"^a pipe:1: is not UTF-8 \(byte 9\); save it as UTF-8$"),
        ("早餐很好\xe4\n".encode("latin-1", "replace"), "gb18030", r"^a pipe:1: is not GB18030 \(byte 4\); save it as"),
        (codecs.BOM_UTF16_LE + "一\n二".encode("utf-16-le")[:-1], "utf-16", r"^a pipe:2: is not UTF-16 \(byte 6\)"),
        (codecs.BOM_UTF16_LE + b"a\0\n\0\x00\xd8a\0", "utf-16", r"^a pipe:2: is not UTF-16 \(byte 6\); save it as"),
        (b"", "utf-8", r"^a pipe: is empty; give a file with records$"),
        (b"\xef\xbb\xbf\n \r\n\t", "utf-8", r"^a pipe: is empty"),
        (codecs.BOM_UTF16_LE, "utf-16", r"^a pipe: is empty"),
    ],
)
def test_bytes_that_are_no_text_are_named_with_line_and_place(content: bytes, encoding: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(iter_lines(content.splitlines(keepends=True), "a pipe", encoding))


def test_what_stands_before_a_bad_line_is_read() -> None:
    for content, encoding in ((b"one\ntwo\n\xff\n", "utf-8"), ("one\ntwo\n".encode("utf-16") + b"\0\xd8a\0", "utf-16")):
        lines = iter_lines(content.splitlines(keepends=True), "a pipe", encoding)
        assert [next(lines), next(lines)] == ["one", "two"]
        with pytest.raises(UserError, match="a pipe:3"):
            next(lines)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\); check the path"):
        list(iter_file_lines(tmp_path))


def test_newlines_are_counted(tmp_path: Path) -> None:
    assert count_lines(write(tmp_path / "a", b"a\n\nb" * 1_000_000)) == 2_000_000
