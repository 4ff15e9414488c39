"""An exported checkpoint, opened with this package's own modeling code: code in the folder is not run."""

from __future__ import annotations

from pathlib import Path

import torch

from exporter.checkpoint.report import read_report, require_format
from exporter.errors import refusing
from exporter.modeling.prompts_shiftdc import PromptFrame
from exporter.models.families import family
from exporter.models.loading import DTYPES
from exporter.models.processors import load_processor
from exporter.models.recipe import Recipe
from exporter.models.vlm import VLM, composes_text


def open_export(folder: Path, *, dtype: str = "auto", device_map: str | None = None) -> VLM:
    """Load a calibrated checkpoint. Raises InputError."""
    return load_calibrated(folder, read_report(folder).recipe, dtype=dtype, device_map=device_map)


def load_calibrated(folder: Path, recipe: Recipe, *, dtype: str = "auto", device_map: str | None = None) -> VLM:
    """Load what `bake` wrote. Raises InputError."""
    require_format(folder)
    options = {} if device_map is None else {"device_map": device_map}
    with refusing(f"CHECKPOINT: {folder} cannot be loaded", "run 'shiftdc-export verify' on it, or export again"):
        model = family(recipe.family).model.from_pretrained(folder, dtype=DTYPES[dtype], use_safetensors=True, **options)
    if device_map is None and torch.cuda.is_available():
        model = model.to("cuda")
    processor = load_processor(folder, recipe, "CHECKPOINT")
    vlm = VLM(model.eval(), processor, composed_text=composes_text(processor, recipe))
    return vlm.framed(PromptFrame.from_json(model.config.shiftdc["prompt"]))
