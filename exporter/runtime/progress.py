"""Progress: what is called while work goes on, and bars on stderr that show it."""

from __future__ import annotations

from collections.abc import Callable

#: Called with (stage, done, total).
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Show no progress."""
