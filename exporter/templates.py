"""Chat templates come from others: jinja's sandbox limits what they reach, this module how long they take."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from exporter.errors import InputError
from exporter.verify_worker import on_the_day

#: Seconds of computing for the text of one batch of prompts, which takes milliseconds.
LIMIT = 10.0
#: The day that templates write, if they write one: nothing in a checkpoint depends on when it was made.
DAY = "2025-01-01"
#: A template that puts out what another one has made already.
_AS_RENDERED = "{{ messages[0]['rendered'] }}"


def rendered(processor: Any, conversation: Sequence[Any], what: str = "MODEL", **options: Any) -> Any:
    """What the chat template of a processor or a tokenizer makes of one conversation, or of a list. Raises InputError.

    what: whose template it is, for the message.
    """
    with _limited(what), on_the_day(DAY):
        return processor.apply_chat_template(conversation, tokenize=False, **options)


def encoded(processor: Any, conversations: Sequence[Sequence[dict[str, Any]]], **options: Any) -> Any:
    """The inputs that a processor makes of conversations, with the generation prompt at their end. Raises InputError.

    All but the template's own rendering, which alone is limited, is `apply_chat_template`'s.
    """
    texts = rendered(processor, list(conversations), add_generation_prompt=True)
    marked = [[{**first, "rendered": text}, *others] for (first, *others), text in zip(conversations, texts, strict=True)]
    return processor.apply_chat_template(marked, chat_template=_AS_RENDERED, tokenize=True, return_dict=True, **options)


@contextmanager
def _limited(what: str) -> Iterator[None]:
    """Raises InputError in the block after `LIMIT` seconds of this thread's computing; waiting, and what other threads and other
    processes do meanwhile, are not counted. A thread but the main one cannot be interrupted, nor Windows.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    start = time.thread_time()

    def end(*_: object) -> None:
        if (left := LIMIT - (time.thread_time() - start)) > 0:  # the timer counts all threads
            signal.setitimer(signal.ITIMER_PROF, left)
            return
        raise InputError(f"{what}: its chat template does not end within {LIMIT:g} seconds of computing; restore it.")

    handler, (before, _) = signal.signal(signal.SIGPROF, end), signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, before)
        signal.signal(signal.SIGPROF, handler)
