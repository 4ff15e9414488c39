"""Check an exported checkpoint: files, index, buffers, modeling code, and the recorded probe in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from exporter.checkpoint import verify_worker
from exporter.checkpoint.bake import identity, without_code
from exporter.checkpoint.layout import REPORT, SHARD
from exporter.checkpoint.manifest import differences
from exporter.checkpoint.report import read_report
from exporter.checkpoint.staging import scratch
from exporter.errors import InputError, VerificationError
from exporter.models.families import family
from exporter.models.shards import INDEX, SINGLE
from exporter.runtime.reading import UnreadableError, read_json
from exporter.runtime.safetensors_header import read_header
from exporter.runtime.temporary import temporary

#: What the fresh process runs.
WORKER = Path(verify_worker.__file__)


@dataclass(frozen=True)
class Verification:
    """What was found: the base's shards that are bitwise equal, the base tensors in them, and the probe's differences.

    `edited` names what its owner may change and has changed since: the card.
    """

    shards: int
    tensors: int
    parity: dict[str, Any]
    edited: tuple[str, ...] = ()


def verify(folder: Path, device_map: str | None = None, place: Path | None = None) -> Verification:
    """Raises InputError where `folder` is no export, VerificationError where a check fails.

    device_map: accelerate's, for a checkpoint that one device does not hold; what it leaves on disk lies beside `place`, by
    default `folder`.
    """
    report = read_report(folder)
    changed, edited = differences(folder, report)
    problems = [*changed, *_code(folder, report), *_weights(folder, report), *_buffers(folder)]
    if problems:  # never run code that is not ours, nor load half a model
        raise VerificationError(f"{folder} failed its checks: {'; '.join(problems)}.")
    result = _fresh_process(folder, device_map, place or folder)
    if result["failures"]:
        raise VerificationError(f"{folder} failed its checks: {'; '.join(result['failures'])}.")
    shards = report["base_model"]["shards"]
    tensors = sum(len(read_header(folder / s)) for s in shards)
    return Verification(len(shards), tensors, result["parity"], tuple(edited))


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = read_json(folder / name)
    except UnreadableError as error:
        raise InputError(
            f"CHECKPOINT: {folder} has no readable {name} ({error}); give a folder that shiftdc-export wrote."
        ) from None
    if not isinstance(value, dict):
        raise InputError(f"CHECKPOINT: {folder / name} holds no JSON object; export again.")
    return value


def _weights(folder: Path, report: dict[str, Any]) -> list[str]:
    """An index that says what the shards hold; that these are the base's bit for bit, `differences` has seen."""
    if (folder / SINGLE).exists():
        return [f"{SINGLE} lies beside the index and would be loaded in its place"]
    shards = [*report["base_model"]["shards"], SHARD]
    if gone := [name for name in (INDEX, *shards) if not (folder / name).is_file()]:
        return [f"{gone[0]} is missing"]
    weight_map = _read(folder, INDEX).get("weight_map")
    held = {name: shard for shard in shards for name in read_header(folder / shard)}
    if weight_map == held:
        return []
    known = weight_map if isinstance(weight_map, dict) else {}
    wrong = min(name for name in known.keys() | held.keys() if known.get(name) != held.get(name))
    return [f"the index does not say what the shards hold ({wrong})"]


def _buffers(folder: Path) -> list[str]:
    if not (folder / SHARD).is_file():
        return []
    settings = _read(folder, "config.json").get("shiftdc")
    layers = settings.get("layers") if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or not isinstance(layers, list) or not layers:
        return ["config.json has no usable shiftdc block"]
    expected = {f"{settings.get('decoder_layers')}.{layer}.shiftdc.{n}" for layer in layers for n in ("direction", "shift")}
    held = read_header(folder / SHARD)
    problems = [f"{key} is missing" for key in sorted(expected - held.keys())]
    with safe_open(folder / SHARD, "pt") as shard:
        for key in sorted(expected & held.keys()):
            tensor = shard.get_tensor(key)
            if not torch.isfinite(tensor).all():
                problems.append(f"{key} is not finite")
            elif key.endswith(".direction") and abs(tensor.norm().item() - 1) > 1e-3:
                problems.append(f"{key} is not of unit norm")
    return problems


def _code(folder: Path, report: dict[str, Any]) -> list[str]:
    """The modeling code must be this package's, all of it and nothing else: verifying runs it."""
    classes = family(report["recipe"]["family"])
    ours = {file.name: file for file in classes.files}
    there = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*.py")}
    config = _read(folder, "config.json")
    named = [f"config.json names other classes or code ({k})" for k, v in identity(classes).items() if config.get(k) != v]
    if report["base_model"]["architecture"] != classes.stock_class:
        named.append(f"the report names another architecture than {classes.stock_class}")
    return [
        *(f"{name} is not the code of this version of shiftdc-export, so it was not run"
          for name in sorted(ours.keys() | there.keys())
          if name not in ours or name not in there or there[name].read_bytes() != ours[name].read_bytes()),
        *named,
        *(f"{f.relative_to(folder)} names code (auto_map)" for f in sorted(folder.rglob("*.json")) if _names_code(f)),
    ]  # fmt: skip


def _names_code(file: Path) -> bool:
    """config.json's own entry has been compared already; anything below it, or in another file, is not ours."""
    if file.name in (REPORT, INDEX, "tokenizer.json"):
        return False
    try:
        values = read_json(file)
    except UnreadableError:
        return False  # what cannot be read names nothing
    if file.name == "config.json" and isinstance(values, dict):
        values = {k: v for k, v in values.items() if k != "auto_map"}
    return values != without_code(values)


def _fresh_process(folder: Path, device_map: str | None, place: Path) -> dict[str, Any]:
    # what is offloaded to disk may be large, and /tmp may be memory
    with temporary("verify") if device_map is None else scratch(place, "verify") as modules:
        # it needs no access to anything, and is no part of a torchrun
        inherited = {k: v for k, v in os.environ.items() if "TOKEN" not in k and not k.endswith(("RANK", "WORLD_SIZE"))}
        environment = {**inherited, "HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        placement = () if device_map is None else (device_map, str(modules))
        reading, writing = os.pipe()  # closed with this process, however it ends, and the other ends with it
        with os.fdopen(reading), os.fdopen(writing, "w"):
            done = subprocess.run(
                [sys.executable, "-I", str(WORKER), str(folder), *placement],
                env=environment, stdin=reading, capture_output=True, text=True, check=False,
            )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise VerificationError(f"{folder} does not load in a fresh process with transformers alone: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])
