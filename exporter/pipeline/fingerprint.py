"""What the activations of a run depend on: runs with the same fingerprint share what they have computed."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

import exporter
from exporter import __version__
from exporter.data.calibration import CalibrationSet
from exporter.models.base import BaseCheckpoint
from exporter.pipeline.plan import Plan
from exporter.runtime.hashing import sha256
from exporter.runtime.store import Store


def base_identity(base: BaseCheckpoint) -> dict[str, Any]:
    """Weights by revision, of a local folder by size and time of change; configuration, tokenizer and template by content."""
    files = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in base.shards}
    texts = {str(f): sha256(base.folder / f) for f in (Path("config.json"), *base.companions)}
    return {"name": base.name, "revision": base.revision, "weights": base.revision or files, "files": texts}


def calibration_identity(calibration: CalibrationSet) -> dict[str, Any]:
    """Hashes of the source, of its texts, and of what the rows show."""
    texts = [row.model_dump_json(exclude={"image"}) for row in calibration.rows]
    images = [None if row.image is None else row.image.identity() for row in calibration.rows]
    return {
        "source": calibration.sha256,
        "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "images": hashlib.sha256(json.dumps(images).encode()).hexdigest(),
    }


@cache
def code_identity() -> dict[str, str]:
    """This package's version and the hash of its code, and the versions of what computes."""
    import transformers
    from transformers.utils import is_torchvision_available

    package = Path(exporter.__file__).parent
    return {
        "shiftdc-export": __version__,
        "code": hashlib.sha256("".join(map(sha256, sorted(package.rglob("*.py")))).encode()).hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "torchvision": str(is_torchvision_available()),  # image processors with and without it differ in the last bits
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def fingerprint(plan: Plan) -> dict[str, Any]:
    """What the activations depend on, bit for bit."""
    return {
        "base": base_identity(plan.base),
        "adapter": None if plan.adapter is None else [plan.adapter.sha256, plan.keep_adapter],
        "calibration": calibration_identity(plan.calibration),
        "recipe": plan.recipe.model_dump(include={"family", "prompts", "layers"}),
        "captions": [plan.recipe.wording.caption, plan.recipe.caption_tokens],
        "arithmetic": [plan.dtype, plan.device_map, plan.quantised, plan.batch_size],
        "code": code_identity(),
    }


def open_store(plan: Plan) -> Store:
    """What earlier runs of this plan have computed. Raises InputError."""
    return Store.open(fingerprint(plan))
