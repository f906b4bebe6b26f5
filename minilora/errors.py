"""The one exception that a user's mistake raises.

`where: what we got, what we expected; what to do`. Scripts print it and leave with exit status 2, so a
message is all that a user sees: it has to be enough to go on with.
"""

import codecs
import io
import json
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something that the person at the keyboard can put right: a path, a key, a file's content."""


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`, so that it ends without a traceback whatever the person at the keyboard did.

    A UserError becomes its message and exit status 2; Ctrl-C becomes 130, and a reader of the output that has
    enough and goes, as `head` does, 141: what a shell says of any program. Text that the terminal's encoding
    lacks is escaped, because a label that cannot be shown is no reason to lose a result.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # standard error escapes by itself
        sys.stdout.reconfigure(errors="json_escape")
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # here, not when the interpreter ends, where a closed pipe can no longer be caught
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
        raise SystemExit(141) from None


def _json_escape(error: UnicodeError) -> tuple[str, int]:
    """The part that cannot be encoded, as JSON writes it: a line of JSON stays one, which "backslashreplace"
    would break with its \\xe9 and \\U0001f600."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error("json_escape", _json_escape)
