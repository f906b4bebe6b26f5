"""The one exception that a user's mistake raises, and how its message quotes what was found.

`where: what we got, what we expected; what to do`. Scripts print it and leave with exit status 2 (`cli.py`), so a
message is all that a user sees: it has to be enough to go on with.
"""

from typing import Any


class UserError(Exception):
    """Something that the person at the keyboard can put right: a path, a key, a file's content."""


def shown(found: Any) -> str:
    """A value as a message quotes it: its repr, capped."""
    return capped(repr(found))


def capped(text: str, limit: int = 80) -> str:
    """Text of a file or a library for a message, which never prints a whole record."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
