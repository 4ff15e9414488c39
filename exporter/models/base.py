"""The base checkpoint: where it lies, what it is, and that it can be exported, all from file headers.

First its small files (`resolve_small`), by which most that is wrong can be told; then its weights (`resolve_weights`). Nothing is
loaded here and nothing in the base folder is ever written.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from exporter.data.demo import MODEL as DEMO_MODEL
from exporter.errors import InputError
from exporter.models.hub_snapshot import download, listed_files
from exporter.runtime.reading import UnreadableError, read_json
from exporter.runtime.safetensors_header import TensorHeader, read_header

DEMO = "demo"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

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
    *PROCESSING, *(f"{part}/{name}" for part in PARTS for name in PROCESSING), "generation_config.json", "LICENSE*", "NOTICE*",
    "USE_POLICY*",
)  # fmt: skip

#: What is fetched from the Hub before anything large.
SMALL = ("config.json", INDEX, "README.md", *COMPANIONS)

#: More tensors than any checkpoint has in one file: what is assumed of one that is not fetched yet.
MOST_TENSORS = 10_000

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
    config: Mapping[str, Any]

    @property
    def model_type(self) -> str:
        return self.config["model_type"]

    @property
    def short_name(self) -> str:
        return self.name.rstrip("/").rsplit("/", 1)[-1]

    @cached_property
    def companions(self) -> tuple[Path, ...]:
        """Tokenizer, processor, template and licence files, relative to `folder`."""
        found = {f for pattern in COMPANIONS for f in self.folder.glob(pattern) if f.is_file() or f.is_symlink()}
        for file in sorted(found):
            _check_inside(self.folder, file)
        return tuple(sorted(f.relative_to(self.folder) for f in found))

    @property
    def has_chat_template(self) -> bool:
        if any(f.name.startswith("chat_template.") for f in self.companions):
            return True
        files = [self.folder / n for n in ("processor_config.json", "tokenizer_config.json")]
        return any("chat_template" in _read_json(f) for f in files if f.is_file())


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
        raise InputError("MODEL: it is no name; give a Hub id (owner/name), an existing folder, or 'demo'.")
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
    listed = here if revision is None or _has_weights(folder, here) else listed_files(name, revision) | here
    files = SmallFiles(name, revision, folder, config, {n: listed[n] for n in _weights(folder, listed)})
    _check_config(files, _most_tensors(folder, files.weights))
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
    base = BaseCheckpoint(files.name, files.revision, files.folder, files.config, _shards(files.folder, files.weights))
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


def _has_weights(folder: Path, here: Collection[str]) -> bool:
    """Whether a folder of the local cache needs nothing more from the Hub."""
    return SINGLE in here or (INDEX in here and set(_weight_map(folder).values()) <= set(here))


def _config(name: str, folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        raise InputError(f"MODEL: {folder} holds no config.json; give the folder of a transformers checkpoint.")
    config = _read_json(folder / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"MODEL: {folder / 'config.json'} names no model_type; give a transformers checkpoint.")
    if model_type.startswith("shiftdc_"):
        raise InputError(f"MODEL: {name} is calibrated already (model_type {model_type}); give its base model instead.")
    return config


def _weights(folder: Path, listed: Collection[str]) -> list[str]:
    """Names of the files with the weights that transformers would load, out of those that are `listed`."""
    if SINGLE in listed:  # transformers prefers it to an index
        return [SINGLE]
    if INDEX not in listed:
        pickles = sorted(name for name in listed if name.endswith(".bin"))
        found = f"found only pickle files ({pickles[0]}, ...), which can run code when loaded" if pickles else "found none"
        raise InputError(
            f"MODEL: {folder} holds no safetensors weights ({SINGLE} or {INDEX} expected, {found}); "
            "convert the checkpoint with save_pretrained() or take a revision that has safetensors."
        )
    names = sorted(set(_weight_map(folder).values()))
    for name in names:
        if name not in listed:
            raise InputError(f"MODEL: {folder / INDEX} names {name}, which is missing; fetch the checkpoint again.")
    return names


def _weight_map(folder: Path) -> dict[str, str]:
    """Which file each tensor is in, by the index: safetensors files of the same folder."""
    weight_map = _read_json(folder / INDEX, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"MODEL: {folder / INDEX} has no usable weight_map; fetch the checkpoint again.")
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError(
                f"MODEL: {folder / INDEX} names {file!r}, expected safetensors files of the same folder; "
                "do not use this checkpoint."
            )
    return weight_map


def _shards(folder: Path, names: Collection[str]) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint, each checked to lie in `folder` and to hold the tensors that the index says."""
    for name in names:
        if not (folder / name).exists():
            raise InputError(f"MODEL: {folder} lacks {name}, which holds weights; fetch the checkpoint again.")
    shards = _checked_shards(folder, set(names))
    weight_map = {} if SINGLE in names else _weight_map(folder)
    for shard in shards:
        missing = {k for k, v in weight_map.items() if v == shard.name} - read_header(shard).keys()
        if missing:
            raise InputError(f"MODEL: {shard} lacks {min(missing)}, which the index expects; fetch the checkpoint again.")
    return shards


def _checked_shards(folder: Path, names: set[str]) -> tuple[Path, ...]:
    """The files, in order: each inside `folder`, whole, with tensors that no other has."""
    shards = tuple(folder / n for n in sorted(names))
    held: dict[str, Path] = {}
    for shard in shards:
        _check_inside(folder, shard)
        header = read_header(shard)
        if not header:
            raise InputError(f"MODEL: {shard} holds no tensors; fetch the checkpoint again.")
        if twice := header.keys() & held.keys():
            name = min(twice)
            raise InputError(
                f"MODEL: {name} is both in {held[name].name} and in {shard.name} of {folder}, so that it is open which counts; "
                "fetch the checkpoint again."
            )
        held |= dict.fromkeys(header, shard)
    return shards


def _check_inside(folder: Path, file: Path) -> None:
    """Links may lead to files of the same folder, or of the same repository in a Hub cache. Raises InputError."""
    try:
        real, root = file.resolve(strict=True), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"MODEL: {file} is a link that leads nowhere; fetch the checkpoint again.") from error
    cached = root.parent.name == "snapshots"  # files of one repository, and those that the client keeps once for several
    blobs = [root.parent.parent / "blobs", root.parent.parent.parent / "blobs"] if cached else []
    if not any(real.is_relative_to(folder) for folder in (root, *blobs)):
        raise InputError(f"MODEL: {file} is a link that leads out of the checkpoint, to {real}; copy that file in its place.")


def _most_tensors(folder: Path, weights: Collection[str]) -> int:
    if SINGLE not in weights:
        return len(_weight_map(folder))
    return (len(read_header(folder / SINGLE)) if (folder / SINGLE).exists() else 0) or MOST_TENSORS


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


def _read_json(file: Path, *, unique: bool = False) -> dict[str, Any]:
    _check_inside(file.parent, file)
    try:
        value = read_json(file, unique=unique)
    except UnreadableError as error:
        raise InputError(f"MODEL: {file} cannot be read as JSON ({error}); fetch the checkpoint again.") from error
    if not isinstance(value, dict):
        raise InputError(f"MODEL: {file} holds no JSON object; fetch the checkpoint again.")
    return value
