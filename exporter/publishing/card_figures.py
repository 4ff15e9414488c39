"""The part of the model card on what was measured, in Markdown."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from exporter.data.cells import cell_words, cells_in_rows
from exporter.evaluation.defences import defence_words, defences_in_rows
from exporter.evaluation.results import DefenceFigures, Rate, Results
from exporter.evaluation.verdict import Effect, judge_effect, percent
from exporter.publishing.markdown import code, escaped, plain, table
from exporter.publishing.plots import PICTURES

MISSING = "\N{EN DASH}"


@dataclass(frozen=True)
class Caution:
    """Stands above everything else: a headline, and a sentence for each thing that is wrong."""

    headline: str
    sentences: tuple[str, ...]


def warning(results: Results | None) -> Caution | None:
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


def evaluation(results: Results, assets: Path) -> Evaluation:
    return Evaluation(
        effect=judge_effect(results),
        about=_about(results),
        defences=defence_table(results),
        cells=cell_table(results),
        scenarios=_scenario_table(results),
        residual=_residual(results),
        cost=_cost(results.shiftdc),
        source=_source(results.source),
        pictures={f"assets/{name}": text for name, text in PICTURES.items() if (assets / name).is_file()},
    )


def evaluate_command(repo: str, results: Results | None) -> str:
    """The command that gives the figures."""
    found = results or Results()
    options = {"--benchmark": found.benchmark or "demo", "--defence": "all"}
    if found.about.split not in (None, "test"):
        options["--split"] = str(found.about.split)
    if found.judge not in (None, "prefix"):
        options["--judge"] = str(found.judge)
    if found.about.limit_per_cell is not None:
        options["--limit"] = str(found.about.limit_per_cell)
    words = [repo, *(word for option in options.items() for word in option)]
    return f"shiftdc-export evaluate {' '.join(shlex.quote(plain(w)) for w in words)}"


def defence_table(results: Results) -> str:
    rows = [
        [escaped(defence_words(name)), _rate(f.asr), _rate(f.over_refusal), _rate(f.utility), _times(f.cost_ratio)]
        for name, f in defences_in_rows(results.defences).items()
    ]
    return table(["defence", "attack success, %", "harmless refused, %", "right answers, %", "time"], rows)


def cell_table(results: Results) -> str:
    """Cell by cell, without and with calibration; attacks count where they succeed, harmless requests where refused."""
    rows = []
    for cell, after in cells_in_rows(results.shiftdc.by_cell).items():
        before = results.direct.cell(cell)
        counted, without = ("attack succeeds", before.asr) if after.is_attack else ("refused", before.over_refusal)
        rows.append([escaped(cell_words(cell)), _count(after.n), counted, _rate(without), _rate(after.failed)])
    return table(["cell", "n", "counted, %", "without", "with calibration"], rows)


def _scenario_table(results: Results) -> str:
    """MM-SafetyBench's own means: some scenarios are answered whatever one does, so that of eight stands beside that of all."""
    means = {n: m for n, m in (results.mm_safetybench or {}).items() if n in results.defences}
    rows = [
        [escaped(defence_words(name)), _percent(found.mean_13), _percent(found.mean_8)]
        for name, found in defences_in_rows(means).items()
    ]
    return table(["mean attack success, %", "13 scenarios", "8 scenarios (01-07, 09)"], rows) if rows else ""


def _about(results: Results) -> str:
    own, about = results.shiftdc, results.about
    counts = f"{_count(own.n_harmful)} attacks and {_count(own.n_benign)} harmless requests in the table"
    parts = [
        f"Benchmark {_benchmark(results)}",
        *([f"split {code(about.split)}"] if about.split else []),
        f"{_count(results.n)} questions ({counts})",
        f"judge {code('not named' if results.judge is None else results.judge)}",
        f"measured on {escaped('an unknown day' if results.date is None else results.date)}",
        *([f"on {escaped(about.device)}"] if about.device else []),
    ]
    return ", ".join(parts)


def _benchmark(results: Results) -> str:
    return code("unnamed" if results.benchmark is None else results.benchmark)


def _residual(results: Results) -> str | None:
    found = results.shiftdc.asr
    return None if found.value is None else f"{_rate(found)} % of the attacks of {_benchmark(results)}"


def _cost(own: DefenceFigures) -> str | None:
    if own.cost_ratio is None:
        return None
    parts = ", ".join(f"{escaped(stage)} {seconds:.3g} s" for stage, seconds in own.seconds.items())
    return f"{_times(own.cost_ratio)} the time of a reply without calibration" + (f" ({parts} a reply)" if parts else "")


def _source(given: str | None) -> str:
    """Where the benchmark's data come from; of a path only its last part, the rest is the author's own business."""
    source = plain("of unknown origin" if given is None else given)
    is_path = source.startswith(("/", "~", ".", "\\")) or re.match(r"[A-Za-z]:[\\/]", source)
    return re.split(r"[\\/]", source.rstrip("\\/"))[-1] if is_path else source


def _rate(found: Rate) -> str:
    return MISSING if found.value is None else percent(found.value, found.ci95)


def _percent(value: float | None) -> str:
    return _rate(Rate(value))


def _times(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f} \N{MULTIPLICATION SIGN}"


def _count(value: int | None) -> str:
    return MISSING if value is None else str(value)
