"""`--layers auto`: which decoder layers to calibrate, from held-out statistics alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exporter.directions.statistics import LayerStatistics
from exporter.errors import InputError

AUROC = 0.9
SPLIT_HALF_COSINE = 0.8
#: Share of the best layer's separation that a layer must reach.
SEPARATION = 0.5
#: Layers that an error names.
NAMED = 6
#: Layers before this share of the depth are never chosen: the paper's sweep has the first layers worst and the middle best.
EARLIEST = 0.3


@dataclass(frozen=True)
class LayerChoice:
    """The layers to calibrate, in ascending order, and one sentence for each layer that was left out."""

    layers: tuple[int, ...]
    criterion: str
    left_out: dict[int, str]


def choose_layers(statistics: Sequence[LayerStatistics], depth: int) -> LayerChoice:
    """The longest run of neighbouring layers that separate held-out safe from unsafe text reliably.

    A layer qualifies where the held-out AUROC of the coordinate is at least 0.9, two halves of the fit rows give directions of
    cosine at least 0.8, the separation is at least half of the best layer's, and at least 0.3 of the depth lies before it.
    What is not known for lack of unsafe rows is not asked for, and the criterion says so. Of runs of one length the later is
    taken. Raises InputError where no layer qualifies: such directions are noise.
    """
    best = max((s.separation for s in statistics if s.separation is not None), default=0.0)
    left_out = {s.layer: reason for s in statistics if (reason := _objection(s, best, depth))}
    runs: list[list[int]] = []
    order = {layer: i for i, layer in enumerate(sorted(s.layer for s in statistics))}
    for layer in (i for i in order if i not in left_out):
        if runs and order[runs[-1][-1]] == order[layer] - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    if not runs:
        raise InputError(
            f"--layers auto: no decoder layer qualifies: {_misses(statistics, best, depth)}; "
            "the model may not be aligned, or the calibration rows are too few or too mixed; "
            "give --layers A-B to calibrate all the same."
        )
    longest = max(reversed(runs), key=len)
    left_out |= {layer: "not in the longest run" for run in runs if run is not longest for layer in run}
    return LayerChoice(tuple(longest), _criterion(statistics, best), dict(sorted(left_out.items())))


def _criterion(statistics: Sequence[LayerStatistics], best: float) -> str:
    """What was asked of layers, and what could not be."""
    first = statistics[0]
    parts = {
        f"held-out AUROC >= {AUROC:g}": first.auroc,
        f"split-half cosine >= {SPLIT_HALF_COSINE:g}": first.split_half_cosine,
        f"separation >= {SEPARATION:g} of the best layer's ({best:.2f})": first.separation,
    }
    asked = [part for part, value in parts.items() if value is not None]
    missing = [part.split(" >=")[0] for part, value in parts.items() if value is None]
    listed = " and ".join(filter(None, (", ".join(asked[:-1]), *asked[-1:])))
    note = f"; not known for lack of harmful rows: {', '.join(missing)}" if missing else ""
    return f"longest run of layers from {EARLIEST:g} of the depth on" + (f" with {listed}" if listed else "") + note


def _misses(statistics: Sequence[LayerStatistics], best: float, depth: int) -> str:
    """What each layer fails by, the nearest miss first."""
    late = [(layer, _shortfalls(layer, best)) for layer in statistics if not _is_early(layer, depth)]
    late.sort(key=lambda found: max(short.share for short in found[1]))
    parts = [f"layer {layer.layer} by {' and '.join(map(str, shorts))}" for layer, shorts in late[:NAMED]]
    more = [f"{len(late) - NAMED} more by more"] if len(late) > NAMED else []
    early = [f"the first {EARLIEST:g} of {depth} layers are never chosen"] if len(late) < len(statistics) else []
    return ", ".join([*parts, *more, *early])


@dataclass(frozen=True)
class _Shortfall:
    name: str
    value: float
    least: float

    @property
    def share(self) -> float:
        return 1 - self.value / self.least

    def __str__(self) -> str:
        return f"{self.name} {self.value:.3f} (expected {self.least:.3g})"


def _shortfalls(layer: LayerStatistics, best: float) -> list[_Shortfall]:
    asked = (
        ("held-out AUROC", layer.auroc, AUROC),
        ("split-half cosine", layer.split_half_cosine, SPLIT_HALF_COSINE),
        ("separation", layer.separation, SEPARATION * best),
    )
    return [_Shortfall(name, value, least) for name, value, least in asked if value is not None and value < least]


def _is_early(layer: LayerStatistics, depth: int) -> bool:
    return layer.layer < EARLIEST * depth


def _objection(layer: LayerStatistics, best: float, depth: int) -> str | None:
    if _is_early(layer, depth):
        return f"among the first {EARLIEST:g} of {depth} layers"
    shorts = _shortfalls(layer, best)
    return f"{shorts[0].name} {shorts[0].value:.3f}" if shorts else None
