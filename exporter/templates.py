"""Chat templates come from others: jinja's sandbox limits what they reach, this module how long they take."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from exporter.errors import InputError

#: Seconds for the text of one batch of prompts, which takes milliseconds.
LIMIT = 10.0


def rendered(processor: Any, conversation: Sequence[Any], **options: Any) -> Any:
    """What the chat template of a processor or a tokenizer makes of one conversation, or of a list. Raises InputError."""
    with _limited():
        return processor.apply_chat_template(conversation, tokenize=False, **options)


@contextmanager
def _limited() -> Iterator[None]:
    """Raises InputError in the block after `LIMIT` seconds; a thread but the main one cannot be interrupted, nor Windows."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def end(*_: object) -> None:
        raise InputError(f"MODEL: its chat template does not end within {LIMIT:g} seconds; restore it, or give another model.")

    handler, (left, _) = signal.signal(signal.SIGALRM, end), signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, handler)
