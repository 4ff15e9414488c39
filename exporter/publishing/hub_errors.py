"""What the Hub answers, as errors of ours: one sentence without a token; and limits on how long it may be silent."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from httpx2 import HTTPError, Timeout, TransportError  # what huggingface_hub speaks HTTP with
from huggingface_hub import get_session, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileDuplicationError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils._xet import abort_xet_session

from exporter.errors import InputError, ShiftDCError

#: Seconds of silence after which the Hub counts as gone; the client alone would wait for ever.
SILENCE = 300.0
#: Bytes/s below which the upload of a file counts as hanging.
SLOWEST = 100_000

T = TypeVar("T")
# KeyError: an answer that lacks something
HUB_ERRORS = (HTTPError, OSError, RuntimeError, ValueError, KeyError, EntryNotFoundError, FileDuplicationError)

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]{6,}")
_UNPRINTABLE = re.compile(r"[\x00-\x20\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]+")
_QUOTA = re.compile(r"(?i)quota|storage|limit|exceed|payment|billing")
# how hf_xet begins its errors; what follows may quote the server, or an address with a signature
_XET = re.compile(
    r"((?:Authentication|Network|Server|Data integrity|Configuration|Internal|Task|Previous task) error"
    r"|Rate limited|Timeout|Not found|Operation cancelled|User cancelled|Wrong runtime mode): "
    r"(?:Request error: HTTP status (?:client|server) error \((\d{3}))?"
)


class PushError(ShiftDCError):
    """The Hub did not take the checkpoint, for a reason that is not the caller's."""


@contextmanager
def client_timeouts() -> Iterator[None]:
    """Give up on a silent server, and keep the client from printing: its warnings may quote what the server says."""
    session, verbosity, bars = get_session(), hub_logging.get_verbosity(), not are_progress_bars_disabled()
    before, session.timeout = session.timeout, Timeout(SILENCE)
    hub_logging.set_verbosity(logging.CRITICAL)
    disable_progress_bars()
    try:
        yield
    finally:
        session.timeout = before
        hub_logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()


@contextmanager
def deadline(size: int) -> Iterator[None]:
    """End an upload of `size` bytes by hf_xet, which waits for some answers without a limit. Raises TimeoutError."""
    limit, over = SILENCE + size / SLOWEST, threading.Event()

    def end() -> None:
        over.set()
        abort_xet_session()  # does nothing where Xet is not in use

    timer = threading.Timer(limit, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (RuntimeError, KeyboardInterrupt) as error:
        if not over.is_set() or error.__cause__ is not None:
            raise
        raise TimeoutError(f"Xet: no end after {limit:.0f} s") from None
    finally:
        timer.cancel()


def ask(what: str, call: Callable[[], T], translate: Callable[[Exception], ShiftDCError | None] = lambda error: None) -> T:
    """Call the Hub; its errors become ours."""
    try:
        return call()
    except HUB_ERRORS as error:
        failure = translate(error) or _failure(error, what)
    raise failure  # outside of the handler, so that it does not carry the original with its headers


def _failure(error: Exception, what: str) -> ShiftDCError:
    reason, status = reason_of(error), status_of(error)
    if isinstance(error, OfflineModeIsEnabled):
        return InputError("--push: HF_HUB_OFFLINE is set; unset it to push.")
    if status == 401:
        return InputError(f"--push: the Hub does not accept the token for {what} ({reason}); log in again with 'hf auth login'.")
    if status in (402, 413, 507) or (status == 403 and _QUOTA.search(reason)):
        return PushError(f"--push: the Hub has no room for {what} ({reason}); free storage or change the plan, then push again.")
    if status == 403:
        return InputError(f"--push: the token may not do this with {what} ({reason}); log in with one that may.")
    if status in (409, 412):
        return PushError(f"--push: {what} was changed by someone else meanwhile ({reason}); look at it, then push again.")
    return PushError(f"--push: {what} could not be reached or served ({reason}); push again, what has arrived is not sent twice.")


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error; the client wraps those of uploads."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code
    if error.__cause__ is not None:
        return status_of(error.__cause__)
    xet = _XET.match(str(error))
    return int(xet[2]) if xet and xet[2] else None


def is_transient(error: Exception) -> bool:
    """Cut off, or refused for now. Errors of uploads are wrapped, and the client has repeated those already."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    return isinstance(error, TransportError) or status in (429, 500, 502, 503, 504)


def cannot_copy(error: Exception) -> bool:
    """The server, or the client, refuses to copy; being out of quota, time or rights is something else."""
    if isinstance(error, GatedRepoError):
        return True
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        refused = (
            error.response.request.url.path.endswith("/lfs-files/duplicate")
            and status < 500
            and status not in (401, 402, 413, 429)
        )
        return refused and not (status == 403 and _QUOTA.search(reason_of(error)))
    if isinstance(error, FileDuplicationError):
        return not _QUOTA.search(str(error))
    return isinstance(error, EntryNotFoundError) or (isinstance(error, ValueError) and "duplicate LFS file" in str(error))


def reason_of(error: BaseException) -> str:
    """What went wrong, on one line, without the token."""
    if isinstance(error, HfHubHTTPError):
        said = error.server_message or type(error).__name__
        return clean(f"{error.response.status_code}: {said}")
    if error.__cause__ is not None:
        return reason_of(error.__cause__)
    if xet := _XET.match(str(error)):
        return " ".join(["Xet:", *filter(None, xet.groups())])
    return clean(f"{type(error).__name__}: {error}")


def clean(text: str) -> str:
    """One printable line of at most 300 characters in which no token stands."""
    token = get_token()
    if token:
        text = text.replace(token, "<token>")
    return _UNPRINTABLE.sub(" ", _TOKEN.sub("<token>", text)).strip()[:300]
