"""Folders for a while, where the system keeps such: what killed runs left there goes with the next run, if it has the marker."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from exporter.runtime.locks import in_use, lock_of, release, try_lock
from exporter.runtime.marker import clear_away, is_marked, mark


@contextmanager
def temporary(purpose: str) -> Iterator[Path]:
    """A folder of this user's alone, empty but for the marker, removed at the end."""
    root = _root()
    if root is None:
        with tempfile.TemporaryDirectory(prefix=f"shiftdc-{purpose}-") as name:
            yield Path(name)
        return
    with lock_of(root):  # one run at a time looks around and makes its folder
        for left in root.iterdir():
            if is_marked(left) and not in_use(left):
                clear_away(left)
        folder = Path(tempfile.mkdtemp(prefix=f"{purpose}-", dir=root))
        mark(folder)
        lock = try_lock(folder)
    try:
        yield folder
    finally:
        clear_away(folder)
        release(lock)


def _root() -> Path | None:
    """The folder that holds them; None where it would be somebody else's, or there are no users."""
    if not hasattr(os, "getuid"):
        return None
    root = Path(tempfile.gettempdir()) / f"shiftdc-{os.getuid()}"
    with suppress(FileExistsError):
        root.mkdir(mode=0o700)
    found = root.lstat()
    return root if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077 else None
