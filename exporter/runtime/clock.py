"""Stages of a run, and how long each took."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from exporter.runtime.progress import Progress

T = TypeVar("T")


class Clock:
    """Runs stages and keeps how long each took."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self.progress = progress

    def stage(self, name: str, run: Callable[[], T]) -> T:
        start = time.perf_counter()
        self.progress(name, 0, 1)
        result = run()
        self.progress(name, 1, 1)
        self.seconds[name] = round(time.perf_counter() - start, 3)
        return result
