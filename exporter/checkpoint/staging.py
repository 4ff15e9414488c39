"""Outputs that appear whole or not at all: written to a locked sibling, which takes the output's place at the end.

The lock is the kernel's, on the sibling folder itself, so that it ends with its process however that dies: what is not locked is
a leftover. The next run removes it, if the marker in it says that it is this tool's.

Of an earlier export that is replaced, only the files are deleted that its report lists, as they were written.
"""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from exporter.checkpoint.earlier import NOTHING, Contents, contents, few, listed, remove
from exporter.checkpoint.layout import REPORT
from exporter.errors import InputError, WriteError, printable
from exporter.runtime.locks import in_use, lock_of, release, try_lock
from exporter.runtime.marker import clear_away, is_marked, mark, unmark
from exporter.runtime.mounts import is_mount_point
from exporter.runtime.reading import UnreadableError

#: What temporary siblings are for.
PURPOSES = ("partial", "sweep", "merged", "offload", "verify")
#: Bytes of a file name, less what staging adds to it.
NAME_BYTES = 255 - len(".") - len(".partial-12345678")

#: What a disk says that is full: it could hold a folder, were there room.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

log = logging.getLogger(__name__)


def check_output(output: Path, force: bool) -> Contents:
    """What is in `output` now. Raises InputError unless it can be written, and is free, or is an earlier export, `force` is given
    and nothing in it would be lost.
    """
    place = _absolute(output)
    try:
        if len(os.fsencode(place.name)) > NAME_BYTES or "\0" in str(place):
            raise InputError(f"--output: {output} is no usable name; give one of at most {NAME_BYTES} bytes.")
        if place.is_symlink():
            raise InputError(f"--output: {output} is a symbolic link; give the folder that it stands for.")
        _check_parent(output, place.parent)
        if place.is_dir() and is_mount_point(place):
            raise InputError(
                f"--output: {output} is a mount point, and a finished export takes its place as a whole; give a folder below it, "
                f"as {output / 'model'}."
            )
        if not place.exists() or (place.is_dir() and not any(place.iterdir())):
            return NOTHING
        if not (place / REPORT).is_file():
            raise InputError(f"--output: {output} exists and is no export of this tool; give another folder.")
        if not force:
            raise InputError(f"--output: {output} exists; give another folder, or --force to replace it.")
        return _replaceable(output, place)
    except OSError as error:
        raise InputError(f"--output: {output} cannot be used ({error.strerror}); give another folder.") from error


def _replaceable(output: Path, place: Path) -> Contents:
    """What is in an earlier export, all of it the tool's. Raises InputError."""
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"--output: {output} is read-only, so it cannot be replaced; give another folder.")
    try:
        found = contents(place, listed(place))
    except UnreadableError as error:
        raise InputError(
            f"--output: the {REPORT} in {output} does not tell which files are the export's ({error}); give another folder."
        ) from error
    if found.others:
        raise InputError(
            f"--output: {output} holds what is no part of the export there ({few(found.others)}); "
            "move that away, or give another folder."
        )
    return found


def _check_parent(output: Path, parent: Path) -> None:
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"--output: {output} lies below {parent}, which is no folder; give another folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"--output: {parent} is read-only, or not yours to write; give a folder elsewhere.")


@contextmanager
def staged(output: Path, force: bool) -> Iterator[Path]:
    """A folder beside `output` that takes its place at the end; after an exception nothing is left of it.

    Raises InputError where another run is writing to `output`, WriteError where the disk is full or refuses.
    """
    check_output(output, force)
    place = _absolute(output)
    with _disk(output), ExitStack() as stack:
        with _able_to_hold_folders(output):
            for folder in _missing(place.parent):
                folder.mkdir(exist_ok=True)
                stack.callback(_remove_if_empty, folder)
            staging = stack.enter_context(_sibling(place, lambda: check_output(place, force)))
        yield staging
        swap(staging, place, check_output(output, force))


@contextmanager
def replaced(output: Path, check: Callable[[], Contents]) -> Iterator[Path]:
    """As `staged`, for a folder inside an export; `check` raises InputError where what is there may not be replaced."""
    place = _absolute(output)
    check()
    with _disk(output), _sibling(place, check) as staging:
        yield staging
        swap(staging, place, check())


@contextmanager
def scratch(output: Path, purpose: str) -> Iterator[Path]:
    """A folder beside `output`, on the same disk, that is removed at the end, or by the next run."""
    place = _absolute(output)
    folder, lock = _locked_folder(place, purpose)
    try:
        yield folder
    finally:
        clear_away(folder)
        release(lock)


def write_together(folder: Path, contents: Mapping[str, bytes | str]) -> None:
    """Write files by path below `folder`: all are written under other names first, then put in place in the order given."""
    partials = {folder / path: folder / f"{path}.partial" for path in contents}
    try:
        for (file, partial), content in zip(partials.items(), contents.values(), strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    except BaseException:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
        raise
    for file, partial in partials.items():
        partial.replace(file)


@contextmanager
def _disk(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f", at {error.filename}" if error.filename else ""
        raise WriteError(f"{output} was not written ({error.strerror or error}{where}); see to it and run again.") from error
    except SafetensorError as error:  # how it reports a full disk
        raise WriteError(f"{output} was not written ({error}); see to it and run again.") from error


@contextmanager
def _able_to_hold_folders(output: Path) -> Iterator[None]:
    """Where the first folder and the first file in it cannot be made, the place is wrong and not the disk."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise
        where = f", at {error.filename}" if error.filename else ""
        raise InputError(
            f"--output: no folder can be made at {output} ({error.strerror or error}{where}); give a folder elsewhere."
        ) from error


def _absolute(output: Path) -> Path:
    return Path(os.path.abspath(output))  # noqa: PTH100 (resolve() would follow a link that must be seen)


def _missing(folder: Path) -> list[Path]:
    """The folders to be made, from the outermost on."""
    return [] if folder.exists() else [*_missing(folder.parent), folder]


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def _sibling(place: Path, check: Callable[[], object]) -> Iterator[Path]:
    with lock_of(place.parent):  # one run at a time looks around and makes its folder
        _clear_up(place)
        check()  # an earlier export may have come back
        folder, lock = _locked_folder(place, "partial")
    try:
        yield folder
    finally:
        clear_away(folder)
        release(lock)


def _clear_up(place: Path) -> None:
    """Remove what killed runs left. Raises InputError where a run is alive."""
    beside = [f for f in place.parent.iterdir() if f.name.startswith(f".{place.name}.") and is_marked(f)]

    def named(*purposes: str) -> list[Path]:
        return [f for f in beside if f.name.startswith(tuple(f".{place.name}.{purpose}-" for purpose in purposes))]

    if any(in_use(folder) for folder in (*named(*PURPOSES), place)):  # a run that has swapped holds the lock of its output
        raise InputError(f"--output: another run is writing to {place} now; wait for its end, or give another folder.")
    for old in named("old"):
        if place.exists():
            _discard(place, old, None)
        else:  # killed between the two steps of swap
            old.rename(place)
            unmark(place)
    for gone in named("before"):
        _discard(place, gone, None)
    for folder in named(*PURPOSES):
        clear_away(folder)


def swap(staging: Path, place: Path, before: Contents) -> None:
    """Put `staging`, a sibling of purpose "partial", in the place of `place`, which may exist and hold `before`.

    Of that only the files of `before` are deleted; anything else stays beside `place`, and a warning says so.
    """
    if not place.exists():
        staging.rename(place)
        unmark(place)
        return
    old = place.with_name(staging.name.replace(".partial-", ".old-"))
    with suppress(OSError):  # without it the next run would not put the folder back, if this one is killed now
        mark(place)
    place.rename(old)
    try:
        staging.rename(place)
    except OSError:
        old.rename(place)
        unmark(place)
        raise
    unmark(place)
    _discard(place, old, before)


def _discard(place: Path, old: Path, before: Contents | None) -> None:
    """Delete of a folder that `place` has replaced what was the tool's: the files of `before`, or those that its report lists."""
    gone = old.with_name(old.name.replace(".old-", ".before-"))  # it is not whole from now on, and must not come back
    old.rename(gone)
    if before is None:
        with suppress(UnreadableError):  # without a report nothing but its marker is known to be the tool's
            before = contents(gone, listed(gone))
    if left := remove(gone, before or NOTHING):
        sentence = (
            f"{place} is in place. Of what it replaced, some files cannot be deleted, or were no part of it ({few(left)}); "
            f"they are in {gone}."
        )
        log.warning("%s", printable(sentence))


def _locked_folder(place: Path, purpose: str) -> tuple[Path, int | None]:
    folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.{purpose}-", dir=place.parent))
    try:
        mark(folder)
        folder.chmod(0o755)
        return folder, try_lock(folder)
    except BaseException:
        unmark(folder)
        _remove_if_empty(folder)
        raise
