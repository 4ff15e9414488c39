"""Write a calibrated checkpoint: base shards as they are, one shard of directions, an index, config and modeling code.

The base model is never loaded here, and its tensors are never rewritten.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from exporter.checkpoint.calibrated import Calibrated
from exporter.checkpoint.layout import ADAPTER, ADAPTER_FILES, SHARD, buffer_key
from exporter.errors import InputError
from exporter.modeling.configuration_shiftdc import FORMAT_VERSION
from exporter.modeling.modeling_shiftdc import buffers_sha256
from exporter.models.base import BaseCheckpoint
from exporter.models.families import Family, family
from exporter.models.shards import INDEX, SINGLE
from exporter.runtime.hashing import HashOf, sha256
from exporter.runtime.linking import link_or_copy, symlink_or_copy
from exporter.runtime.reading import read_json
from exporter.runtime.safetensors_header import read_header


@dataclass(frozen=True)
class Baked:
    """SHA-256 of every base shard by its new name, and the bytes of shards by the way in which they were placed."""

    hashes: dict[str, str]
    placed: dict[str, int]


def shiftdc_block(calibrated: Calibrated, base: BaseCheckpoint, adapter: Path | None = None) -> dict[str, object]:
    """The `shiftdc` block of config.json."""
    recipe = calibrated.recipe
    return {
        "version": FORMAT_VERSION,
        "reference": recipe.reference,
        "rule": recipe.rule,
        "gate": recipe.gate,
        "strength": calibrated.strength,
        "layers": list(calibrated.layers),
        "buffers_sha256": [buffers_sha256(direction, shift) for _, direction, shift in calibrated.vectors],
        "traits": calibrated.traits.as_json(),
        "caption_max_new_tokens": recipe.caption_tokens,
        "prompt": calibrated.frame.as_json(),
        "base_model": {"id": base.name, "revision": base.revision},
        **({} if adapter is None else {"adapter": ADAPTER}),
    }


def bake(
    base: BaseCheckpoint,
    calibrated: Calibrated,
    folder: Path,
    *,
    adapter: Path | None = None,
    hash_of: HashOf | None = None,
    temporary: bool = False,
) -> Baked:
    """Write the checkpoint into the empty `folder`.

    adapter: folder of a PEFT adapter that goes along, unmerged. hash_of: gives the hash of a base shard (`background_hashes`).
    temporary: the folder is soon deleted, so shards may be symbolic links.
    """
    baked = _put_shards(base, folder, hash_of or sha256, temporary)
    _save_vectors(calibrated, folder)
    write_index(folder, [*baked.hashes, SHARD])
    classes = family(calibrated.recipe.family)
    for file in classes.files:
        shutil.copyfile(file, folder / file.name)
    if adapter is not None:
        _copy_adapter(adapter, folder)
    config = calibrated_config(base, classes, shiftdc_block(calibrated, base, adapter))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    for companion in base.companions:
        (folder / companion).parent.mkdir(parents=True, exist_ok=True)
        copy_companion(base.folder / companion, folder / companion)
    return baked


def _put_shards(base: BaseCheckpoint, folder: Path, hash_of: HashOf, temporary: bool) -> Baked:
    """Raises InputError where a shard changes meanwhile."""
    hashes: dict[str, str] = {}
    placed: Counter[str] = Counter()
    for shard in base.shards:
        target = folder / _shard_name(shard)
        if temporary:
            symlink_or_copy(shard, target)
        else:
            placed[link_or_copy(shard, target)] += shard.stat().st_size
        hashes[target.name] = hash_of(shard)
        if not shard.samefile(target) and sha256(target) != hashes[target.name]:
            raise InputError(f"MODEL: {shard} changed while it was copied; leave the base folder alone and run again.")
    return Baked(hashes, dict(placed))


def _save_vectors(calibrated: Calibrated, folder: Path) -> None:
    tensors = {}
    for layer, direction, shift in calibrated.vectors:
        tensors[buffer_key(calibrated.traits.decoder_layers, layer, "direction")] = direction.contiguous()
        tensors[buffer_key(calibrated.traits.decoder_layers, layer, "shift")] = shift.clone()
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})
    (folder / SHARD).chmod(0o644)  # safetensors writes 0600


def _copy_adapter(adapter: Path, folder: Path) -> None:
    (folder / ADAPTER).mkdir()
    for name in ADAPTER_FILES:
        shutil.copyfile(adapter / name, folder / ADAPTER / name)


#: Keys that name code of a repository; an export is loaded with trust_remote_code, which must not reach the base's.
CODE_KEYS = frozenset({"auto_map", "custom_pipelines"})


def without_code(value: Any) -> Any:
    """`value`, parsed from JSON, without keys that name code, at any depth."""
    if isinstance(value, dict):
        return {k: without_code(v) for k, v in value.items() if k not in CODE_KEYS}
    return [without_code(v) for v in value] if isinstance(value, list) else value


def copy_companion(source: Path, target: Path) -> None:
    """Byte for byte, except that no JSON file names code any more."""
    values = read_json(source) if source.suffix == ".json" and source.name != "tokenizer.json" else None
    if values == (kept := without_code(values)):
        shutil.copyfile(source, target)
    else:
        target.write_text(json.dumps(kept, indent=2) + "\n", "utf-8")


def calibrated_config(base: BaseCheckpoint, classes: Family, block: dict[str, object]) -> dict[str, object]:
    """The base's config.json under the family's own model_type, guarded against stock classes."""
    config = {**without_code(dict(base.config)), **identity(classes), "shiftdc": block}
    return classes.config.shiftdc_guarded(config)


def identity(classes: Family) -> dict[str, object]:
    """What config.json says of the classes and the code to load: exactly ours."""
    return {
        "architectures": [classes.model.__name__],
        "model_type": classes.config.model_type,
        "auto_map": {
            "AutoConfig": f"{classes.config.__module__.rpartition('.')[-1]}.{classes.config.__name__}",
            "AutoModelForImageTextToText": f"{classes.module}.{classes.model.__name__}",
        },
    }


def write_index(folder: Path, shards: list[str]) -> None:
    """model.safetensors.index.json from what the shards hold."""
    headers = {shard: read_header(folder / shard) for shard in shards}
    weight_map = {name: shard for shard, header in headers.items() for name in header}
    total = sum(t.bytes for header in headers.values() for t in header.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _shard_name(shard: Path) -> str:
    # transformers prefers a model.safetensors to the index, and would not see the directions
    return "model-00001-of-00002.safetensors" if shard.name == SINGLE else shard.name
