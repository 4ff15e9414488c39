"""Check an exported checkpoint: files, index, buffers, modeling code, and the recorded probe in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from exporter.checkpoint import verify_worker
from exporter.checkpoint.bake import identity, without_code
from exporter.checkpoint.layout import BUFFERS, REPORT, SHARD, buffer_key
from exporter.checkpoint.manifest import differences
from exporter.checkpoint.report import Parity, Report, read_report, require_format
from exporter.checkpoint.staging import scratch
from exporter.errors import InputError, VerificationError
from exporter.models.families import family
from exporter.models.shards import INDEX, SINGLE
from exporter.runtime.reading import UnreadableError, read_json
from exporter.runtime.safetensors_header import TensorHeader, read_header
from exporter.runtime.temporary import temporary

#: Tensors by name, of shards by name.
Headers = Mapping[str, Mapping[str, TensorHeader]]

#: What the fresh process runs.
WORKER = Path(verify_worker.__file__)


@dataclass(frozen=True)
class Findings:
    """What the fresh process found: a sentence for each failure, and how far results are from the probe's."""

    failures: list[str]
    parity: Parity


@dataclass(frozen=True)
class Verification:
    """What was found: the base's shards that are bitwise equal, the base tensors in them, and the probe's differences.

    `edited` names what its owner may change and has changed since: the card.
    """

    shards: int
    tensors: int
    parity: Parity
    edited: tuple[str, ...] = ()


def verify(folder: Path, device_map: str | None = None, beside: Path | None = None) -> Verification:
    """Raises InputError where `folder` is no export, VerificationError where a check fails.

    device_map: accelerate's, for a checkpoint that one device does not hold; what it leaves on disk lies beside `beside`, by
    default `folder`.
    """
    report = read_report(folder)
    require_format(folder)
    shards = report.base_model.shards
    headers = {name: read_header(folder / name) for name in (*shards, SHARD) if (folder / name).is_file()}
    changed, edited = differences(folder, report)
    problems = [*changed, *_code(folder, report), *_weights(folder, report, headers), *_buffers(folder, headers)]
    if problems:  # never run code that is not ours, nor load half a model
        raise VerificationError(f"{folder} failed its checks: {'; '.join(problems)}.")
    found = _fresh_process(folder, device_map, beside or folder)
    if found.failures:
        raise VerificationError(f"{folder} failed its checks: {'; '.join(found.failures)}.")
    return Verification(len(shards), sum(len(headers[name]) for name in shards), found.parity, tuple(edited))


def _read(folder: Path, name: str) -> dict[str, object]:
    try:
        value = read_json(folder / name)
    except UnreadableError as error:
        raise InputError(
            f"CHECKPOINT: {folder} has no readable {name} ({error}); give a folder that shiftdc-export wrote."
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"CHECKPOINT: {folder / name} holds no JSON object; export again.")
    return value


def _weights(folder: Path, report: Report, headers: Headers) -> list[str]:
    """An index that says what the shards hold; that these are the base's bit for bit, `differences` has seen."""
    if (folder / SINGLE).exists():
        return [f"{SINGLE} lies beside the index and would be loaded in its place"]
    if not (folder / INDEX).is_file():
        return [f"{INDEX} is missing"]
    if gone := [name for name in (*report.base_model.shards, SHARD) if name not in headers]:
        return [f"{gone[0]} is missing"]
    weight_map = _read(folder, INDEX).get("weight_map")
    held = {name: shard for shard, header in headers.items() for name in header}
    if weight_map == held:
        return []
    known = weight_map if isinstance(weight_map, dict) else {}
    wrong = min(name for name in known.keys() | held.keys() if known.get(name) != held.get(name))
    return [f"the index does not say what the shards hold ({wrong})"]


def _buffers(folder: Path, headers: Headers) -> list[str]:
    if SHARD not in headers:
        return []
    settings = _read(folder, "config.json").get("shiftdc")
    layers = settings.get("layers") if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or not isinstance(layers, list) or not layers:
        return ["config.json has no usable shiftdc block"]
    path = str(settings.get("traits", {}).get("decoder_layers"))
    expected = {buffer_key(path, layer, name) for layer in layers for name in BUFFERS}
    held = headers[SHARD]
    problems = [f"{key} is missing" for key in sorted(expected - held.keys())]
    with safe_open(folder / SHARD, "pt") as shard:
        for key in sorted(expected & held.keys()):
            tensor = shard.get_tensor(key)
            if not torch.isfinite(tensor).all():
                problems.append(f"{key} is not finite")
            elif key.endswith(".direction") and abs(tensor.norm().item() - 1) > 1e-3:
                problems.append(f"{key} is not of unit norm")
    return problems


def _code(folder: Path, report: Report) -> list[str]:
    """The modeling code must be this package's, all of it and nothing else: verifying runs it."""
    classes = family(report.recipe.family)
    ours = {file.name: file for file in classes.files}
    there = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*.py")}
    config = _read(folder, "config.json")
    named = [f"config.json names other classes or code ({k})" for k, v in identity(classes).items() if config.get(k) != v]
    if report.base_model.architecture != classes.stock_class:
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


def _fresh_process(folder: Path, device_map: str | None, beside: Path) -> Findings:
    # what is offloaded to disk may be large, and /tmp may be memory
    with temporary("verify") if device_map is None else scratch(beside, "verify") as modules:
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
    return Findings(**json.loads(done.stdout.strip().splitlines()[-1]))
