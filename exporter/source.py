"""The base checkpoint: where it lies, what it is, and that it can be exported, all from file headers.

First its small files (`resolve_small`), by which most that is wrong can be told; then its weights (`resolve_weights`). Nothing is
loaded here and nothing in the base folder is ever written.
"""

from __future__ import annotations

import glob
import math
import os
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from exporter.errors import InputError
from exporter.reading import HEADER_BYTES, UnreadableError, parse_json, read_json

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
class TensorHeader:
    """One tensor of a safetensors file: `dtype` as safetensors names it ("F32", "BF16"), `shape`, `bytes`, where it starts."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


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
        folder, revision = Path(__file__).parent / "demo" / "model", None
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
    listed = here if revision is None or _has_weights(folder, here) else _listed(name, revision) | here
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
    except UnicodeEncodeError:
        raise InputError(f"{option}: the path {path} is not UTF-8, so that its tokenizer cannot be opened; rename it.") from None


def _is_folder(path: str) -> bool:
    try:
        return Path(path).is_dir()
    except OSError:  # too long a name
        return False


def download(model: str, revision: str | None, patterns: Sequence[str], option: str) -> tuple[Path, str]:
    """The files of a Hub model that match `patterns`, and their commit. Raises InputError, which names `option`."""
    from huggingface_hub import snapshot_download

    with _asking(model, revision, option):
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    return folder, folder.name  # a snapshot folder is named after its commit


def _has_weights(folder: Path, here: Collection[str]) -> bool:
    """Whether a folder of the local cache needs nothing more from the Hub."""
    return SINGLE in here or (INDEX in here and set(_weight_map(folder).values()) <= set(here))


def _listed(model: str, revision: str) -> dict[str, int]:
    """The files at the top of a Hub model with their bytes; of none where only the local cache may be used."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.hf_api import RepoFile

    with _asking(model, revision, "MODEL"):
        try:
            return {f.path: f.size for f in HfApi().list_repo_tree(model, revision=revision) if isinstance(f, RepoFile)}
        except OfflineModeIsEnabled:
            return {}


@contextmanager
def _asking(model: str, revision: str | None, option: str) -> Iterator[None]:
    """Around requests to the Hub: what may go wrong becomes one sentence."""
    from httpx2 import HTTPError  # what huggingface_hub speaks HTTP with
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise InputError(f"{option}: {model} is gated; accept its terms on its page and log in with 'hf auth login'.") from None
    except RevisionNotFoundError:
        raise InputError(f"{option}: {model} has no revision {revision!r}; give an existing branch, tag or commit.") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{option}: {model} is neither an existing folder nor a model on the Hub that you can see; "
            "check the spelling, or log in with 'hf auth login' if it is private."
        ) from None
    except HFValidationError:
        raise InputError(f"{option}: {model!r} is neither an existing folder nor a Hub id of the form owner/name.") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise InputError(
            f"{option}: {model} is not in the local cache and the Hub cannot be reached; check the connection."
        ) from None
    except OSError as error:
        raise InputError(
            f"{option}: {model} cannot be stored in the local cache ({error.strerror or error}); see to it."
        ) from None
    except (HTTPError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:  # answers that are none
        raise InputError(f"{option}: {model} cannot be fetched from the Hub ({type(error).__name__}); try again.") from None


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
    except (OSError, RuntimeError):
        raise InputError(f"MODEL: {file} is a link that leads nowhere; fetch the checkpoint again.") from None
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


#: Bytes of one element, as safetensors names its types; those of less than a byte as fractions.
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E5M2FNUZ": 1, "F8_E4M3FNUZ": 1, "I16": 2, "U16": 2,
    "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8, "F4": 0.5, "F6_E2M3": 0.75,
    "F6_E3M2": 0.75,
}  # fmt: skip


def read_header(file: Path, option: str = "MODEL") -> dict[str, TensorHeader]:
    """Names, dtypes and shapes of a safetensors file, without its data, all checked. Raises InputError."""
    try:
        if not file.is_file():
            raise UnreadableError("it is no regular file")
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise UnreadableError("the header is longer than the file")
            if length > HEADER_BYTES:
                raise UnreadableError(f"the header has more than {HEADER_BYTES:,} bytes")
            return _tensors(parse_json(stream.read(length), unique=True), 8 + length, size - 8 - length)
    except struct.error:
        raise InputError(f"{option}: {file} is not a whole safetensors file (it has no header); fetch it again.") from None
    except (OSError, UnreadableError) as error:
        raise InputError(f"{option}: {file} is not a whole safetensors file ({error}); fetch it again.") from None


def _tensors(header: object, origin: int, data_bytes: int) -> dict[str, TensorHeader]:
    """The header's tensors, which must fill the data, from byte `origin` of the file on, without gaps and overlaps."""
    if not isinstance(header, dict):
        raise UnreadableError("the header is no JSON object")
    spans: list[tuple[int, int]] = []
    found: dict[str, TensorHeader] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = _span(entry, name)
        dtype, shape = _type(entry, name)
        if math.prod(shape) * ITEM_BYTES[dtype] != end - start:
            raise UnreadableError(f"{name[:200]} of shape {list(shape)} and dtype {dtype} cannot have {end - start} bytes")
        found[name] = TensorHeader(dtype, shape, end - start, origin + start)
        spans.append((start, end))
    filled = 0
    for start, end in sorted(spans):
        if start != filled:
            raise UnreadableError(f"tensors overlap, or leave a gap, at byte {min(start, filled)} of the data")
        filled = end
    if filled != data_bytes:
        raise UnreadableError(f"expected {filled} bytes of data, found {data_bytes}")
    return found


def _span(entry: object, name: str) -> tuple[int, int]:
    span = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not (isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span) and 0 <= span[0] <= span[1]):
        raise UnreadableError(f"{name[:200]} has no usable data_offsets")
    return span[0], span[1]


def _type(entry: dict[str, Any], name: str) -> tuple[str, tuple[int, ...]]:
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise UnreadableError(f"{name[:200]} has no dtype that is known")
    if not (isinstance(shape, list) and len(shape) <= 16 and all(type(n) is int and 0 <= n < 2**48 for n in shape)):
        raise UnreadableError(f"{name[:200]} has no usable shape")
    return dtype, tuple(shape)


def _read_json(file: Path, *, unique: bool = False) -> dict[str, Any]:
    _check_inside(file.parent, file)
    try:
        value = read_json(file, unique=unique)
    except UnreadableError as error:
        raise InputError(f"MODEL: {file} cannot be read as JSON ({error}); fetch the checkpoint again.") from None
    if not isinstance(value, dict):
        raise InputError(f"MODEL: {file} holds no JSON object; fetch the checkpoint again.")
    return value
