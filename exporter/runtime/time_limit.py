"""A limit on the time that a library computes on what comes from others, as patterns that never end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from exporter.errors import InputError


@contextmanager
def limited(seconds: float, sentence: str) -> Iterator[None]:
    """Raises InputError in the block after `seconds` of this thread's computing.

    A thread but the main one cannot be interrupted, nor Windows.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    start = time.thread_time()

    def end(*_: object) -> None:
        if (left := seconds - (time.thread_time() - start)) > 0:  # the timer counts all threads
            signal.setitimer(signal.ITIMER_PROF, left)
            return
        raise InputError(sentence)

    handler, (before, _) = signal.signal(signal.SIGPROF, end), signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, before)
        signal.signal(signal.SIGPROF, handler)
