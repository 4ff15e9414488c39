"""results.json, written from `Results` and read into them.

Reading takes what others wrote, or an older version: a number that is missing, null, NaN or no number was not measured, and so
was a part that has another form. Nothing else in this package looks into the document.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from exporter.evaluation.results import (
    About,
    CellFigures,
    DefenceFigures,
    Difference,
    Differences,
    GroupFigures,
    Interval,
    Rate,
    Results,
    ScenarioMeans,
)

RESULTS = "results.json"
Document = dict[str, object]
T = TypeVar("T")


def write_results(folder: Path, results: Results) -> None:
    partial = folder / f"{RESULTS}.partial"
    partial.write_text(json.dumps(as_document(results), indent=2, allow_nan=False) + "\n", "utf-8")
    partial.replace(folder / RESULTS)


def as_document(results: Results) -> Document:
    """The content of results.json."""
    about = results.about
    document: Document = {
        "benchmark": results.benchmark,
        "source": results.source,
        "n": results.n,
        "judge": results.judge,
        "date": results.date,
        "split": about.split,
        "limit_per_cell": about.limit_per_cell,
        "checkpoint": dict(about.checkpoint),
        "device": about.device,
        "versions": dict(about.versions),
        "defences": _each(results.defences, _of_defence),
        "paired": _each(results.paired, _of_differences),
    }
    if results.mm_safetybench is not None:
        document["mm_safetybench"] = _each(results.mm_safetybench, _of_scenarios)
    return document


def _each(parts: Mapping[str, T], written: Callable[[T], Document | None]) -> Document:
    return {name: written(part) for name, part in parts.items()}


def _of_defence(found: DefenceFigures) -> Document:
    return {
        "n_harmful": found.n_harmful,
        "n_benign": found.n_benign,
        **_of_rates(asr=found.asr, over_refusal=found.over_refusal, utility=found.utility),
        "degenerate": found.degenerate,
        "seconds_per_reply": found.seconds_per_reply,
        "cost_ratio": found.cost_ratio,
        "seconds": dict(found.seconds),
        "by_cell": _each(found.by_cell, _of_cell),
        "by_category": _each(found.by_category, _of_group),
        "by_image_kind": _each(found.by_image_kind, _of_group),
    }


def _of_cell(found: CellFigures) -> Document:
    rates = _of_rates(refused=found.refused, asr=found.asr, over_refusal=found.over_refusal, utility=found.utility)
    return {"n": found.n, **rates}


def _of_group(found: GroupFigures) -> Document:
    return {"n": found.n, **_of_rates(asr=found.asr, over_refusal=found.over_refusal)}


def _of_rates(**rates: Rate) -> Document:
    """Each share and its interval under two keys."""
    return {key: part for name, rate in rates.items() for key, part in ((name, rate.value), (f"{name}_ci95", _of(rate.ci95)))}


def _of(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _of_differences(found: Differences) -> Document:
    return {
        "asr": _of_difference(found.asr),
        "over_refusal": _of_difference(found.over_refusal),
        "utility": _of_difference(found.utility),
        "by_cell": _each(found.by_cell, _of_difference),
    }


def _of_difference(found: Difference) -> Document | None:
    if found.difference is None:
        return None
    return {"difference": found.difference, "ci95": _of(found.ci95), "p": found.p, "n": found.n}


def _of_scenarios(found: ScenarioMeans) -> Document:
    return {"mean_13": found.mean_13, **({} if found.mean_8 is None else {"mean_8": found.mean_8})}


def read_results(document: object) -> Results:
    """The content of results.json, whoever wrote it."""
    tree = _Tree(document)
    return Results(
        benchmark=tree.text("benchmark"),
        source=tree.text("source"),
        n=tree.whole("n"),
        judge=tree.text("judge"),
        date=tree.text("date"),
        about=About(
            split=tree.text("split"),
            limit_per_cell=tree.whole("limit_per_cell"),
            checkpoint=tree.texts("checkpoint"),
            device=tree.text("device"),
            versions=tree.texts("versions"),
        ),
        defences=tree.each("defences", _defence),
        paired=tree.each("paired", _differences),
        mm_safetybench=tree.each("mm_safetybench", _scenarios) if tree.has("mm_safetybench") else None,
    )


class _Tree:
    """A JSON object, or what stands in its place; each method reads one key, and tells what does not fit as not there."""

    def __init__(self, value: object):
        self._parts: Mapping[object, object] = value if isinstance(value, Mapping) else {}

    def has(self, key: str) -> bool:
        return isinstance(self._parts.get(key), Mapping)

    def part(self, key: str) -> _Tree:
        return _Tree(self._parts.get(key))

    def each(self, key: str, read: Callable[[_Tree], T]) -> dict[str, T]:
        """The objects below a key; anything else there is left out."""
        below = self.part(key)._parts
        return {str(name): read(_Tree(value)) for name, value in below.items() if isinstance(value, Mapping)}

    def text(self, key: str) -> str | None:
        value = self._parts.get(key)
        return value if isinstance(value, str) else None

    def texts(self, key: str) -> dict[str, str]:
        below = self.part(key)
        return {str(name): value for name, value in below._parts.items() if isinstance(value, str)}

    def number(self, key: str) -> float | None:
        return finite(self._parts.get(key))

    def numbers(self, key: str) -> dict[str, float]:
        below = self.part(key)._parts.items()
        return {str(name): value for name, raw in below if (value := finite(raw)) is not None}

    def whole(self, key: str) -> int | None:
        value = self.number(key)
        return None if value is None else int(value)

    def interval(self, key: str) -> Interval | None:
        value = self._parts.get(key)
        if not isinstance(value, list | tuple) or len(value) != 2:
            return None
        low, high = finite(value[0]), finite(value[1])
        return None if low is None or high is None else (low, high)

    def rate(self, name: str) -> Rate:
        return Rate(self.number(name), self.interval(f"{name}_ci95"))


def finite(value: object) -> float | None:
    """A finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond what a float holds
        return None
    return number if math.isfinite(number) else None


def _defence(tree: _Tree) -> DefenceFigures:
    return DefenceFigures(
        n_harmful=tree.whole("n_harmful"),
        n_benign=tree.whole("n_benign"),
        asr=tree.rate("asr"),
        over_refusal=tree.rate("over_refusal"),
        utility=tree.rate("utility"),
        degenerate=tree.number("degenerate"),
        seconds_per_reply=tree.number("seconds_per_reply"),
        cost_ratio=tree.number("cost_ratio"),
        seconds=tree.numbers("seconds"),
        by_cell=tree.each("by_cell", _cell),
        by_category=tree.each("by_category", _group),
        by_image_kind=tree.each("by_image_kind", _group),
    )


def _cell(tree: _Tree) -> CellFigures:
    rates = (tree.rate(name) for name in ("refused", "asr", "over_refusal", "utility"))
    return CellFigures(tree.whole("n"), *rates)


def _group(tree: _Tree) -> GroupFigures:
    return GroupFigures(tree.whole("n"), tree.rate("asr"), tree.rate("over_refusal"))


def _differences(tree: _Tree) -> Differences:
    asr, over_refusal, utility = (_difference(tree.part(name)) for name in ("asr", "over_refusal", "utility"))
    return Differences(asr, over_refusal, utility, tree.each("by_cell", _difference))


def _difference(tree: _Tree) -> Difference:
    return Difference(tree.number("difference"), tree.interval("ci95"), tree.number("p"), tree.whole("n"))


def _scenarios(tree: _Tree) -> ScenarioMeans:
    return ScenarioMeans(tree.number("mean_13"), tree.number("mean_8"))
