"""What an export is made of beside its base model: the one value that is baked, probed and reported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from exporter.directions.directions import Directions
from exporter.modeling.configuration_shiftdc import ShiftDCTraits
from exporter.modeling.prompts_shiftdc import PromptFrame
from exporter.models.recipe import Recipe


@dataclass(frozen=True)
class Calibrated:
    """A recipe, the directions that were measured with it, the layers that were chosen of theirs, the prompts' frame, and the
    traits of the model."""

    recipe: Recipe
    directions: Directions
    layers: tuple[int, ...]
    frame: PromptFrame
    traits: ShiftDCTraits

    @property
    def strength(self) -> float:
        """A sweep starts from 1."""
        return 1.0 if self.recipe.strength == "auto" else self.recipe.strength

    @property
    def vectors(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(layer, direction [hidden], shift []) of the chosen layers."""
        return ((layer, *self.directions.of(layer)) for layer in self.layers)
