"""Errors that a user makes, as against bugs of this code."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right.

    Its text is one line: what is wrong, with both values, and what to do. The command line prints
    it as `error: ...` and ends with exit code 2, without a stack trace.
    """


def nearest(name: str, options: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all when they are few.

    It begins with a blank, and is empty when there is nothing useful to say.
    """
    options = sorted(map(str, options))
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.6)
    if close:
        return f' (did you mean "{close[0]}"?)'
    if 0 < len(options) <= 12:
        return f" (known: {', '.join(options)})"
    return ""
