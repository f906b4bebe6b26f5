"""A .json file in, its records out one by one: the file is never in memory as a whole.

    [{...}, {...}]      an array
    {...} {...}         objects one after another, on a line each or on several

Each is parsed out of a window of the text (`json.JSONDecoder.raw_decode`); where it does not end there, the window is
doubled.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minilora.data.lines import iter_blocks
from minilora.errors import UserError, shown

SPACE = re.compile(r"[ \t\r\n]*")
# Python writes NaN where pandas has no value.
DECODER = json.JSONDecoder(parse_constant=lambda text: None if text == "NaN" else float(text))
LONGEST = 1 << 24  # characters of a record
ATOM = 16  # a literal, a number's begin or an escape may be cut at a window's end


def iter_json(path: Path, encoding: str) -> Iterator[tuple[int, dict[str, Any] | UserError]]:
    """The objects of a file, each with its number from 1, or what is wrong there; UserError where it is no JSON."""
    window = _Window(iter_blocks(path, encoding))
    is_array = window.skip("[")
    number = 0
    while window.next_character() not in ("", "]" if is_array else ""):
        number += 1
        if is_array and number > 1 and not window.skip(","):
            raise UserError(f"{path}:{number - 1}: is not followed by a comma; correct the file behind that record")
        if window.next_character() in (",", "]"):
            problem = "goes on with a comma that no record follows" if is_array else "has commas between its records"
            remedy = "remove it" if is_array else "put [ and ] around all of them, or remove the commas"
            raise UserError(f"{path}:{number - 1}: {problem}; {remedy}")
        try:
            found = window.parse()
        except (ValueError, RecursionError) as error:
            what = error.msg if isinstance(error, json.JSONDecodeError) else error
            remedy = ", or copy the file again if its end is missing" if window.is_at_the_end else ""
            raise UserError(f"{path}:{number}: this record is not JSON ({what}); correct it{remedy}") from None
        if not isinstance(found, dict):
            found = UserError(f"{path}:{number}: holds {shown(found)}, expected an object; correct the record")
        yield number, found
    if is_array and not window.skip("]"):
        raise UserError(f"{path}: ends without ']' after {number:,} records; part of it is missing: copy it again")
    if window.next_character():
        raise UserError(f"{path}: goes on behind the ']' of its array; make it one array, or one object a line")
    if number == 0:
        raise UserError(f"{path}: holds no record; add records")


class _Window:
    """The part of the text from the present position on that was read so far."""

    def __init__(self, blocks: Iterator[str]):
        self._blocks = blocks
        self._text = ""
        self._position = 0
        self.is_at_the_end = False  # of the file, as far as it was read

    def next_character(self) -> str:
        """The next one that is no white space; "" at the end."""
        while True:
            match = SPACE.match(self._text, self._position)
            self._position = match.end() if match else self._position
            if self._position < len(self._text) or not self._read(1):
                return self._text[self._position : self._position + 1]

    def skip(self, character: str) -> bool:
        """Whether it comes next, and is passed."""
        is_next = self.next_character() == character
        self._position += is_next
        return is_next

    def parse(self) -> Any:
        """The value that comes next. ValueError: it is none, or too long for a record."""
        self.next_character()
        while True:
            try:
                found, self._position = DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos + ATOM > len(self._text)
                length = len(self._text) - self._position
                if not is_cut or not self._read(max(length, 1)):
                    raise
                if length > LONGEST:
                    raise ValueError(
                        f"longer than {LONGEST:,} characters; records are in an array, or on a line each"
                    ) from None
            else:
                return found

    def _read(self, characters: int) -> bool:
        """Reads that many more, if there are; forgets what is behind the position."""
        parts = [self._text[self._position :]]
        length = len(parts[0])
        for block in self._blocks:
            parts.append(block)
            characters -= len(block)
            if characters <= 0:
                break
        else:
            self.is_at_the_end = True
        self._text, self._position = "".join(parts), 0
        return len(self._text) > length
