"""The file by which folders beside an output are known as this tool's: nothing without it is removed or renamed."""

from __future__ import annotations

import shutil
import stat
from contextlib import suppress
from pathlib import Path

MARKER = ".shiftdc-export"
TEXT = "A folder of a run of shiftdc-export, which the next run for the same output removes or puts back.\n"


def mark(folder: Path) -> None:
    (folder / MARKER).write_text(TEXT, "utf-8")


def unmark(folder: Path) -> None:
    with suppress(OSError):
        (folder / MARKER).unlink()


def is_marked(folder: Path) -> bool:
    """Whether it is a folder, no link to one, and holds the marker as `mark` writes it."""
    file = folder / MARKER
    try:
        kinds = folder.lstat().st_mode, file.lstat().st_mode
        return stat.S_ISDIR(kinds[0]) and stat.S_ISREG(kinds[1]) and file.read_bytes() == TEXT.encode()
    except OSError:
        return False


def clear_away(folder: Path) -> None:
    """Delete a folder, the marker last: of a run that is killed amid this, the next one finds what to delete."""
    with suppress(OSError):
        for below in folder.iterdir():
            if below.is_dir() and not below.is_symlink():
                shutil.rmtree(below, ignore_errors=True)
            elif below.name != MARKER:
                below.unlink()
        if [below.name for below in folder.iterdir()] == [MARKER]:
            unmark(folder)
        folder.rmdir()
