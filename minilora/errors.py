"""The one exception that a user's mistake raises.

`where: what we got, what we expected; what to do`. Scripts print it and leave with exit status 2 (`cli.py`), so a
message is all that a user sees: it has to be enough to go on with.
"""


class UserError(Exception):
    """Something that the person at the keyboard can put right: a path, a key, a file's content."""
