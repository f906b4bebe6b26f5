"""Bytes of a text file or a pipe in, its text out: lines one at a time, or blocks of a file that has no lines.

A file that is compressed (gzip), or that is no text at all, is known by its first bytes, whatever its name says.
"""

import codecs
import encodings.aliases
import gzip
import io
import itertools
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from minilora.errors import UserError
from minilora.system.files import similar_path

ENCODINGS = {  # what text is read as, and what Python calls the encodings that this includes
    "utf-8": ("ascii", "utf_8", "utf_8_sig"),
    "gb18030": ("gb2312", "gbk", "gb18030"),
    "big5hkscs": ("big5", "cp950", "big5hkscs"),
    "utf-16": ("utf_16", "utf_16_le"),
    "utf-16-be": ("utf_16_be",),
}
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
CHINESE = re.compile("[\u4e00-\u9fff\u2010-\u2027\u3000-\u303f\uff00-\uffef]")
BLOCK = 1 << 16  # bytes
GZIP = b"\x1f\x8b"
FOREIGN = {  # how files begin that are no text
    b"PK\x03\x04": "is an Excel workbook or a zip archive; rename it to .xlsx, or unpack it",
    b"\xd0\xcf\x11\xe0": "is a workbook of an older Excel; save it as .xlsx or as CSV UTF-8",
    b"PAR1": "is a parquet file; rename it to .parquet",
    b"ARROW1": "is an Arrow file; rename it to .arrow",
    b"BZh": "is compressed by bzip2; unpack it",
    b"\xfd7zXZ": "is compressed by xz; unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; unpack it",
    b"version https://git-lfs": "is only Git LFS's pointer to the file; fetch that with git lfs pull",
    **dict.fromkeys((b"<!DOCTYPE", b"<!doctype", b"<html"), "is a web page; download the file itself"),
}


def encoding_named(name: str) -> str:
    """The one of ENCODINGS that reads `name`, in any spelling: UTF8, gb-2312, cp936. UserError if none does."""
    known = {codec: encoding for encoding, names in ENCODINGS.items() for codec in names}
    aliases = {alias: known[codec] for alias, codec in encodings.aliases.aliases.items() if codec in known}
    spellings = {_squeezed(spelling): encoding for spelling, encoding in (known | aliases).items()}
    if _squeezed(name) not in spellings:
        raise UserError(
            f"encoding {name!r}: is not one of utf-8, gb18030, gbk, big5, utf-16; name another, or use UTF-8"
        )
    return spellings[_squeezed(name)]


def _squeezed(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """A text file's bytes, uncompressed; UserError where they cannot be read, or are no text."""
    try:
        with path.open("rb") as stream:
            begin = stream.peek(32)
            for mark, what in FOREIGN.items():
                if begin.startswith(mark):
                    raise UserError(f"{path}: {what}")
            if not begin.startswith(GZIP):
                yield stream
                return
            with gzip.open(stream) as unpacked:
                yield unpacked  # type: ignore[misc]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: cannot be unpacked ({error}); download or compress it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path{similar_path(path)}") from None


def iter_file_lines(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    """`iter_lines` of a file; UserError also where it cannot be read."""
    with open_bytes(path) as stream:
        yield from iter_lines(stream, str(path), encoding)


def iter_lines(stream: BinaryIO, where: str, encoding: str = "utf-8") -> Iterator[str]:
    """The lines of a stream one at a time, without their ends ("\\n" or "\\r\\n") and without a byte-order mark.

    Only a newline ends a line: a review may hold U+2028, a carriage return or any other of the characters at which
    `splitlines` splits.

    Args:
        stream: a binary file or pipe.
        where: its name, for messages.
        encoding: what `encoding_named` knows.

    Raises:
        UserError: a line is not in that encoding, or all lines are blank.
    """
    encoding = encoding_named(encoding)
    number, is_empty, is_ascii, is_unsure = 0, True, True, encoding != "utf-8"
    try:
        for number, line in enumerate(_decoded(stream, encoding), start=1):
            line = line.removesuffix("\n").removesuffix("\r")
            if number == 1:
                line = line.removeprefix("\ufeff")
            is_empty = is_empty and not line.strip()
            is_ascii = is_ascii and line.isascii()
            is_unsure = is_unsure and _may_be_utf8(line, f"{where}:{number}", encoding)
            yield line
    except UnicodeDecodeError as error:
        raise _undecodable(error, f"{where}:{number + 1}", encoding, is_ascii) from None
    if is_empty:
        raise UserError(f"{where}: is empty; give a file with records")


def iter_blocks(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    """The text of a file in pieces, for what need not have lines; errors as `iter_file_lines`."""
    encoding = encoding_named(encoding)
    line, is_empty, is_ascii, is_unsure = 1, True, True, encoding != "utf-8"
    with open_bytes(path) as stream:
        errors = "surrogatepass" if encoding.startswith("utf-16") else "strict"
        decoder = codecs.getincrementaldecoder(_codec(stream, encoding))(errors)
        try:
            for block in itertools.chain(iter(lambda: stream.read(BLOCK), b""), [b""]):
                text = decoder.decode(block, final=not block)
                text = text.removeprefix("\ufeff") if is_empty else text
                is_unsure = is_unsure and _may_be_utf8(text, f"{path}:{line}", encoding)
                is_empty, is_ascii = is_empty and not text.strip(), is_ascii and text.isascii()
                yield text
                line += text.count("\n")
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            raise _undecodable(error, f"{path}:{line}", encoding, is_ascii) from None
    if is_empty:
        raise UserError(f"{path}: is empty; give a file with records")


def _decoded(stream: BinaryIO, encoding: str) -> Iterator[str]:
    """The lines of a stream, with their ends."""
    if not encoding.startswith("utf-16"):
        yield from (line.decode(encoding) for line in stream)
        return
    # There the byte 10, at which binary lines end, is also half of other characters. A lone surrogate passes, to be
    # refused with the line of its record.
    with io.TextIOWrapper(stream, _codec(stream, encoding), "surrogatepass", newline="\n") as lines:
        yield from lines


def _codec(stream: BinaryIO, encoding: str) -> str:
    """Python's codec: in UTF-16 a mark decides, and without one Python wants to know which byte comes first."""
    if not encoding.startswith("utf-16"):
        return encoding
    has_mark = stream.peek(2).startswith(UTF16_MARKS)  # type: ignore[attr-defined]
    return "utf-16" if has_mark else {"utf-16": "utf-16-le"}.get(encoding, encoding)


def _undecodable(error: UnicodeDecodeError, where: str, encoding: str, is_ascii_before: bool) -> UserError:
    """What is wrong with a line; UTF-8 that is damaged is told from another encoding."""
    if encoding != "utf-8" and (_chinese_in_utf8(error.object) or 0) > 0:
        return UserError(f"{where}: is UTF-8, not {encoding.upper()}; leave out --encoding")
    found = f"{where}: is not {encoding.upper()} (byte 0x{error.object[error.start]:02X}"
    has_mark = error.object.startswith(UTF16_MARKS)
    if encoding == "utf-8" and not has_mark and (not is_ascii_before or _is_mostly_utf8(error.object)):
        return UserError(
            f"{found}, though the text around it is: damaged, or added from another file); correct the line, or copy "
            "the file again"
        )
    guess = _guess_encoding(error) if encoding == "utf-8" else None
    otherwise = f"it looks like {guess}: give --encoding {guess} to the script, or " if guess else ""
    otherwise = "leave out --encoding if it is UTF-8, or " if encoding.startswith("utf-16") else otherwise
    return UserError(f"{found}); {otherwise}save it as UTF-8")


def _may_be_utf8(text: str, where: str, encoding: str) -> bool:
    """Whether text that was read in another encoding leaves open that it is UTF-8, half of which is valid there too.

    UserError where it can be nothing else: three characters of three bytes.
    """
    codec = "utf-16-le" if encoding == "utf-16" else encoding
    found = None if text.isascii() else _chinese_in_utf8(text.encode(codec, "surrogatepass"))
    if found is not None and found > 2:
        raise UserError(f"{where}: is UTF-8, not {encoding.upper()}; leave out --encoding")
    return text.isascii() or found is not None


def _chinese_in_utf8(line: bytes) -> int | None:
    """Its characters of three bytes and more, None if it is not UTF-8."""
    try:
        return sum(character > "\u07ff" for character in line.decode())
    except UnicodeDecodeError:
        return None


def _is_mostly_utf8(line: bytes) -> bool:
    """Whether more than half of what is beyond ASCII are UTF-8's three bytes of a Chinese character."""
    chinese = sum(character > "\u07ff" for character in line.decode("utf-8", "ignore"))
    return 6 * chinese > sum(byte > 127 for byte in line)


def _guess_encoding(error: UnicodeDecodeError) -> str | None:
    """The encoding of a line that is not UTF-8, if its bytes tell: a mark means UTF-16, Chinese text GB18030.

    Almost any bytes are valid GB18030, so more than nine tenths of what it decodes to must be Chinese text and
    punctuation, of two bytes beyond ASCII each: a single one is damage.
    """
    if error.object.startswith(UTF16_MARKS):
        return "utf-16"
    try:  # a block may end within a character
        text = codecs.getincrementaldecoder("gb18030")().decode(error.object)
    except UnicodeDecodeError:
        return None
    foreign = [character for character in text if character > "\x7f"]
    is_chinese = len(CHINESE.findall("".join(foreign))) > 0.9 * len(foreign)
    return "gb18030" if is_chinese and sum(byte > 127 for byte in error.object) > 1.5 * len(foreign) else None


def count_lines(path: Path) -> int:
    """Newlines of a file, about its number of records, for a progress bar. OSError as it comes."""
    with path.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))
