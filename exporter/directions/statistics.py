"""What is known of the directions, decoder layer by decoder layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from exporter.runtime.record import KEEPS_UNKNOWN


@dataclass(frozen=True)
class LayerStatistics:
    """What was measured at one decoder layer. Coordinates are projections on the unit direction, in activation units.

    None: not known, for lack of unsafe rows.
    """

    __pydantic_config__ = KEEPS_UNKNOWN

    layer: int
    norm: float | None  # of mean safe - mean unsafe (Eq. 4), held-in
    auroc: float | None  # of the coordinate, safe against unsafe, held-out text
    separation: float | None  # difference of held-out means over their pooled standard deviation
    split_half_cosine: float | None  # of directions from two halves of the fit rows
    text_safe: float  # mean coordinates
    text_unsafe: float | None
    image_safe: float
    image_unsafe: float | None
    shift: float  # mean of (x_image - x_text).d over the labels there are
    shift_cosine: float | None  # cos(m, s) of unsafe rows (section 3, observation 2)
    blank_shift: float  # mean of (x_blank - x_request_alone).d
    gradient: float | None = None  # nats of refusal a unit of activation, where the direction is a gradient

    @property
    def step(self) -> float:
        """A way along the direction that shows, in activation units: between the labels' means, or worth one nat of refusal."""
        return self.norm if self.norm is not None else 1 / max(self.gradient or 0.0, 1e-6)


def separations(held_out: dict[str, torch.Tensor], layers: int) -> dict[str, list[float | None]]:
    """AUROC and separation by layer of held-out coordinates [rows, layers]; None where rows are too few to tell."""
    safe, unsafe = (held_out.get(label, torch.zeros(0, layers)) for label in ("safe", "unsafe"))
    pairs = list(zip(safe.unbind(1), unsafe.unbind(1), strict=True))
    return {
        "auroc": [auroc(a, b) if len(a) and len(b) else None for a, b in pairs],
        "separation": [separation(a, b) if min(len(a), len(b)) > 1 else None for a, b in pairs],
    }


def cosines(one: torch.Tensor, other: torch.Tensor) -> list[float]:
    return torch.cosine_similarity(one, other, dim=-1).tolist()


def auroc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Probability that a value of `positive` [n] exceeds one of `negative` [m]; ties count half."""
    difference = positive[:, None] - negative[None, :]
    return ((difference > 0).double() + (difference == 0).double() / 2).mean().item()


def separation(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Difference of the means over the pooled standard deviation (Cohen's d, signed)."""
    pooled = ((positive.var() + negative.var()) / 2).sqrt()
    return ((positive.mean() - negative.mean()) / pooled.clamp_min(1e-12)).item()


def rounded(statistics: Sequence[LayerStatistics]) -> tuple[LayerStatistics, ...]:
    """As they are reported."""
    return tuple(LayerStatistics(**{k: _short(v) for k, v in asdict(layer).items()}) for layer in statistics)


def _short(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value
