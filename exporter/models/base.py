"""The base checkpoint: where it lies, what it is, and that it can be exported, all from file headers.

First its small files (`resolve_small`), by which most that is wrong can be told; then its weights (`resolve_weights`). Nothing is
loaded here and nothing in the base folder is ever written.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from exporter.data.demo import MODEL as DEMO_MODEL
from exporter.errors import InputError
from exporter.models.hub_snapshot import download, listed_files
from exporter.models.shards import (
    INDEX,
    check_inside,
    checked_shards,
    has_weights,
    most_tensors,
    read_object,
    weight_files,
)
from exporter.runtime.reading import Json
from exporter.runtime.safetensors_header import TensorHeader, read_header

DEMO = "demo"

#: What transformers reads of a tokenizer, an image, video or audio processor, and of templates.
PROCESSING = (
    "tokenizer.json", "tokenizer.*.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tekken.json", "tokenizer.model", "tokenizer.model.v*", "tiktoken.model", "spiece.model",
    "spm.model", "sentencepiece.model", "sentencepiece.bpe.model", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip

#: Folders of a processor's parts, named as the processor's attributes: qformer_tokenizer, video_processor.
PARTS = ("*tokenizer*", "*processor*", "*feature_extractor*")

#: What is copied beside the weights: text and processing, never code, never other weights.
COMPANIONS = (
    *PROCESSING,
    *(f"{part}/{name}" for part in PARTS for name in PROCESSING),
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)

#: What is fetched from the Hub before anything large.
SMALL = ("config.json", INDEX, "README.md", *COMPANIONS)

#: Called with a line for the user.
Announce = Callable[[str], None]


def unannounced(line: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class BaseFiles:
    """A checkpoint's small files on disk."""

    name: str
    revision: str | None
    folder: Path
    config: Mapping[str, Json]

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def short_name(self) -> str:
        return self.name.rstrip("/").rsplit("/", 1)[-1]

    @cached_property
    def companions(self) -> tuple[Path, ...]:
        """Tokenizer, processor, template and licence files, relative to `folder`."""
        files = {f for pattern in COMPANIONS for f in self.folder.glob(pattern) if f.is_file() or f.is_symlink()}
        for file in sorted(files):
            check_inside(self.folder, file)
        return tuple(sorted(f.relative_to(self.folder) for f in files))

    @property
    def has_chat_template(self) -> bool:
        if any(f.name.startswith("chat_template.") for f in self.companions):
            return True
        files = [self.folder / n for n in ("processor_config.json", "tokenizer_config.json")]
        return any("chat_template" in read_object(f) for f in files if f.is_file())


@dataclass(frozen=True)
class SmallFiles(BaseFiles):
    """The small files, and the names and bytes of those with the weights, which may yet be fetched."""

    weights: Mapping[str, int]


@dataclass(frozen=True)
class BaseCheckpoint(BaseFiles):
    """A checkpoint on disk that passed the checks of `resolve`."""

    shards: tuple[Path, ...]

    @cached_property
    def headers(self) -> dict[Path, dict[str, TensorHeader]]:
        return {shard: read_header(shard) for shard in self.shards}

    @cached_property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(t.bytes for header in self.headers.values() for t in header.values())


def resolve(model: str, revision: str | None = None, announce: Announce = unannounced) -> BaseCheckpoint:
    """Find MODEL (`demo`, a folder or a Hub id) and check that it can be exported. Raises InputError."""
    return resolve_weights(resolve_small(model, revision), announce)


def resolve_small(model: str, revision: str | None = None) -> SmallFiles:
    """Find MODEL and check its small files; of a model on the Hub no weights are fetched. Raises InputError."""
    if not model or "\0" in model:
        raise InputError(
            "MODEL: the name is empty or holds a null character; give a Hub id (owner/name), an existing folder, or 'demo'."
        )
    if model == DEMO:
        folder, revision = DEMO_MODEL, None
    elif _is_folder(model):
        folder, revision = Path(model).resolve(), None
        check_path(folder, "MODEL")
    elif (os.sep in model and model.count("/") != 1) or model.startswith((".", "~")):
        raise InputError(f"MODEL: there is no folder {model}; give a Hub id (owner/name), an existing folder, or 'demo'.")
    else:
        folder, revision = download(model, revision, SMALL, "MODEL")
    name = folder.name if model != DEMO and revision is None else model
    config = _config(name, folder)
    here = {f.name: f.stat().st_size for f in folder.iterdir() if f.exists()}
    listed = here if revision is None or has_weights(folder, here) else listed_files(name, revision) | here
    files = SmallFiles(name, revision, folder, config, {n: listed[n] for n in weight_files(folder, listed)})
    _check_config(files, most_tensors(folder, files.weights))
    return files


def resolve_weights(files: SmallFiles, announce: Announce = unannounced) -> BaseCheckpoint:
    """Fetch the weights that are not on disk yet, after `announce` was told their size, and check them. Raises InputError."""
    absent = [name for name in files.weights if not (files.folder / name).exists()]
    if absent and files.revision is not None:
        size = sum(files.weights[name] for name in absent)
        announce(
            f"{files.name}: fetching {size / 1e9:.2f} GB of weights in {len(absent)} {'file' if len(absent) == 1 else 'files'}."
        )
        download(files.name, files.revision, [glob.escape(name) for name in absent], "MODEL")
    base = BaseCheckpoint(files.name, files.revision, files.folder, files.config, checked_shards(files.folder, files.weights))
    _check_config(base, sum(map(len, base.headers.values())))
    return base


def check_path(path: Path, option: str) -> None:
    """Raise InputError for a path that tokenizers and safetensors cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{option}: the path {path} is not UTF-8, so that its tokenizer cannot be opened; rename it.") from error


def _is_folder(path: str) -> bool:
    try:
        return Path(path).is_dir()
    except OSError:  # too long a name
        return False


def _config(name: str, folder: Path) -> dict[str, Json]:
    if not (folder / "config.json").exists():
        raise InputError(f"MODEL: {folder} holds no config.json; give the folder of a transformers checkpoint.")
    config = read_object(folder / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"MODEL: {folder / 'config.json'} names no model_type; give a transformers checkpoint.")
    if model_type.startswith("shiftdc_"):
        raise InputError(f"MODEL: {name} is calibrated already (model_type {model_type}); give its base model instead.")
    return config


def _check_config(base: BaseFiles, tensors: int) -> None:
    """Raise InputError for a config.json that asks for foreign code, or for more layers than there can be weights of."""
    for path, value in _entries(base.config):
        key, where = path.rsplit(".", 1)[-1], f"MODEL: {path} in {base.folder / 'config.json'}"
        if key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            raise InputError(f"{where} names code on the Hub ({value}), which is never run; remove the entry.")
        if key in ("num_hidden_layers", "n_layers", "depth") and isinstance(value, int) and not 0 <= value <= tensors:
            raise InputError(f"{where} is {value}, and the checkpoint has only {tensors} tensors; fetch the checkpoint again.")


def _entries(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Every key of nested mappings, as a path, with its value."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield f"{path}{key}", below
            yield from _entries(below, f"{path}{key}.")
