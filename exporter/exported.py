"""An exported checkpoint, opened with this package's own modeling code: code in the folder is not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from exporter.bake import REPORT
from exporter.errors import InputError
from exporter.families import family
from exporter.recipes import Recipe, recorded_recipe
from exporter.vlm import DTYPES, VLM, load_processor


def open_export(folder: Path, *, dtype: str = "auto", device_map: str | None = None) -> VLM:
    """Load a calibrated checkpoint. Raises InputError."""
    if not (folder / REPORT).is_file():
        raise InputError(f"CHECKPOINT: {folder} has no {REPORT}; give a folder that shiftdc-export wrote.")
    return load_calibrated(folder, recorded_recipe(read_report(folder)), dtype=dtype, device_map=device_map)


def load_calibrated(folder: Path, recipe: Recipe, *, dtype: str = "auto", device_map: str | None = None) -> VLM:
    """Load what `bake` wrote. Raises InputError."""
    model_class: Any = family(recipe.family).model
    options = {} if device_map is None else {"device_map": device_map}
    try:
        model = model_class.from_pretrained(folder, dtype=DTYPES[dtype], **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"CHECKPOINT: {folder} cannot be loaded: {str(error).splitlines()[0]}") from None
    if device_map is None and torch.cuda.is_available():
        model = model.to("cuda")
    return VLM(model.eval(), load_processor(folder, recipe), composed_text=recipe.chat_template is not None)


def read_report(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / REPORT).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"CHECKPOINT: {folder / REPORT} cannot be read ({error}); export again.") from None
