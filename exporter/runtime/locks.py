"""The kernel's locks on folders: they end with their process, however that dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows: no locks, and leftovers stay
    fcntl = None  # type: ignore[assignment]


def in_use(folder: Path) -> bool:
    """Whether another process holds the lock of a folder."""
    if fcntl is None or not folder.is_dir():
        return False
    lock = try_lock(folder)
    release(lock)
    return lock is None


def try_lock(folder: Path) -> int | None:
    """A descriptor that holds the lock of a folder; None where another process holds it."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks
        pass
    return descriptor


def release(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


@contextmanager
def lock_of(folder: Path) -> Iterator[None]:
    """Wait for the lock of a folder, which others hold for a moment only."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
