"""Where the cases make their files: copies of a tiny base model and of an export, a calibration set, and the command to run."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """`build` makes the bad input and returns the command's arguments; the sentence must hold every one of `words`."""

    name: str
    build: Callable[[Workshop], list[Any]]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Workshop:
    """`folder` is the current folder; what `whole_*` name must not be changed."""

    folder: Path
    whole_base: Path
    whole_sharded: Path
    whole_export: Path
    whole_calibration: Path

    def base(self, name: str = "base", sharded: bool = False) -> Path:
        return _copy(self.whole_sharded if sharded else self.whole_base, self.folder / name)

    def export(self) -> Path:
        return _copy(self.whole_export, self.folder / "export")

    def file(self, name: str, content: str | bytes) -> Path:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    def pipe(self, name: str) -> Path:
        """A named pipe: who opens it to read waits for ever."""
        os.mkfifo(self.folder / name)
        return self.folder / name

    def calibrate(self, base: Path | str | None = None, *options: object, **changed: object) -> list[Any]:
        """The arguments of an export to ./out; `changed` options win."""
        named = {"output": "out", "layers": "1", "calibration": self.whole_calibration, **changed}
        given = [word for key, value in named.items() for word in (f"--{key.replace('_', '-')}", value)]
        return [*given, "--quiet", *options, "--", base if base is not None else self.whole_base]


def _copy(source: Path, target: Path) -> Path:
    """Small files are copied; shards are linked, and must be replaced rather than changed."""
    return shutil.copytree(
        source, target, copy_function=lambda a, b: os.link(a, b) if a.endswith(".safetensors") else shutil.copy(a, b)
    )


def replace(file: Path, content: str | bytes) -> None:
    """Write a file anew, never through a hard link."""
    file.unlink(missing_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


def edit_json(file: Path, **changes: Any) -> None:
    """Change keys of a JSON object; None removes one."""
    values = {**json.loads(file.read_text()), **changes}
    replace(file, json.dumps({k: v for k, v in values.items() if v is not None}))


def sparse(file: Path, size: int) -> Path:
    """A file of `size` zero bytes that takes no room."""
    file.unlink(missing_ok=True)
    with file.open("wb") as stream:
        stream.truncate(size)
    return file


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with any header, even one that lies about its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(start: int = 0, end: int = 4, dtype: object = "F32", shape: object = (1,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
