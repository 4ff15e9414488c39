"""Directions without harmful data, and with very little, beside the normal ones: cosines, attack success, over-refusal.

    python -m benchmarks.effect.harmless_calibration [--split development|test] [--limit N] [--output FILE.json]

Runs on the packaged demo model. Every route is tried on middle and on late layers, with the model's own captions; the
harmful rows of the small sets are drawn `DRAWS` times. Prints a table, writes a JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from exporter.checkpoint.open import open_export
from exporter.data.benchmarks import load_benchmark
from exporter.data.calibration import CalibrationSet
from exporter.data.calibration_sets import load_calibration
from exporter.data.cells import BENIGN, HEADLINE
from exporter.data.questions import Question
from exporter.data.refusals import begins_as_refusal
from exporter.directions.directions import Directions
from exporter.directions.fit import fit_directions
from exporter.directions.refusal_gradient import refusal_gradients
from exporter.evaluation.intervals import share
from exporter.models.vlm import VLM, Inputs
from exporter.pipeline.export import export
from exporter.pipeline.plan import ExportOptions, make_plan

NORMAL, HARMLESS = "180 harmful (normal)", "harmless"
FEW, DRAWS = (8, 4, 2, 1), 3
#: `--layers auto` takes 3-7.
RANGES = {"middle layers 3-4": (3, 4), "late layers 5-7": (5, 6, 7)}
CELLS = (*HEADLINE, *BENIGN)
WRONG_OPENER = " the"
BATCH, MAX_NEW_TOKENS = 32, 32


@dataclass(frozen=True)
class Prepared:
    """A batch of questions with the model's own captions, which no direction changes."""

    questions: list[Question]
    inputs: Inputs
    captions: list[list[int]]


def subset(calibration: CalibrationSet, unsafe: int, draw: int) -> CalibrationSet:
    """All safe rows, and `unsafe` rows of different categories to fit; none held out."""
    by_category: dict[str | None, list[Any]] = {}
    for row in calibration.select("fit", "unsafe"):
        by_category.setdefault(row.category, []).append(row)
    rng = random.Random(draw)
    categories = rng.sample(sorted(by_category, key=str), len(by_category))
    chosen = [rng.choice(by_category[categories[i % len(categories)]]) for i in range(unsafe)]
    return replace(calibration, rows=(*calibration.labelled("safe").rows, *chosen))


def routes(vlm: VLM, recipe: Any) -> dict[str, list[Directions]]:
    """Directions by route, a few draws where chance has a part."""
    whole = load_calibration("demo")

    def fit(calibration: CalibrationSet) -> Directions:
        return fit_directions(vlm, calibration, recipe.prompts)

    normal, harmless = fit(whole), fit(load_calibration("harmless", "demo"))
    few = {f"{n} harmful": [fit(subset(whole, n, d)) for d in range(DRAWS)] for n in FEW}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(normal.direction.shape, generator=generator)
    return {
        NORMAL: [normal],
        **few,
        HARMLESS: [harmless],
        f"control: harmless, wrong opener ({WRONG_OPENER.strip()!r})": [replace(harmless, direction=wrong(vlm, recipe, whole))],
        "control: random direction": [replace(harmless, direction=noise / noise.norm(dim=-1, keepdim=True))],
    }


def wrong(vlm: VLM, recipe: Any, calibration: CalibrationSet) -> torch.Tensor:
    """Unit directions of a first token with which the model begins no refusal, [layers, hidden]."""
    token = vlm.tokenizer(WRONG_OPENER, add_special_tokens=False)["input_ids"][0]
    prompts = [vlm.token_ids(recipe.prompts.counterpart(r.request, r.caption)) for r in calibration.select("fit", "safe")]
    layers = list(vlm.decoder_layers)
    gradient = torch.cat([g for _, g, _ in refusal_gradients(vlm, layers, prompts, [token])]).mean(0)
    return -gradient / gradient.norm(dim=-1, keepdim=True)


@torch.no_grad()
def prepared(vlm: VLM, questions: Sequence[Question]) -> list[Prepared]:
    batches = []
    for start in range(0, len(questions), BATCH):
        chunk = list(questions[start : start + BATCH])
        inputs = vlm.encode([q.request for q in chunk], [q.image.load() for q in chunk if q.image is not None])
        batches.append(Prepared(chunk, inputs, vlm.model.shiftdc_captions(**inputs)))
    return batches


@torch.no_grad()
def refusals(vlm: VLM, batches: Sequence[Prepared], directions: Directions | None, layers: Sequence[int]) -> dict[str, bool]:
    """Whether each question was refused; the base model where there are no directions."""
    for layer, correction in zip(vlm.model.config.shiftdc["layers"], vlm.model.shiftdc_corrections, strict=True):
        correction.strength = 1.0 if layer in layers else 0.0
        if directions is not None:
            correction.direction.copy_(directions.of(layer)[0])
    found = {}
    for batch in batches:
        options: dict[str, Any] = {"shiftdc": False}
        if directions is not None:
            options = {"shiftdc_reference": vlm.model.shiftdc_reference(**batch.inputs, captions=batch.captions)}
        out = vlm.model.generate(**batch.inputs, **options, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        replies = [vlm.decode(row) for row in out[:, batch.inputs["input_ids"].shape[1] :]]
        found |= {q.id: begins_as_refusal(r) for q, r in zip(batch.questions, replies, strict=True)}
    return found


def figures(questions: Sequence[Question], draws: Sequence[dict[str, bool]]) -> dict[str, Any]:
    """Shares by case: of one draw with its Wilson interval, of several the mean with the least and the greatest."""

    def one(cells: Sequence[str], refused: bool) -> dict[str, Any]:
        each = [share([found[q.id] == refused for q in questions if q.cell in cells]) for found in draws]
        known = [s for s in each if s is not None]
        values = [s.value for s in known]
        spread = known[0].ci95 if len(known) == 1 else (min(values), max(values))
        mean = sum(values) / len(values)
        return {"share": round(mean, 4), "interval": [round(v, 4) for v in spread], "n": known[0].n}

    return {
        "attack_success": one(HEADLINE, refused=False),
        "over_refusal": one(BENIGN, refused=True),
    }


def cosines(found: Directions, normal: Directions) -> list[float]:
    return torch.cosine_similarity(found.direction, normal.direction, dim=-1).tolist()


def measure(split: str, limit: int | None) -> dict[str, Any]:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan("demo", ExportOptions.of(output=Path(folder) / "demo", layers="0-7"))
        export(plan)
        vlm = open_export(plan.output)
    found = routes(vlm, plan.recipe)
    questions = [q for q in load_benchmark("demo", split=split).limited(limit).questions if q.cell in CELLS]
    batches = prepared(vlm, questions)
    base = figures(questions, [refusals(vlm, batches, None, ())])
    rows: dict[str, Any] = {}
    for name, draws in found.items():
        each = [cosines(d, found[NORMAL][0]) for d in draws]
        rows[name] = {"draws": len(draws), "cosine_least": [round(min(c), 4) for c in zip(*each, strict=True)]}
        for title, layers in RANGES.items():
            refused = [refusals(vlm, batches, d, layers) for d in draws]
            rows[name][title] = {"layers": list(layers), **figures(questions, refused)}
        print(row(name, rows[name]), flush=True)
    return {
        "split": split,
        "limit_per_cell": limit,
        "harmless_route": found[HARMLESS][0].origin,
        "no_defence": base,
        "routes": rows,
        "seconds": round(time.perf_counter() - start),
    }


def row(name: str, found: dict[str, Any]) -> str:
    """One line of the table: least cosines by range, then attack success / over-refusal."""
    ranges = [found[title] for title in RANGES]
    cosine = ", ".join(f"{min(found['cosine_least'][i] for i in r['layers']):.2f}" for r in ranges)
    cells = [f"{_percent(r['attack_success'])} / {_percent(r['over_refusal'])}" for r in ranges]
    return f"| {name} | {cosine} | " + " | ".join(cells) + " |"


def _percent(figure: dict[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{100 * figure['share']:.1f} [{100 * low:.1f}-{100 * high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("development", "test"), default="development")
    parser.add_argument("--limit", type=int, help="questions per cell [default: all]")
    parser.add_argument("--output", type=Path, default=Path("harmless-calibration.json"))
    arguments = parser.parse_args()
    print("| route | cosine to the normal direction, least of each range | " + " | ".join(RANGES) + " |")
    print("|---" * (2 + len(RANGES)) + "|")
    found = measure(arguments.split, arguments.limit)
    base = found["no_defence"]
    print(f"without calibration: {_percent(base['attack_success'])} / {_percent(base['over_refusal'])}; {found['seconds']} s")
    arguments.output.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
