"""Outputs that appear whole or not at all: written to a locked sibling, which takes the output's place at the end.

The lock is the kernel's, on the sibling folder itself, so that it ends with its process however that dies: what is not locked is
a leftover, and the next run removes it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from exporter.bake import REPORT
from exporter.errors import InputError, WriteError
from exporter.locks import in_use, lock_of, release, try_lock

#: What temporary siblings are for.
PURPOSES = ("partial", "sweep", "merged", "offload", "verify")
#: Bytes of a file name, less what staging adds to it.
NAME_BYTES = 255 - len(".") - len(".partial-12345678")


def check_output(output: Path, force: bool) -> None:
    """Raise InputError unless `output` can be written, and is free, or is an earlier export and `force` is given."""
    place = _absolute(output)
    try:
        if len(os.fsencode(place.name)) > NAME_BYTES or "\0" in str(place):
            raise InputError(f"--output: {output} is no usable name; give one of at most {NAME_BYTES} bytes.")
        if place.is_symlink():
            raise InputError(f"--output: {output} is a symbolic link; give the folder that it stands for.")
        _check_parent(output, place.parent)
        if not place.exists() or (place.is_dir() and not any(place.iterdir())):
            return
        ours = (place / REPORT).is_file()
    except OSError as error:
        raise InputError(f"--output: {output} cannot be used ({error.strerror}); give another folder.") from None
    if not ours:
        raise InputError(f"--output: {output} exists and is no export of this tool; give another folder.")
    if not force:
        raise InputError(f"--output: {output} exists; give another folder, or --force to replace it.")


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
        for folder in _missing(place.parent):
            folder.mkdir(exist_ok=True)
            stack.callback(_remove_if_empty, folder)
        staging = stack.enter_context(_sibling(place, lambda: check_output(place, force)))
        yield staging
        check_output(output, force)
        swap(staging, place)


@contextmanager
def replaced(output: Path, check: Callable[[], None]) -> Iterator[Path]:
    """As `staged`, for a folder inside an export; `check` raises InputError where what is there may not be replaced."""
    place = _absolute(output)
    with _disk(output), _sibling(place, check) as staging:
        yield staging
        swap(staging, place)


@contextmanager
def scratch(output: Path, purpose: str) -> Iterator[Path]:
    """A folder beside `output`, so that files can be hard-linked to it, that is removed at the end, or by the next run."""
    place = _absolute(output)
    folder, lock = _locked_folder(place, purpose)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
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
        raise WriteError(f"{output} was not written ({error.strerror or error}{where}); see to it and run again.") from None
    except SafetensorError as error:  # how it reports a full disk
        raise WriteError(f"{output} was not written ({error}); see to it and run again.") from None


def _absolute(output: Path) -> Path:
    return Path(os.path.abspath(output))  # noqa: PTH100 (resolve() would follow a link that must be seen)


def _missing(folder: Path) -> list[Path]:
    """The folders to be made, from the outermost on."""
    return [] if folder.exists() else [*_missing(folder.parent), folder]


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def _sibling(place: Path, check: Callable[[], None]) -> Iterator[Path]:
    with lock_of(place.parent):  # one run at a time looks around and makes its folder
        _clear_up(place)
        check()  # an earlier export may have come back
        folder, lock = _locked_folder(place, "partial")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        release(lock)


def _clear_up(place: Path) -> None:
    """Remove what killed runs left. Raises InputError where a run is alive."""
    beside = [f for f in place.parent.iterdir() if f.name.startswith(f".{place.name}.") and f.is_dir() and not f.is_symlink()]
    left = [f for f in beside if f.name.startswith(tuple(f".{place.name}.{p}-" for p in PURPOSES))]
    if any(in_use(folder) for folder in (*left, place)):  # a run that has swapped holds the lock of its output
        raise InputError(f"--output: another run is writing to {place} now; wait for its end, or give another folder.")
    for old in (f for f in beside if f.name.startswith(f".{place.name}.old-")):
        if place.exists():
            left.append(old)
        else:  # killed between the two steps of swap
            old.rename(place)
    for folder in left:
        shutil.rmtree(folder)


def swap(staging: Path, place: Path) -> None:
    """Put `staging`, a sibling of purpose "partial", in the place of `place`, which may exist."""
    if not place.exists():
        staging.rename(place)
        return
    old = place.with_name(staging.name.replace(".partial-", ".old-"))
    place.rename(old)
    try:
        staging.rename(place)
    except OSError:
        old.rename(place)
        raise
    removed = old.rename(staging)  # under a name that says that it is not whole any more
    shutil.rmtree(removed)


def _locked_folder(place: Path, purpose: str) -> tuple[Path, int | None]:
    folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.{purpose}-", dir=place.parent))
    folder.chmod(0o755)
    return folder, try_lock(folder)
