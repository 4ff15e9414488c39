"""Tiny random-weight checkpoints of every image-text-to-text type of transformers, by model_type.

Their processors need torchvision, and some towers timm: `import with_torchvision` first.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace

import tiny_families
import tiny_families_torchvision
import torch
from tiny_families import TinyFamily

from exporter.models.recipe import recipe_for_family

MODULES = (
    "deepseek", "glm", "google", "grids", "inkling", "llava_kin", "minicpm", "minimax", "mistral_kin", "muse", "nemotron",
    "ocr", "omni", "others_a", "others_b", "others_d", "ovis_molmo", "qwen", "timm_towers",
    "tokens",
)  # fmt: skip


def families() -> dict[str, Callable[[], TinyFamily]]:
    """Those with tests of their own first, each under its model_type."""
    earlier = {**tiny_families.FAMILIES, **tiny_families_torchvision.FAMILIES}
    found = {name.replace("blip_2", "blip-2"): make for name, make in earlier.items() if name not in VARIANTS}
    for module in MODULES:
        found |= importlib.import_module(f"zoo.{module}").FAMILIES
    return found


#: Of types that are there already.
VARIANTS = ("llava_next_vicuna", "pixtral")


def tiny_family(model_type: str) -> TinyFamily:
    torch.manual_seed(0)
    family = replace(families()[model_type](), recipe=recipe_for_family(model_type))
    family.model.eval()
    return family
