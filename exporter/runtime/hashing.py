"""SHA-256 of files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

#: A function from a file to its SHA-256.
HashOf = Callable[[Path], str]


@contextmanager
def background_hashes(files: Iterable[Path]) -> Iterator[HashOf]:
    """A function that gives the SHA-256 of one of `files`; a thread computes them from now on, beside what the block does."""
    with ThreadPoolExecutor(1, "sha256") as pool:
        hashes = {file: pool.submit(sha256, file) for file in files}
        try:
            yield lambda file: hashes[file].result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
