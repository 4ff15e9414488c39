"""The base checkpoint: where it lies, what it is, and that it can be exported, all from file headers.

Nothing is loaded here and nothing in the base folder is ever written.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from exporter.errors import InputError

DEMO = "demo"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: What is copied beside the weights: text and processing, never code, never other weights.
COMPANIONS = (
    "tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.*",
    "additional_chat_templates/*.jinja", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
#: What is fetched from the Hub.
DOWNLOADED = ("config.json", "*.safetensors", "model.safetensors.index.json", "README.md", *COMPANIONS)


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a safetensors file: `dtype` as safetensors names it ("F32", "BF16"), `shape`, size in `bytes`."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class BaseCheckpoint:
    """A checkpoint on disk that passed the checks of `resolve`."""

    name: str
    revision: str | None
    folder: Path
    config: Mapping[str, Any]
    shards: tuple[Path, ...]

    @property
    def model_type(self) -> str:
        return self.config["model_type"]

    @property
    def short_name(self) -> str:
        return self.name.rstrip("/").rsplit("/", 1)[-1]

    @cached_property
    def headers(self) -> dict[Path, dict[str, TensorHeader]]:
        return {shard: read_header(shard) for shard in self.shards}

    @cached_property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(t.bytes for header in self.headers.values() for t in header.values())

    @cached_property
    def companions(self) -> tuple[Path, ...]:
        """Tokenizer, processor, template and licence files, relative to `folder`."""
        found = {f.relative_to(self.folder) for pattern in COMPANIONS for f in self.folder.glob(pattern) if f.is_file()}
        return tuple(sorted(found))

    @property
    def has_chat_template(self) -> bool:
        if any(f.name.startswith("chat_template.") for f in self.companions):
            return True
        files = [self.folder / n for n in ("processor_config.json", "tokenizer_config.json")]
        return any("chat_template" in _read_json(f) for f in files if f.exists())


def resolve(model: str, revision: str | None = None) -> BaseCheckpoint:
    """Find MODEL (`demo`, a folder or a Hub id) and check that it can be exported. Raises InputError."""
    if model == DEMO:
        folder, revision = Path(__file__).parent / "demo" / "model", None
    elif Path(model).is_dir():
        folder, revision = Path(model).resolve(), None
    elif (os.sep in model and model.count("/") != 1) or model.startswith((".", "~")):
        raise InputError(f"MODEL: there is no folder {model}; give a Hub id (owner/name), an existing folder, or 'demo'.")
    else:
        folder, revision = _download(model, revision)
    name = model if not Path(model).is_dir() else folder.name
    return _checked(name, revision, folder)


def _download(model: str, revision: str | None) -> tuple[Path, str]:
    from httpx2 import HTTPError  # what huggingface_hub speaks HTTP with
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=list(DOWNLOADED)))
    except GatedRepoError:
        raise InputError(f"MODEL: {model} is gated; accept its terms on its page and log in with 'hf auth login'.") from None
    except RevisionNotFoundError:
        raise InputError(f"MODEL: {model} has no revision {revision!r}; give an existing branch, tag or commit.") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"MODEL: {model} is neither an existing folder nor a model on the Hub that you can see; "
            "check the spelling, or log in with 'hf auth login' if it is private."
        ) from None
    except HFValidationError:
        raise InputError(f"MODEL: {model!r} is neither an existing folder nor a Hub id of the form owner/name.") from None
    except LocalEntryNotFoundError:
        raise InputError(
            f"MODEL: {model} is not in the local cache and the Hub cannot be reached; check the connection."
        ) from None
    except HTTPError as error:
        raise InputError(f"MODEL: {model} cannot be fetched from the Hub ({type(error).__name__}); try again.") from None
    return folder, folder.name  # a snapshot folder is named after its commit


def _checked(name: str, revision: str | None, folder: Path) -> BaseCheckpoint:
    if not (folder / "config.json").is_file():
        raise InputError(f"MODEL: {folder} holds no config.json; give the folder of a transformers checkpoint.")
    config = _read_json(folder / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"MODEL: {folder / 'config.json'} names no model_type; give a transformers checkpoint.")
    if model_type.startswith("shiftdc_"):
        raise InputError(f"MODEL: {name} is calibrated already (model_type {model_type}); give its base model instead.")
    return BaseCheckpoint(name, revision, folder, config, _shards(folder))


def _shards(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint, each checked to lie in `folder` and to hold the tensors that the index says."""
    if (folder / SINGLE).is_file():  # transformers prefers it to an index
        return (folder / SINGLE,)
    if not (folder / INDEX).is_file():
        pickles = sorted(f.name for f in folder.glob("*.bin"))
        found = f"found only pickle files ({pickles[0]}, ...), which can run code when loaded" if pickles else "found none"
        raise InputError(
            f"MODEL: {folder} holds no safetensors weights ({SINGLE} or {INDEX} expected, {found}); "
            "convert the checkpoint with save_pretrained() or take a revision that has safetensors."
        )
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"MODEL: {folder / INDEX} has no usable weight_map; fetch the checkpoint again.")
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError(
                f"MODEL: {folder / INDEX} names {file!r}, expected safetensors files of the same folder; "
                "do not use this checkpoint."
            )
        if not (folder / file).is_file():
            raise InputError(f"MODEL: {folder / INDEX} names {file}, which is missing; fetch the checkpoint again.")
        missing = {k for k, v in weight_map.items() if v == file} - read_header(folder / file).keys()
        if missing:
            raise InputError(f"MODEL: {folder / file} lacks {min(missing)}, which the index expects; fetch the checkpoint again.")
    return tuple(folder / f for f in sorted(set(weight_map.values())))


def read_header(file: Path) -> dict[str, TensorHeader]:
    """Names, dtypes and shapes of a safetensors file, without its data. Raises InputError."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(file.stat().st_size - 8, 100_000_000):  # the format's own bound
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
            end = max((t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0)
            if file.stat().st_size != 8 + length + end:
                raise ValueError(f"expected {8 + length + end} bytes, found {file.stat().st_size}")
            return {
                name: TensorHeader(t["dtype"], tuple(t["shape"]), t["data_offsets"][1] - t["data_offsets"][0])
                for name, t in header.items()
                if name != "__metadata__"
            }
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"MODEL: {file} is not a whole safetensors file ({error}); fetch it again.") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"MODEL: {file} cannot be read as JSON ({error}); fetch the checkpoint again.") from None
    if not isinstance(value, dict):
        raise InputError(f"MODEL: {file} holds no JSON object; fetch the checkpoint again.")
    return value
