"""The exceptions of this package.

ShiftDCError
├── InputError            the caller's input is wrong: one sentence, exit code 2, nothing written
├── VerificationError     an exported checkpoint is not what it should be: exit code 1
├── WriteError            the disk did not take an output, of which nothing is left: exit code 1
└── hub_errors.PushError  the Hub did not take a push: exit code 1

Each keeps its cause (`from error`), for a trace, unless the cause may quote what nobody is shown (a request, a reply) or is the
Hub client's, which holds the headers and with them the token: then `from None`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ShiftDCError(Exception):
    """Base of every exception that this package raises on purpose."""


class InputError(ShiftDCError):
    """What was given is wrong. The message says what, where, what was expected and found, and what to do."""


class VerificationError(ShiftDCError):
    """A checkpoint failed its checks."""


class WriteError(ShiftDCError):
    """The disk is full, or refused to be written. The message says what, where and why."""


def printable(text: str) -> str:
    """One line: what would break it, hide in it or turn its direction is escaped; of a very long text the middle is left out."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return line if len(line) <= 1500 else f"{line[:900]} ... {line[-500:]}"


@contextmanager
def refusing(what: str, advice: str) -> Iterator[None]:
    """Around a library's reading of files that come from others: whatever it raises becomes one sentence, an InputError."""
    try:
        yield
    except (ShiftDCError, MemoryError):
        raise
    except Exception as error:  # there is no closed list: tokenizers, for one, raises Exception itself
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise InputError(f"{what} ({type(error).__name__}: {reason[:300]}); {advice}.") from error
