"""Check an exported checkpoint: files, index, buffers, modeling code, and the recorded probe in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from exporter import verify_worker
from exporter.bake import REPORT, SHARD, sha256
from exporter.errors import InputError, VerificationError
from exporter.families import family
from exporter.source import INDEX, SINGLE, read_header


@dataclass(frozen=True)
class Verification:
    """What was found: the base's shards that are bitwise equal, the base tensors in them, and the probe's differences."""

    shards: int
    tensors: int
    parity: dict[str, Any]


def verify(folder: Path) -> Verification:
    """Raises InputError where `folder` is no export, VerificationError where a check fails."""
    report = _read(folder, REPORT)
    config = _read(folder, "config.json")
    problems = [*_weights(folder, report), *_buffers(folder, config), *_code(folder, report)]
    if problems:  # never run code that is not ours, nor load half a model
        raise VerificationError(f"{folder} failed its checks: {'; '.join(problems)}.")
    result = _fresh_process(folder)
    if result["failures"]:
        raise VerificationError(f"{folder} failed its checks: {'; '.join(result['failures'])}.")
    shards = report["base_model"]["shards"]
    return Verification(len(shards), sum(len(read_header(folder / s)) for s in shards), result["parity"])


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((folder / name).read_text("utf-8"))
    except (OSError, ValueError):
        raise InputError(f"CHECKPOINT: {folder} has no readable {name}; give a folder that shiftdc-export wrote.") from None


def _weights(folder: Path, report: dict[str, Any]) -> list[str]:
    """Base shards bitwise equal to the base's, and an index that says what the shards hold."""
    problems = []
    shards = report["base_model"]["shards"]
    for name, expected in shards.items():
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
        elif sha256(folder / name) != expected:
            problems.append(f"{name} is not bitwise the base model's")
    if (folder / SINGLE).exists():
        problems.append(f"{SINGLE} lies beside the index and would be loaded in its place")
    if problems or not (folder / INDEX).is_file() or not (folder / SHARD).is_file():
        return problems or [f"{INDEX} or {SHARD} is missing"]
    weight_map = _read(folder, INDEX).get("weight_map", {})
    held = {name: shard for shard in [*shards, SHARD] for name in read_header(folder / shard)}
    if weight_map != held:
        wrong = sorted(set(weight_map.items()) ^ set(held.items()))
        problems.append(f"the index does not say what the shards hold ({wrong[0][0]})")
    return problems


def _buffers(folder: Path, config: dict[str, Any]) -> list[str]:
    if not (folder / SHARD).is_file():
        return []
    settings, problems = config["shiftdc"], []
    with safe_open(folder / SHARD, "pt") as shard:
        for layer in settings["layers"]:
            for name in ("direction", "shift"):
                key = f"{settings['decoder_layers']}.{layer}.shiftdc.{name}"
                if key not in shard.keys():  # noqa: SIM118 (no mapping)
                    problems.append(f"{key} is missing")
                elif not torch.isfinite(shard.get_tensor(key)).all():
                    problems.append(f"{key} is not finite")
                elif name == "direction" and abs(shard.get_tensor(key).norm().item() - 1) > 1e-3:
                    problems.append(f"{key} is not of unit norm")
    return problems


def _code(folder: Path, report: dict[str, Any]) -> list[str]:
    """The modeling code must be this package's: verifying runs it."""
    name = report["recipe"]["family"]
    return [
        f"{file.name} is not the code of this version of shiftdc-export, so it was not run"
        for file in family(name).files
        if not (folder / file.name).is_file() or (folder / file.name).read_bytes() != file.read_bytes()
    ]


def _fresh_process(folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="shiftdc-verify-") as modules:
        inherited = {k: v for k, v in os.environ.items() if "TOKEN" not in k}  # it needs no access to anything
        environment = {**inherited, "HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(
            [sys.executable, "-I", verify_worker.__file__, str(folder)],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise VerificationError(f"{folder} does not load in a fresh process with transformers alone: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])
