"""The one exception that a user's mistake raises.

`where: what we got, what we expected; what to do`. Scripts print it and leave with exit status 2, so a
message is all that a user sees: it has to be enough to go on with.
"""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something that the person at the keyboard can put right: a path, a key, a file's content."""


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`, turning a UserError into its message and exit status 2, Ctrl-C into 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
