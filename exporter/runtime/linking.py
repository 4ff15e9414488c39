"""How a base's shards get into an output, so that whoever writes there never changes the base.

A clone, where the file system makes such. Else a hard link, but only to a file of a Hub cache: those are named by their content
and never changed, and a link makes them read-only, as the Hub's own client does with those that it shares. Else a copy.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Literal

from exporter.runtime.marker import is_marked

Way = Literal["clone", "link", "copy"]

#: Where the Hub's client keeps one file for several repositories, and the file in that folder that says so.
SHARED = ".huggingface-shared-blobs"
#: Hard links that the system refuses: to another disk, to somebody else's file, where there are none, or too many.
NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES)


def link_or_copy(source: Path, target: Path) -> Way:
    """Put a shard at `target`; whoever changes that file later leaves the source alone, unless he may write what is read-only."""
    source = source.resolve()  # a Hub cache holds symlinks, and os.link would link the link
    if _is_ours_alone(source):
        with suppress(OSError):
            os.link(source, target)
            return "copy"  # made a moment ago, for this
    if _cloned(source, target):
        return "clone"
    if is_hub_blob(source) and _linked(source, target):
        return "link"
    shutil.copyfile(source, target)
    return "copy"


def symlink_or_copy(source: Path, target: Path) -> None:
    """Put a shard into a folder of ours that is soon deleted, and in which nothing changes it."""
    try:
        target.symlink_to(source.resolve())
    except OSError:  # a file system, or a system, without symbolic links
        shutil.copyfile(source, target)


def clone_or_copy(source: Path, target: Path) -> None:
    """Clone, else copy: a file that can be changed and leaves the source alone."""
    if not _cloned(source.resolve(), target):
        shutil.copyfile(source, target)


def will_be_linked(source: Path, output: Path) -> bool:
    """Whether `link_or_copy` is going to link a shard into `output`, which need not exist; a clone is not foreseen."""
    source, folder = source.resolve(), output.absolute()
    while not folder.exists():
        folder = folder.parent
    return is_hub_blob(source) and _can_be_read_only(source) and source.stat().st_dev == folder.stat().st_dev


def is_hub_blob(file: Path) -> bool:
    """Whether a file, all links followed, is one of a Hub cache, under the name of its content."""
    folder = file.parent
    if folder.name == "blobs":
        return re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", file.name) is not None and folder.parent.name.startswith("models--")
    shared = re.fullmatch(r"[0-9a-f]{64}", file.name) is not None and folder.name == file.name[:2]
    return shared and (folder.parent / SHARED).is_file()


def _is_ours_alone(source: Path) -> bool:
    return is_marked(source.parent) and source.stat().st_nlink == 1


def _linked(source: Path, target: Path) -> bool:
    if not _can_be_read_only(source):
        return False
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        return False
    with suppress(OSError):
        target.chmod(target.stat().st_mode & 0o555)
    if not target.stat().st_mode & 0o222:
        return True
    target.unlink()
    return False


def _can_be_read_only(file: Path) -> bool:
    """On Windows such a file could not be deleted."""
    status = file.stat()
    return os.name != "nt" and (not status.st_mode & 0o222 or os.geteuid() in (0, status.st_uid))


def _cloned(source: Path, target: Path) -> bool:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return False
    ficlone = 0x40049409  # <linux/fs.h>
    with source.open("rb") as reader, target.open("wb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), ficlone, reader.fileno())
            return True
        except OSError:
            pass
    target.unlink()
    return False
