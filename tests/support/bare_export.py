"""An export on disk around weights of a few numbers, which no model has: for what looks at files alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from exporter.checkpoint.bake import Baked, bake
from exporter.checkpoint.calibrated import Calibrated
from exporter.checkpoint.layout import REPORT
from exporter.checkpoint.manifest import hashes
from exporter.directions.directions import Directions
from exporter.modeling.configuration_shiftdc import ShiftDCTraits
from exporter.modeling.prompts_shiftdc import PromptFrame
from exporter.models.base import BaseCheckpoint
from exporter.models.recipe import load_recipe

LAYERS, HIDDEN = (1, 3), 4
CONFIG = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "vision_feature_select_strategy": "full"}
COMPANIONS = {
    "tokenizer.json": '{"auto_map": 1}',
    "qformer_tokenizer/tokenizer_config.json": "{}",
    "qformer_tokenizer/additional_chat_templates/tool.jinja": "",
    "LICENSE": "free",
}
TRAITS = ShiftDCTraits("model.language_model.layers", HIDDEN, "vision_feature_select_strategy", image_token_id=4)
FRAME = PromptFrame(((),), (), (), (), (), (((), (), False),), ((),), ("", ""), "", "", False)


def bare_base(folder: Path, shards: int = 1, **config: object) -> BaseCheckpoint:
    """Two tensors a shard, and a tokenizer."""
    folder.mkdir()
    single = shards == 1
    files = [folder / ("model.safetensors" if single else f"model-{n}-of-{shards}.safetensors") for n in range(1, shards + 1)]
    for n, file in enumerate(files):
        save_file({f"a.{n}": torch.full((3,), float(n)), f"b.{n}": torch.ones(2, dtype=torch.float16)}, file)
    for name, text in COMPANIONS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return BaseCheckpoint("owner/base", "abc", folder, {**CONFIG, **config}, tuple(files))


def bare_calibrated(**changes: object) -> Calibrated:
    """Directions along the first two axes, with shifts of 0.5 and 1.5."""
    recipe = load_recipe("llava").with_overrides(**changes)
    directions = Directions(LAYERS, torch.eye(2, HIDDEN), torch.tensor([0.5, 1.5]), ())
    return Calibrated(recipe, directions, LAYERS, FRAME, TRAITS)


def bare_report(folder: Path, baked: Baked) -> None:
    """What `verify` and `read_report` need of a report."""
    counts = dict.fromkeys(("fit_safe", "fit_unsafe", "held_out_safe", "held_out_unsafe"), 8)
    report = {
        "base_model": {"id": "b", "revision": None, "architecture": CONFIG["architectures"][0], "shards": baked.hashes},
        "recipe": bare_calibrated().recipe.model_dump(),
        "calibration": {"name": "small", "sha256": "ab" * 32, **counts},
        "prompts": {"compared": 1, "different": 0},
        "layers": {"chosen": list(LAYERS), "depth": 4, "criterion": "given"},
        "statistics": [],
        "versions": {},
        "files": hashes(folder),
    }
    (folder / REPORT).write_text(json.dumps(report))


def bare_export(folder: Path, shards: int = 1) -> Path:
    """`folder` with all that an export has but a model, and its base beside it."""
    folder.mkdir()
    bare_report(folder, bake(bare_base(folder.with_name("base"), shards), bare_calibrated(), folder))
    return folder
