"""Bytes in, lines of text out, one at a time: what reads them holds no more of a file or a pipe than it wants to.

A line ends at a newline alone: a review may hold U+2028, a carriage return or any other of the characters that
`splitlines` takes for an end.
"""

import codecs
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from minilora.errors import UserError


def iter_file_lines(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    """`iter_lines` of a file.

    Raises:
        UserError: it cannot be read, or see `iter_lines`.
    """
    try:
        with path.open("rb") as stream:
            yield from iter_lines(stream, str(path), encoding)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def iter_lines(stream: Iterable[bytes], where: str, encoding: str = "utf-8") -> Iterator[str]:
    """The lines of a stream without their ends ("\\n" or "\\r\\n") and without a byte-order mark.

    Args:
        stream: what a binary file gives: pieces that end behind a byte 10 each. Such a piece is a line, but in UTF-16,
            where the byte is also half of other characters.
        where: file, or name of the stream, for messages.
        encoding: utf-8, gb18030 or utf-16.

    Raises:
        UserError: a line is not in that encoding, or none of them holds anything but white space.
    """
    pieces = iter(stream)
    first = next(pieces, b"")
    has_mark = first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    # The decoder of UTF-16 insists on a mark.
    codec = "utf-16-le" if encoding == "utf-16" and not has_mark else encoding
    decoder = codecs.getincrementaldecoder(codec)()
    pending = ""
    number, num_bytes, is_empty = 1, 0, True
    for piece in itertools.chain([first], pieces, [b""]):
        num_bytes += len(piece)
        problem = None
        try:
            pending += decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            problem = error
            pending += decoder.decode(piece[: max(0, len(piece) - len(error.object) + error.start)])
        if number == 1:
            pending = pending.removeprefix("\ufeff")
        *ended, pending = pending.split("\n")
        for line in ended:
            is_empty = is_empty and not line.strip()
            number += 1
            yield line.removesuffix("\r")
        if problem is not None:
            # Behind text that was UTF-8, and more than ASCII, there is damage and no other encoding.
            guess = _guess_encoding(problem.object) if encoding == "utf-8" and pending.isascii() else None
            otherwise = f"it looks like {guess}: give --encoding {guess} to the script, or " if guess else ""
            at_byte = num_bytes - len(problem.object) + problem.start
            raise UserError(
                f"{where}:{number}: is not {encoding.upper()} (byte {at_byte}); {otherwise}save it as UTF-8"
            )
    if pending:
        yield pending
    if is_empty and not pending.strip():
        raise UserError(f"{where}: is empty; give a file with records")


def count_lines(path: Path) -> int:
    """How many bytes 10 a file holds: about its rows, for a progress bar. OSError as it comes."""
    with path.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))


def _guess_encoding(content: bytes) -> str | None:
    """What text that is not UTF-8 was probably written in: a mark says UTF-16, Chinese text GB18030.

    Almost any bytes are valid GB18030, so nearly all that it makes of them has to be Chinese text and punctuation.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    try:
        text = content.decode("gb18030")
    except UnicodeDecodeError:
        return None
    foreign = [character for character in text if character > "\x7f"]
    usual = (("\u4e00", "\u9fff"), ("\u2010", "\u2027"), ("\u3000", "\u303f"), ("\uff00", "\uffef"))
    common = sum(any(first <= character <= last for first, last in usual) for character in foreign)
    return "gb18030" if common > 0.9 * len(foreign) else None
