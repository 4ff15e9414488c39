"""What a run has computed so far, kept until the export is done: a run that was killed goes on where it stopped.

A folder per fingerprint below `$SHIFTDC_CACHE` (default `~/.cache/shiftdc-export`), one safetensors file a batch, each written
under another name and renamed, with the SHA-256 of its tensors. Files hold numbers and never text; but token ids of captions can
be turned back into text, so only their owner may read them, and they are deleted when the export has succeeded.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from exporter.errors import InputError

CACHE = "SHIFTDC_CACHE"
FINGERPRINT = "fingerprint.json"

#: A full disk ends the keeping, not the run.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Store:
    """Tensors by name in one folder; `Store(None)` keeps nothing."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        #: How many values came from an earlier run.
        self.found = 0

    @classmethod
    def open(cls, fingerprint: Mapping[str, object]) -> Store:
        """The store of runs with the same fingerprint. Raises InputError where $SHIFTDC_CACHE cannot be used."""
        text = json.dumps(fingerprint, indent=2, sort_keys=True)
        given = os.environ.get(CACHE)
        root = Path(given) if given else Path("~/.cache/shiftdc-export").expanduser()
        folder = root / hashlib.sha256(text.encode()).hexdigest()[:32]
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / FINGERPRINT).write_text(text, "utf-8")
        except OSError as error:
            if given and error.errno not in FULL:
                raise InputError(f"{CACHE}: {root} cannot be written ({error.strerror}); give another folder.") from error
            return cls()  # a machine without a home: there is nothing to go on from, and no reason to stop
        return cls(folder)

    def get(self, name: str) -> torch.Tensor | None:
        """What is kept under `name`; None for nothing, and for a damaged file."""
        if self.folder is None:
            return None
        try:
            with safe_open(self._file(name), "pt") as stored:
                value, expected = stored.get_tensor("value"), stored.metadata()["sha256"]
        except (OSError, SafetensorError, KeyError, TypeError):
            return None
        if _digest(value) != expected:
            return None
        self.found += 1
        return value

    def put(self, name: str, value: torch.Tensor) -> None:
        """Keep `value`, unless the disk is full."""
        if self.folder is None:
            return
        value = value.contiguous()
        partial = self._file(name).with_suffix(f".{os.getpid()}.partial")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            save_file({"value": value}, partial, metadata={"sha256": _digest(value)})  # written with mode 0600
            partial.chmod(0o600)
            partial.replace(self._file(name))
        except (OSError, SafetensorError):
            self.clear()
            self.folder = None

    def clear(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name.replace(' ', '-')}.safetensors"


def _digest(value: torch.Tensor) -> str:
    about = f"{value.dtype} {list(value.shape)} ".encode()
    return hashlib.sha256(about + value.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
