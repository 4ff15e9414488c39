"""Mount points: folders that another file system, or another folder, was put upon. They cannot be renamed."""

from __future__ import annotations

import re
from pathlib import Path

#: Linux's table, which also has what is bound within one file system.
TABLE = Path("/proc/self/mountinfo")


def is_mount_point(folder: Path) -> bool:
    return folder.is_mount() or str(folder.resolve()) in _table()


def _table() -> set[str]:
    try:
        lines = TABLE.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:  # not on other systems
        return set()
    return {re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), line.split(" ")[4]) for line in lines}
