"""Errors that are no bugs of this code: those that a user makes, and those that pass."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class UserError(Exception):
    """Something the user can put right.

    Its text is one line: what is wrong, with both values, and what to do. The command line prints
    it as `error: ...` and ends with exit code 2, without a stack trace.
    """


class Restart(Exception):
    """Nobody's mistake: the same command, given again, goes on where the run stopped.

    Its text is one line. The command line prints it as `restart: ...` and ends with exit code 75,
    EX_TEMPFAIL of sysexits.h: "the user is invited to retry". Launchers can tell it from a crash
    (1), a mistake (2) and a signal (128 and more).
    """

    EXIT_CODE = 75


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


def listed(items: Sequence[Any], separator: str = ", ") -> str:
    """The first five items, and how many more there are."""
    more = f"{separator}and {len(items) - 5} more" if len(items) > 5 else ""
    return separator.join(map(str, items[:5])) + more
