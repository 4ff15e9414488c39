"""The weights of a checkpoint: which safetensors files hold them, and that these are whole, from their headers."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from exporter.errors import InputError
from exporter.runtime.reading import Json, UnreadableError, read_json
from exporter.runtime.safetensors_header import read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

#: More tensors than any checkpoint has in one file: what is assumed of one that is not fetched yet.
MOST_TENSORS = 10_000


def has_weights(folder: Path, here: Collection[str]) -> bool:
    """Whether a folder of the local cache needs nothing more from the Hub."""
    return SINGLE in here or (INDEX in here and set(_weight_map(folder).values()) <= set(here))


def weight_files(folder: Path, listed: Collection[str]) -> list[str]:
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
    listed = read_object(folder / INDEX, unique=True).get("weight_map")
    weight_map = {k: v for k, v in listed.items() if isinstance(v, str)} if isinstance(listed, dict) else {}
    if not weight_map or weight_map != listed:
        raise InputError(f"MODEL: {folder / INDEX} has no usable weight_map; fetch the checkpoint again.")
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError(
                f"MODEL: {folder / INDEX} names {file!r}, expected safetensors files of the same folder; "
                "do not use this checkpoint."
            )
    return weight_map


def checked_shards(folder: Path, names: Collection[str]) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint, each checked to lie in `folder` and to hold the tensors that the index says."""
    for name in names:
        if not (folder / name).exists():
            raise InputError(f"MODEL: {folder} lacks {name}, which holds weights; fetch the checkpoint again.")
    shards = _each_checked(folder, set(names))
    weight_map = {} if SINGLE in names else _weight_map(folder)
    for shard in shards:
        missing = {k for k, v in weight_map.items() if v == shard.name} - read_header(shard).keys()
        if missing:
            raise InputError(f"MODEL: {shard} lacks {min(missing)}, which the index expects; fetch the checkpoint again.")
    return shards


def _each_checked(folder: Path, names: set[str]) -> tuple[Path, ...]:
    """The files, in order: each inside `folder`, whole, with tensors that no other has."""
    shards = tuple(folder / n for n in sorted(names))
    held: dict[str, Path] = {}
    for shard in shards:
        check_inside(folder, shard)
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


def most_tensors(folder: Path, weights: Collection[str]) -> int:
    if SINGLE not in weights:
        return len(_weight_map(folder))
    return (len(read_header(folder / SINGLE)) if (folder / SINGLE).exists() else 0) or MOST_TENSORS


def check_inside(folder: Path, file: Path) -> None:
    """Links may lead to files of the same folder, or of the same repository in a Hub cache. Raises InputError."""
    try:
        real, root = file.resolve(strict=True), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"MODEL: {file} is a link that leads nowhere; fetch the checkpoint again.") from error
    cached = root.parent.name == "snapshots"  # files of one repository, and those that the client keeps once for several
    blobs = [root.parent.parent / "blobs", root.parent.parent.parent / "blobs"] if cached else []
    if not any(real.is_relative_to(folder) for folder in (root, *blobs)):
        raise InputError(f"MODEL: {file} is a link that leads out of the checkpoint, to {real}; copy that file in its place.")


def read_object(file: Path, *, unique: bool = False) -> dict[str, Json]:
    check_inside(file.parent, file)
    try:
        value = read_json(file, unique=unique)
    except UnreadableError as error:
        raise InputError(f"MODEL: {file} cannot be read as JSON ({error}); fetch the checkpoint again.") from error
    if not isinstance(value, dict):
        raise InputError(f"MODEL: {file} holds no JSON object; fetch the checkpoint again.")
    return value
