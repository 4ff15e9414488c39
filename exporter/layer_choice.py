"""`--layers auto`: which decoder layers to calibrate, from held-out statistics alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exporter.directions import LayerStatistics
from exporter.errors import InputError

AUROC = 0.9
SPLIT_HALF_COSINE = 0.8
#: Share of the best layer's separation that a layer must reach.
SEPARATION = 0.5
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
            f"--layers auto: no decoder layer {_failure(statistics)}; see the criterion in the README: "
            "the model may not be aligned; give --layers A-B to calibrate all the same."
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


def _failure(statistics: Sequence[LayerStatistics]) -> str:
    """The nearest miss."""
    known = {s.layer: s.auroc for s in statistics if s.auroc is not None}
    if not known:
        return f"gives one direction for two halves of the rows (cosine at least {SPLIT_HALF_COSINE})"
    top = max(known, key=lambda layer: known[layer])
    return f"separates safe from unsafe text reliably (best held-out AUROC {known[top]:.2f} at layer {top}, expected {AUROC})"


def _objection(layer: LayerStatistics, best: float, depth: int) -> str | None:
    if layer.layer < EARLIEST * depth:
        return f"among the first {EARLIEST:g} of {depth} layers"
    if layer.auroc is not None and layer.auroc < AUROC:
        return f"held-out AUROC {layer.auroc:.3f}"
    if layer.split_half_cosine is not None and layer.split_half_cosine < SPLIT_HALF_COSINE:
        return f"split-half cosine {layer.split_half_cosine:.3f}"
    if layer.separation is not None and layer.separation < SEPARATION * best:
        return f"separation {layer.separation:.2f}"
    return None
