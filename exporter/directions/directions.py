"""Safety directions and mean shifts, as they are baked."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from exporter.directions.statistics import LayerStatistics

#: Where directions come from, in words.
DIFFERENCE = "difference of mean safe and mean unsafe text (arXiv:2502.13095, Eq. 4)"
GRADIENT = "gradient of refusal against compliance on harmless text, without harmful data; refusals begin with"


@dataclass(frozen=True)
class Directions:
    """Unit directions from unsafe to safe, float32 [layers, hidden], and mean shifts, float32 [layers]."""

    layers: tuple[int, ...]
    direction: torch.Tensor
    shift: torch.Tensor
    statistics: tuple[LayerStatistics, ...]
    origin: str = DIFFERENCE

    def of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(direction [hidden], shift []) of a decoder layer."""
        row = self.layers.index(layer)
        return self.direction[row], self.shift[row]
