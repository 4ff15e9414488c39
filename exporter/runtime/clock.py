"""Stages of a run, and how long each took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from exporter.runtime.progress import Progress


class Clock:
    """Tells progress of each stage, and keeps how long it took, in `seconds`."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self.progress = progress

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self.progress(name, 0, 1)
        yield
        self.progress(name, 1, 1)
        self.seconds[name] = round(time.perf_counter() - start, 3)
