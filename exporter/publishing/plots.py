"""Pictures for the model card: directions by layer, projections, attack success, cost. PNG, made to be read 600 pixels wide."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.directions.statistics import LayerStatistics
from exporter.evaluation.defences import defence_words, defences_in_rows
from exporter.evaluation.projections import Projections
from exporter.evaluation.results import DefenceFigures, Interval, Results
from exporter.evaluation.verdict import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox


#: File name of each picture, and what a reader who cannot see it is told.
PICTURES = {
    "attack_success.png": "Attack success and refusals of harmless requests, defence by defence",
    "cost.png": "Attack success against the time of a reply, for each reference",
    "layers.png": "How well each layer's direction separates safe from unsafe text, and how much images shift along it",
    "projections.png": "Where safe and unsafe inputs lie along the direction, before and after calibration",
}

# Okabe-Ito: told apart with any kind of colour vision
BLUE, VERMILLION, GREY, BLACK = "#0072B2", "#D55E00", "#A6A6A6", "#000000"
WIDTH, DPI = 6.0, 200  # inches; 1200 pixels, shown at half that size
SIZE = 10  # points: 14 of 600 pixels
REFERENCES = ("shiftdc_caption", "shiftdc_text", "shiftdc_blank", "shiftdc_static")


def write_all(
    results: Results,
    statistics: Sequence[LayerStatistics],
    chosen_layers: Sequence[int],
    projections: Projections | None,
    folder: Path,
) -> list[Path]:
    """Draw into `folder` what the numbers allow; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    attack_success, cost, layers, projected = (folder / name for name in PICTURES)
    written = []
    if _measured(results):
        plot_asr(results, attack_success)
        written.append(attack_success)
    if len(_costs(results)) > 1:
        plot_cost(results, cost)
        written.append(cost)
    if any(math.isfinite(v) for s in statistics for v in (_or_nan(s.auroc), _or_nan(s.shift_cosine))):
        plot_layers(statistics, chosen_layers, layers)
        written.append(layers)
    if projections is not None and any(_finite(p) for p in projections.points.values()):
        plot_projections(projections.points, projections.layer, projected)
        written.append(projected)
    return written


def plot_layers(statistics: Sequence[LayerStatistics], chosen_layers: Sequence[int], file: Path) -> None:
    """Held-out AUROC of text and cos(m, s) of harmful images, by decoder layer; calibrated layers shaded."""
    figure, (axes,) = _figure(3.3)
    layers = [s.layer for s in statistics]
    for layer in chosen_layers:
        axes.axvspan(layer - 0.5, layer + 0.5, color=BLUE, alpha=0.12, linewidth=0)
    curves = [
        ("AUROC, text", BLUE, "o", [_or_nan(s.auroc) for s in statistics]),
        ("cos(m, s), images", VERMILLION, "s", [_or_nan(s.shift_cosine) for s in statistics]),
    ]
    curves = [curve for curve in curves if _finite(curve[3])]
    for _, color, marker, values in curves:
        axes.plot(layers, values, color=color, marker=marker, markersize=4, linewidth=1.8)
    lowest = min((v for *_, values in curves for v in values if math.isfinite(v)), default=0.0)
    axes.set_ylim(min(-0.05, lowest - 0.08), 1.08)
    axes.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    axes.set_xticks(layers[:: max(1, len(layers) // 8)])
    axes.axhline(0, color=GREY, linewidth=0.8, zorder=0)
    _label_ends(axes, curves)
    axes.set_xlabel("decoder layer (shaded: calibrated)", fontsize=SIZE)
    axes.set_title("Safety direction: separation and image shift", fontsize=SIZE + 1, loc="left")
    _save(figure, file)


def plot_projections(points: Mapping[str, Sequence[float]], layer: int, file: Path) -> None:
    """Each input's coordinate along d at one layer, a row for each group; medians as bars, unsafe groups in red."""
    groups = {name: values for name, raw in points.items() if (values := _finite(raw))}
    figure, (axes,) = _figure(0.9 + 0.42 * len(groups))
    for row, (name, values) in enumerate(groups.items()):
        color = VERMILLION if "unsafe" in name else BLUE
        heights = [row + 0.5 * ((i * 0.618034) % 1 - 0.5) for i in range(len(values))]  # golden ratio: even, repeatable
        axes.scatter(values, heights, s=9, color=color, alpha=0.35, linewidths=0)
        middle = sorted(values)[len(values) // 2]
        axes.plot([middle, middle], [row - 0.36, row + 0.36], color=BLACK, linewidth=2, solid_capstyle="butt")
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel("unsafe  \N{LEFTWARDS ARROW}  coordinate along the direction  \N{RIGHTWARDS ARROW}  safe", fontsize=SIZE)
    axes.set_title(f"Inputs along the direction of layer {layer} (bars: medians)", fontsize=SIZE + 1, loc="left")
    _save(figure, file)


def plot_asr(results: Results, file: Path) -> None:
    """Attack success and over-refusal with 95 % whiskers, a row for each defence."""
    names, figures = zip(*_measured(results).items(), strict=True)
    figure, (left, right) = _figure(1.1 + 0.3 * len(names), columns=(1.35, 1.0))
    for axes, rates, title in (
        (left, [f.asr for f in figures], "attack success, %"),
        (right, [f.over_refusal for f in figures], "harmless refused, %"),
    ):
        for row, (name, rate) in enumerate(zip(names, rates, strict=True)):
            if rate.value is not None:
                _bar(axes, row, rate.value, rate.ci95, color={"direct": VERMILLION, "shiftdc": BLUE}.get(name, GREY))
        axes.set_xlim(0, 103)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xticks([0, 50, 100])
        axes.set_title(title, fontsize=SIZE + 1, loc="left")
    left.set_yticks(range(len(names)), [defence_words(n) for n in names])
    for name, label in zip(names, left.get_yticklabels(), strict=True):
        label.set_fontweight("bold" if name in ("direct", "shiftdc") else "normal")
    right.set_yticks([])
    _save(figure, file)


def plot_cost(results: Results, file: Path) -> None:
    """Attack success against the time of a reply, as a multiple of a plain one."""
    costs = _costs(results)
    figure, (axes,) = _figure(3.3)
    for name, cost in costs.items():
        color = VERMILLION if name == "direct" else BLUE
        if cost.interval is not None:
            axes.plot([cost.ratio, cost.ratio], [100 * b for b in cost.interval], color=color, linewidth=1.2)
        axes.scatter([cost.ratio], [100 * cost.asr], color=color, s=36, zorder=3)
    longest = max(cost.ratio for cost in costs.values())
    axes.set_xlim(0, 1.15 * longest)
    axes.set_ylim(-6, 106)
    axes.set_xlabel("time of a reply (plain reply: 1)", fontsize=SIZE)
    axes.set_title("Attack success, %, and what each reference costs", fontsize=SIZE + 1, loc="left")
    names = {n: defence_words(n).removeprefix("ShiftDC, ") for n in costs}
    _label_points(axes, {names[n]: (cost.ratio, 100 * cost.asr) for n, cost in costs.items()})
    _save(figure, file)


@dataclass(frozen=True)
class _Cost:
    """The time of a reply as a multiple of a plain one, and the attack success that it buys."""

    ratio: float
    asr: float
    interval: Interval | None


def _measured(results: Results) -> dict[str, DefenceFigures]:
    """The defences with a measured attack success, in the order of tables."""
    return {name: f for name, f in defences_in_rows(results.defences).items() if f.asr.value is not None}


def _costs(results: Results) -> dict[str, _Cost]:
    """Of direct and the references, or where none was measured of the checkpoint as it is."""
    measured = _measured(results)
    names = ["direct", *([n for n in REFERENCES if n in measured] or ["shiftdc"])]
    return {n: cost for n in names if n in measured and (cost := _cost(measured[n])) is not None}


def _cost(figures: DefenceFigures) -> _Cost | None:
    ratio, asr = figures.cost_ratio, figures.asr
    return None if ratio is None or ratio <= 0 or asr.value is None else _Cost(ratio, asr.value, asr.ci95)


def _bar(axes: Axes, row: int, value: float, interval: Interval | None, *, color: str) -> None:
    """A bar with its whisker; the figure stands right of both, or inside on the left of a whisker that leaves no room."""
    axes.barh(row, 100 * value, height=0.62, color=color)
    low, high = interval or (value, value)
    if interval is not None:
        axes.plot([100 * low, 100 * high], [row, row], color=BLACK, linewidth=1.2)
    inside = high > 0.72
    ink = "white" if inside and color != GREY else BLACK
    axes.annotate(
        percent(value),
        (100 * (low if inside else high), row),
        xytext=(-4 if inside else 4, 0),
        textcoords="offset points",
        ha="right" if inside else "left",
        va="center",
        fontsize=SIZE - 1,
        color=ink,
    )


def _label_ends(axes: Axes, curves: Sequence[tuple[str, str, str, list[float]]]) -> None:
    """Names right of the curves' ends, in their colours, moved apart where the ends are close."""
    ends = sorted(
        (next((v for v in reversed(values) if math.isfinite(v)), 0.0), name, color) for name, color, _, values in curves
    )
    low, high = axes.get_ylim()
    apart = 0.09 * (high - low)
    at = -math.inf
    for end, name, color in ends:
        at = max(end, at + apart)
        axes.annotate(
            name, (1.01, at), xycoords=("axes fraction", "data"), color=color, fontsize=SIZE, va="center", annotation_clip=False
        )


def _label_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """A name beside each point, where it covers no other name and no point: the nearest of a few dozen places."""
    from matplotlib.text import Text

    axes.figure.canvas.draw()  # fixes the layout, in which the names take no part
    frame = axes.get_window_extent()
    taken = [_around(*axes.transData.transform(p)) for p in points.values()]
    around = itertools.product((8, -8, 40, -40, 80, -80), (*range(14, 99, 14), *range(-14, -99, -14)))
    places = [(8, 0), (-8, 0), *sorted(around, key=lambda at: math.hypot(*at))]
    for name, point in points.items():
        for at in places:
            label = _annotated(axes, name, point, at)
            label.get_window_extent()  # puts the text in its place, but counts the line in
            box = Text.get_window_extent(label)
            if (
                frame.x0 < box.x0
                and box.x1 < frame.x1
                and frame.y0 < box.y0
                and box.y1 < frame.y1
                and not box.count_overlaps(taken)
            ):
                taken.append(box)
                break
            label.remove()


def _annotated(axes: Axes, name: str, point: tuple[float, float], at: tuple[int, int]) -> Annotation:
    """A name `at` so many points from its point, with a line to it where that is not beside it."""
    line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4}
    label = axes.annotate(
        name,
        point,
        xytext=at,
        textcoords="offset points",
        ha="left" if at[0] > 0 else "right",
        va="center",
        fontsize=SIZE,
        arrowprops=line if at[1] else None,
    )
    label.set_in_layout(False)
    return label


def _around(x: float, y: float) -> Bbox:
    """The square of a marker in display units."""
    from matplotlib.transforms import Bbox

    half = 5 * DPI / 72
    return Bbox.from_extents(x - half, y - half, x + half, y + half)


def _figure(height: float, columns: Sequence[float] = (1.0,)) -> tuple[Figure, list[Axes]]:
    """A figure of its own, without pyplot and its global state, and its axes, one for each column."""
    from matplotlib.figure import Figure  # takes half a second, and most commands draw nothing

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    axes = list(figure.subplots(1, len(columns), width_ratios=list(columns), squeeze=False)[0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=SIZE)
    return figure, axes


def _save(figure: Figure, file: Path) -> None:
    figure.savefig(file, format="png", metadata={"Software": None})  # no version: the same numbers give the same bytes


def _finite(values: Sequence[float]) -> list[float]:
    return [float(v) for v in values if math.isfinite(v)]


def _or_nan(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.nan
