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

from exporter.checkpoint.layout import ADAPTER, ADAPTER_FILES, SHARD
from exporter.directions.directions import Directions
from exporter.errors import InputError
from exporter.modeling.modeling_shiftdc_config import FORMAT_VERSION
from exporter.modeling.modeling_shiftdc_correction import buffers_sha256
from exporter.modeling.modeling_shiftdc_prompts import PromptFrame
from exporter.models.base import BaseCheckpoint
from exporter.models.families import Family, family
from exporter.models.recipe import Recipe
from exporter.models.shards import INDEX, SINGLE
from exporter.runtime.hashing import HashOf, sha256
from exporter.runtime.linking import lend, place
from exporter.runtime.reading import read_json
from exporter.runtime.safetensors_header import read_header


@dataclass(frozen=True)
class Baked:
    """SHA-256 of every base shard by its new name, and the bytes of shards by the way in which they were placed."""

    hashes: dict[str, str]
    placed: dict[str, int]


def shiftdc_block(
    recipe: Recipe,
    layers: tuple[int, ...],
    frame: PromptFrame,
    base: BaseCheckpoint,
    directions: Directions,
    adapter: Path | None = None,
) -> dict[str, Any]:
    """The `shiftdc` block of config.json."""
    return {
        "version": FORMAT_VERSION,
        "reference": recipe.reference,
        "rule": recipe.rule,
        "gate": recipe.gate,
        "strength": 1.0 if recipe.strength == "auto" else recipe.strength,  # a sweep starts from 1
        "layers": list(layers),
        "buffers_sha256": [buffers_sha256(*directions.of(layer)) for layer in layers],
        "decoder_layers": recipe.decoder_layers,
        "caption_max_new_tokens": recipe.caption_tokens,
        "prompt": frame.as_json(),
        "base_model": {"id": base.name, "revision": base.revision},
        **({} if adapter is None else {"adapter": ADAPTER}),
    }


def bake(
    base: BaseCheckpoint,
    recipe: Recipe,
    directions: Directions,
    layers: tuple[int, ...],
    frame: PromptFrame,
    folder: Path,
    adapter: Path | None = None,
    hash_of: HashOf | None = None,
    for_a_while: bool = False,
) -> Baked:
    """Write the checkpoint into the empty `folder`.

    adapter: folder of a PEFT adapter that goes along, unmerged. hash_of: gives the hash of a base shard (`background_hashes`).
    for_a_while: shards are only lent.
    """
    hash_of = hash_of or sha256
    names = {shard: _shard_name(shard) for shard in base.shards}
    hashes = {}
    placed: Counter[str] = Counter()
    for shard, name in names.items():
        if for_a_while:
            lend(shard, folder / name)
        else:
            placed[place(shard, folder / name)] += shard.stat().st_size
        hashes[name] = hash_of(shard)
        if not shard.samefile(folder / name) and sha256(folder / name) != hashes[name]:
            raise InputError(f"MODEL: {shard} changed while it was copied; leave the base folder alone and run again.")
    tensors = {}
    for layer in layers:
        direction, shift = directions.of(layer)
        prefix = f"{recipe.decoder_layers}.{layer}.shiftdc"
        tensors[f"{prefix}.direction"] = direction.contiguous()
        tensors[f"{prefix}.shift"] = shift.clone()
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})
    (folder / SHARD).chmod(0o644)  # safetensors writes 0600
    write_index(folder, [*names.values(), SHARD])
    classes = family(recipe.family)
    for file in classes.files:
        shutil.copyfile(file, folder / file.name)
    if adapter is not None:
        (folder / ADAPTER).mkdir()
        for name in ADAPTER_FILES:
            shutil.copyfile(adapter / name, folder / ADAPTER / name)
    config = calibrated_config(base, classes, shiftdc_block(recipe, layers, frame, base, directions, adapter))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    for companion in base.companions:
        (folder / companion).parent.mkdir(parents=True, exist_ok=True)
        copy_companion(base.folder / companion, folder / companion)
    return Baked(hashes, dict(placed))


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


def calibrated_config(base: BaseCheckpoint, classes: Family, block: dict[str, Any]) -> dict[str, Any]:
    """The base's config.json under the family's own model_type, guarded against stock classes."""
    config = {**without_code(dict(base.config)), **identity(classes), "shiftdc": block}
    return classes.config.shiftdc_guarded(config)


def identity(classes: Family) -> dict[str, Any]:
    """What config.json says of the classes and the code to load: exactly ours."""
    return {
        "architectures": [classes.model.__name__],
        "model_type": classes.config.model_type,
        "auto_map": {
            "AutoConfig": f"{classes.config.__module__.rsplit('.', 1)[-1]}.{classes.config.__name__}",
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
