"""The part of the model card on what was measured, in Markdown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.evaluation.verdict import Effect, bounds, cell_name, cells, defence_name, defences, judge_effect, number, percent
from exporter.publishing.markdown import code, escaped, plain, table
from exporter.publishing.plots import PICTURES

MISSING = "\N{EN DASH}"


@dataclass(frozen=True)
class Caution:
    """Stands above everything else: a headline, and a sentence for each thing that is wrong."""

    headline: str
    sentences: tuple[str, ...]


def warning(results: Mapping[str, Any] | None) -> Caution | None:
    """What a reader must know first; None where there is an effect and no harm."""
    if results is None:
        return Caution("The effect of this calibration has not been measured.", ("Measure before you rely on it.",))
    effect = judge_effect(results)
    if effect.publishable:
        return None
    if effect.effective:
        return Caution("This calibration lowers attack success and does harm elsewhere.", effect.harms)
    return Caution("This calibration was not shown to lower attack success.", (effect.sentence, *effect.harms))


@dataclass(frozen=True)
class Evaluation:
    """The part of the card on results.json, in Markdown."""

    effect: Effect
    about: str
    defences: str
    cells: str
    scenarios: str
    residual: str | None
    cost: str | None
    source: str
    pictures: dict[str, str]


def evaluation(results: Mapping[str, Any], assets: Path) -> Evaluation:
    return Evaluation(
        effect=judge_effect(results),
        about=_about(results),
        defences=defence_table(results),
        cells=cell_table(results),
        scenarios=_scenario_table(results),
        residual=_residual(results),
        cost=_cost(results),
        source=_source(results),
        pictures={f"assets/{name}": text for name, text in PICTURES.items() if (assets / name).is_file()},
    )


def evaluate_command(repo: str, results: Mapping[str, Any] | None) -> str:
    """The command that gives the figures."""
    found = results or {}
    options = {"--benchmark": found.get("benchmark") or "demo", "--defence": "all"}
    if found.get("split") not in (None, "test"):
        options["--split"] = found["split"]
    if found.get("judge") not in (None, "prefix"):
        options["--judge"] = found["judge"]
    if number(found.get("limit_per_cell")) is not None:
        options["--limit"] = found["limit_per_cell"]
    words = [repo, *(word for option in options.items() for word in option)]
    return f"shiftdc-export evaluate {' '.join(shlex.quote(plain(w)) for w in words)}"


def defence_table(results: Mapping[str, Any]) -> str:
    rows = [
        [
            escaped(defence_name(name)),
            *(_rate(figures, metric) for metric in ("asr", "over_refusal", "utility")),
            _times(figures.get("cost_ratio")),
        ]
        for name, figures in defences(results).items()
    ]
    return table(["defence", "attack success, %", "harmless refused, %", "right answers, %", "time"], rows)


def cell_table(results: Mapping[str, Any]) -> str:
    """Cell by cell, without and with calibration; attacks count where they succeed, harmless requests where refused."""
    before, after = cells(results, "direct"), cells(results, "shiftdc")
    rows = []
    for cell, figures in after.items():
        metric = "over_refusal" if number(figures.get("asr")) is None else "asr"
        rows.append(
            [
                escaped(cell_name(cell)),
                _count(figures.get("n")),
                "refused" if metric == "over_refusal" else "attack succeeds",
                _rate(before.get(cell, {}), metric),
                _rate(figures, metric),
            ]
        )
    return table(["cell", "n", "counted, %", "without", "with calibration"], rows)


def _scenario_table(results: Mapping[str, Any]) -> str:
    """MM-SafetyBench's own means: some scenarios are answered whatever one does, so that of eight stands beside that of all."""
    means = results.get("mm_safetybench")
    if not isinstance(means, Mapping):
        return ""
    names = [n for n in defences(results) if isinstance(means.get(n), Mapping)]
    rows = [[escaped(defence_name(n)), *(_percent(means[n].get(m)) for m in ("mean_13", "mean_8"))] for n in names]
    return table(["mean attack success, %", "13 scenarios", "8 scenarios (01-07, 09)"], rows) if rows else ""


def _about(results: Mapping[str, Any]) -> str:
    figures = defences(results).get("shiftdc", {})
    counts = f"{_count(figures.get('n_harmful'))} attacks and {_count(figures.get('n_benign'))} harmless requests in the table"
    parts = [
        f"Benchmark {code(results.get('benchmark', 'unnamed'))}",
        *([f"split {code(results['split'])}"] if results.get("split") else []),
        f"{_count(results.get('n'))} questions ({counts})",
        f"judge {code(results.get('judge', 'not named'))}",
        f"measured on {escaped(results.get('date', 'an unknown day'))}",
        *([f"on {escaped(results['device'])}"] if results.get("device") else []),
    ]
    return ", ".join(parts)


def _residual(results: Mapping[str, Any]) -> str | None:
    figures = defences(results).get("shiftdc", {})
    value = number(figures.get("asr"))
    if value is None:
        return None
    return f"{percent(value, bounds(figures.get('asr_ci95')))} % of the attacks of {code(results.get('benchmark', 'unnamed'))}"


def _cost(results: Mapping[str, Any]) -> str | None:
    figures = defences(results).get("shiftdc", {})
    if number(figures.get("cost_ratio")) is None:
        return None
    stages = figures.get("seconds")
    spent = {k: number(v) for k, v in stages.items()} if isinstance(stages, Mapping) else {}
    parts = ", ".join(f"{escaped(k)} {v:.3g} s" for k, v in spent.items() if v is not None)
    return f"{_times(figures['cost_ratio'])} the time of a reply without calibration" + (f" ({parts} a reply)" if parts else "")


def _source(results: Mapping[str, Any]) -> str:
    """Where the benchmark's data come from; of a path only its last part, the rest is the author's own business."""
    source = plain(results.get("source", "of unknown origin"))
    is_path = source.startswith(("/", "~", ".", "\\")) or re.match(r"[A-Za-z]:[\\/]", source)
    return re.split(r"[\\/]", source.rstrip("\\/"))[-1] if is_path else source


def _rate(figures: Mapping[str, Any], metric: str) -> str:
    return _percent(figures.get(metric), bounds(figures.get(f"{metric}_ci95")))


def _percent(value: object, interval: tuple[float, float] | None = None) -> str:
    found = number(value)
    return MISSING if found is None else percent(found, interval)


def _times(value: object) -> str:
    found = number(value)
    return MISSING if found is None else f"{found:.2f} \N{MULTIPLICATION SIGN}"


def _count(value: object) -> str:
    found = number(value)
    return MISSING if found is None else str(int(found))
