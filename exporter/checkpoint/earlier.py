"""An earlier output that is to be replaced: which files are the tool's, as its report lists them, and which are its owner's.

Only a file whose content is the one listed is the tool's: what was changed since is somebody's work.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from exporter.checkpoint.layout import REPORT
from exporter.runtime.hashing import sha256
from exporter.runtime.marker import MARKER, is_marked, unmark
from exporter.runtime.reading import UnreadableError, read_json

#: What a killed run leaves beside a file that it was writing.
PARTIAL = ".partial"


class Stamp(NamedTuple):
    """What tells whether a file is still the one that was looked at."""

    inode: int
    size: int
    changed: int  # nanoseconds; not the time of the inode, which a new hard link changes

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Contents:
    """`ours`: files by path that may be deleted while they have their stamp. `others`: names of everything else, for people."""

    ours: Mapping[str, Stamp]
    others: tuple[str, ...]


NOTHING = Contents({}, ())


def few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def listed(folder: Path) -> dict[str, str]:
    """SHA-256 by path of the files that the report in `folder` lists. Raises UnreadableError."""
    report = read_json(folder / REPORT)
    files = report.get("files") if isinstance(report, dict) else None
    if not isinstance(files, dict) or not all(isinstance(hashed, str) for hashed in files.values()):
        raise UnreadableError("it has no list of files")
    return files


def contents(folder: Path, files: Mapping[str, str]) -> Contents:
    """What there is below `folder`, links never followed, against a list of files by path. Raises OSError."""
    ours: dict[str, Stamp] = {}
    others: list[str] = []
    for path in _leaves(folder):
        status = (folder / path).lstat()
        if stat.S_ISREG(status.st_mode) and _is_ours(folder, path, status, files):
            ours[path] = Stamp.of(status)
        else:
            others.append(_shown(path, files))
    return Contents(ours, tuple(dict.fromkeys(others)))


def remove(folder: Path, found: Contents) -> list[str]:
    """Delete what is still as it was, then the marker, and folders that are empty then; paths of what is left."""
    for path in sorted(found.ours, key=lambda path: path == REPORT):  # while that is there, the rest can be told again
        with suppress(OSError):
            if Stamp.of((folder / path).lstat()) == found.ours[path]:
                (folder / path).unlink()
    unmark(folder)  # what cannot be deleted is not tried again
    for at, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):
            Path(at).rmdir()
    return list(_leaves(folder)) if folder.exists() else []


def _leaves(folder: Path) -> Iterator[str]:
    """Paths of files, of links, and of folders without content."""

    def stop(error: OSError) -> None:
        raise error

    for at, folders, files in os.walk(folder, onerror=stop):
        here = Path(at)
        links = [name for name in folders if (here / name).is_symlink()]
        yield from ((here / name).relative_to(folder).as_posix() for name in sorted((*files, *links)))
        if not folders and not files and here != folder:
            yield here.relative_to(folder).as_posix()


def _is_ours(folder: Path, path: str, status: os.stat_result, files: Mapping[str, str]) -> bool:
    if path in (REPORT, MARKER) or (path.endswith(PARTIAL) and path.removesuffix(PARTIAL) in (REPORT, *files)):
        return True
    if any(f"{PARTIAL}-" in above.name and is_marked(folder / above) for above in Path(path).parents):
        return True  # of a killed run that wrote into the export
    if path not in files:
        return False
    if status.st_nlink > 1:  # what goes is a name; the content stays under another
        return True
    return _sha256(folder / path, Stamp.of(status)) == files[path]


@lru_cache(maxsize=4096)
def _sha256(file: Path, stamp: Stamp) -> str:
    """Hashed once, although it is asked for before the work and again at its end."""
    return sha256(file)


def _shown(path: str, files: Mapping[str, str]) -> str:
    """A path; of a folder that holds nothing listed, the folder."""
    if path in files:
        return f"{path} (changed since)"
    top, _, below = path.partition("/")
    return path if not below or any(file.startswith(f"{top}/") for file in files) else top
