"""Errors that are the user's to mend: one line, exit code 2, no traceback."""

import difflib
from collections.abc import Iterable

EXIT_DONE, EXIT_FAILURE, EXIT_USER_ERROR = 0, 1, 2


class UserError(Exception):
    """A mistake in the user's input. The message is one line that says what is wrong, where, and the nearest remedy."""


def nearest(word: str, valid: Iterable[str]) -> str | None:
    """Return the member of ``valid`` most like ``word``, or None if nothing is close."""
    matches = difflib.get_close_matches(str(word), list(valid), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown(kind: str, word: str, valid: Iterable[str], where: str = "") -> UserError:
    """Build the error for a name that is none of ``valid``: names ``where``, then the nearest valid name or all of
    them."""
    valid = sorted(valid)
    match = nearest(word, valid)
    hint = f"did you mean '{match}'?" if match else f"valid: {', '.join(valid) or 'none'}"
    prefix = f"{where}: " if where else ""
    return UserError(f"{prefix}unknown {kind} '{word}'; {hint}")


class RunError(Exception):
    """A run that cannot go on, told in one line: exit code 1, no traceback."""
