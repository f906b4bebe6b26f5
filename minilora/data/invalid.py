"""Records that cannot be used: counted by what is wrong with them, so that one message tells all of it."""

import re
from collections import Counter

from minilora.errors import UserError

SHOWN_PLACES = 5
SHOWN_KINDS = 10
TOO_MANY = 1000  # invalid records at the beginning of a file: a wrong file or column, not a wrong record


class InvalidRecords:
    """The errors of single records, with the first places of each kind.

    Messages that differ in figures only, as "3 fields, expected 2" and "4 fields, expected 2", are one kind.
    """

    def __init__(self, gives_up: bool = False, option: str = "--drop_invalid"):
        """`gives_up`: an error after TOO_MANY invalid records and no other. `option` drops them."""
        self.count = 0
        self.are_all = True  # whoever reads a valid record makes this False
        self._gives_up, self._option = gives_up, option
        self._counts = Counter[str]()
        self._messages: dict[str, str] = {}
        self._places: dict[str, list[str]] = {}

    def add(self, where: str, error: UserError) -> None:
        kind = re.sub(r"\d+", "0", str(error).removeprefix(f"{where}: "))
        self.count += 1
        if kind not in self._messages and len(self._messages) >= SHOWN_KINDS:
            kind = ""
        self._counts[kind] += 1
        self._messages.setdefault(kind, str(error) if kind else f"{where}: the first of other invalid records")
        places = self._places.setdefault(kind, [])
        if len(places) < SHOWN_PLACES:
            places.append(where)
        if self._gives_up and self.are_all and self.count == TOO_MANY:
            raise UserError("\n".join([f"none of the first {TOO_MANY:,} records can be used:", *self.lines()]))

    def check(self) -> None:
        """UserError with all of it, if there is any."""
        if self.count:
            raise UserError("\n".join(self.lines()))

    def lines(self) -> list[str]:
        """`kinds`, and what drops all of them."""
        lines = self.kinds()
        if self.count and not self.are_all:
            lines.append(f"  {self._option} of preprocess_data.py drops the {self.count:,} records that cannot be used")
        return lines

    def kinds(self) -> list[str]:
        """The message of the first record of each kind, with the number of such records and the next places."""
        lines = []
        for kind, message in self._messages.items():
            count, others = self._counts[kind], [_short(where) for where in self._places[kind][1:]]
            more = ", ..." if count > len(self._places[kind]) else ""
            lines.append(f"{message} ({count:,} such records, also {', '.join(others)}{more})" if others else message)
        return lines


def _short(where: str) -> str:
    return where.rpartition("/")[2]
