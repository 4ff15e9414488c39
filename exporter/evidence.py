"""Evidence about an exported checkpoint: evaluate it, draw pictures, and put both into its report and card."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from exporter import __version__, plots
from exporter.activations import last_token, recording
from exporter.bake import REPORT, SHARD, sha256
from exporter.benchmarks import load_benchmark
from exporter.calibration_hub import calibrated_revision, unseen
from exporter.card import render_card
from exporter.defences import Defence, Run
from exporter.directions import LayerStatistics
from exporter.errors import InputError, printable
from exporter.evaluate import RESULTS, evaluate
from exporter.exported import open_export, read_report
from exporter.judges import load_judge
from exporter.manifest import CARD, recorded, with_hashes
from exporter.progress import Progress
from exporter.questions import Benchmark
from exporter.recipes import Recipe
from exporter.replies import FILE as REPLIES
from exporter.replies import ReplyLog, free_name
from exporter.source import BaseCheckpoint
from exporter.staging import write_together
from exporter.verdict import Effect, judge_effect
from exporter.vlm import VLM

log = logging.getLogger(__name__)

#: Questions per group in the picture of projections.
PROJECTED = 60


@dataclass(frozen=True)
class Evidence:
    """results.json's content, what it means, where it lies, and the replies of other settings that were set aside."""

    results: dict[str, Any]
    effect: Effect
    folder: Path
    set_aside: Path | None


def gather(
    checkpoint: Path,
    defences: Sequence[Defence],
    *,
    benchmark: str = "demo",
    split: str = "test",
    limit: int | None = None,
    categories: Sequence[str] = (),
    judge: str = "prefix",
    output: Path | None = None,
    attach: bool = True,
    dtype: str = "auto",
    device_map: str | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 128,
    progress: Progress,
) -> Evidence:
    """Evaluate `checkpoint`; with `attach`, its report, card and pictures say what was found. Raises InputError.

    Replies, results.json and pictures go to `output` (default ./<checkpoint>-evaluation). Only figures and pictures are attached.
    """
    report = read_report(checkpoint)
    folder = output or Path(f"{checkpoint.name}-evaluation")
    check_results_folder(folder)
    named_judge = load_judge(judge)  # before benchmarks are fetched
    calibrated = report["calibration"]
    whole = load_benchmark(benchmark, split=split, revision=calibrated_revision(calibrated, benchmark))
    found = of_categories(unseen(whole, calibrated), categories).limited(limit)
    replies = ReplyLog(folder, settings(checkpoint, report, found, max_new_tokens, dtype))
    vlm = open_export(checkpoint, dtype=dtype, device_map=device_map)
    blank_shifts = {s["layer"]: s["blank_shift"] for s in report["statistics"]}
    results = evaluate(
        Run(vlm, max_new_tokens), found, defences, named_judge, replies, about(checkpoint, vlm, split, limit),
        batch_size=batch_size, blank_shifts=blank_shifts, progress=progress,
    )  # fmt: skip
    pictures = plots.write_all(results, report, projections(vlm, found), folder)
    effect = judge_effect(results)
    if attach:
        attach_results(checkpoint, report, results, pictures)
    return Evidence(results, effect, folder, replies.set_aside)


def check_results_folder(folder: Path) -> None:
    """Raise InputError where there can be no folder, or something would be overwritten that is not of an earlier evaluation."""
    if files := [place for place in (folder, *folder.parents) if place.exists() and not place.is_dir()]:
        raise InputError(f"--output: {files[0]} is no folder; give another one.")
    there = [name for name in (RESULTS, *plots.PICTURES) if (folder / name).exists()]
    if there and not (folder / REPLIES).exists():
        raise InputError(
            f"--output: {folder} holds {there[0]} and no {REPLIES} of an earlier evaluation, so that it may be somebody's; "
            "give another folder."
        )


def of_categories(benchmark: Benchmark, names: Sequence[str]) -> Benchmark:
    """The questions of some categories; of all, if none is named. Raises InputError."""
    known = sorted({q.category for q in benchmark.questions if q.category is not None})
    if unknown := [n for n in names if n not in known]:
        raise InputError(f"--category: {benchmark.name} has none named {unknown[0]!r}, expected of {', '.join(known) or 'none'}.")
    chosen = tuple(q for q in benchmark.questions if not names or q.category in names)
    return replace(benchmark, questions=chosen)


def settings(checkpoint: Path, report: dict[str, Any], benchmark: Benchmark, max_new_tokens: int, dtype: str) -> dict[str, Any]:
    """What replies depend on: the model to the bit, the questions, the length and the arithmetic."""
    questions = json.dumps([[q.id, q.request] for q in benchmark.questions]).encode()
    return {
        "shards": report["base_model"]["shards"],
        "directions": sha256(checkpoint / SHARD),
        "config": sha256(checkpoint / "config.json"),
        "benchmark": benchmark.name,
        "source": benchmark.source,
        "questions": hashlib.sha256(questions).hexdigest(),
        "max_new_tokens": max_new_tokens,
        "dtype": dtype,
    }


def about(checkpoint: Path, vlm: VLM, split: str, limit: int | None) -> dict[str, Any]:
    """What a reader of results.json needs to know beside the figures."""
    return {
        "split": split,
        "limit_per_cell": limit,
        "checkpoint": {"name": checkpoint.name, "directions": sha256(checkpoint / SHARD)[:16]},
        "device": torch.cuda.get_device_name() if vlm.device.type == "cuda" else "cpu",
        "versions": {"shiftdc-export": __version__, "torch": torch.__version__},
    }


@torch.no_grad()
def projections(vlm: VLM, benchmark: Benchmark) -> plots.Projections | None:
    """Coordinates along the direction of the middle calibrated layer: of text, of images before and after the correction.

    None where the benchmark has no image or the reference is static.
    """
    config = vlm.model.config.shiftdc
    if config["reference"] == "static":
        return None
    column = len(config["layers"]) // 2
    layer = config["layers"][column]
    module = vlm.decoder_layers(config["decoder_layers"])[layer]
    points: dict[str, list[float]] = {}
    for side, cell in (("unsafe", "harmful_image"), ("safe", "harmless_image")):
        chosen = [q for q in benchmark.limited(PROJECTED).questions if q.cell == cell and q.image is not None]
        for start in range(0, len(chosen), 16):
            batch = chosen[start : start + 16]
            inputs = vlm.encode([q.request for q in batch], [q.image() for q in batch if q.image is not None])
            reference = vlm.model.shiftdc_reference(**inputs)
            position = last_token(inputs["attention_mask"])
            with recording([module], position) as recorded:
                vlm.model(**inputs, shiftdc_reference=reference, shiftdc_position=position, logits_to_keep=1)
            after = recorded[0] @ module.shiftdc.direction.cpu()
            before = vlm.model.shiftdc_coordinates(**inputs)[:, column]
            for group, values in (
                (f"{side} text", reference[:, column]),
                (f"{side} image before", before),
                (f"{side} image after", after),
            ):
                points.setdefault(group, []).extend(values.tolist())
    return plots.Projections(layer, points) if points else None


def attach_results(checkpoint: Path, report: dict[str, Any], results: dict[str, Any], pictures: Sequence[Path]) -> None:
    """Put figures and pictures into the checkpoint; replies stay outside."""
    report = {**report, "evaluation": results}
    assets = {f"assets/{p.name}": p.read_bytes() for p in pictures}
    write_together(checkpoint, assets)
    write_report_and_card(checkpoint, recorded(report, checkpoint, assets))


def write_report_and_card(checkpoint: Path, report: dict[str, Any]) -> None:
    """Write a report, and the card that it gives; the card shows the pictures that are there."""
    card = card_of(checkpoint, report)
    _keep_edited(checkpoint, report)
    report = with_hashes(report, {CARD: hashlib.sha256(card.encode()).hexdigest()})
    write_together(checkpoint, {CARD: card, REPORT: json.dumps(report, indent=2, allow_nan=False) + "\n"})


def _keep_edited(checkpoint: Path, report: dict[str, Any]) -> None:
    """Put a card that its owner has written into under another name, which is no part of the export."""
    card = checkpoint / CARD
    if not card.is_file() or sha256(card) == report["files"].get(CARD):
        return
    kept = free_name(checkpoint / f".edited-{CARD}")
    shutil.copyfile(card, kept)
    log.warning("%s", printable(f"{card} was edited, and is written anew; what it was is kept in {kept}."))


def card_of(checkpoint: Path, report: dict[str, Any]) -> str:
    """The card of an export from its own report; licence and language come from the card that it has."""
    base = BaseCheckpoint(report["base_model"]["id"], report["base_model"]["revision"], checkpoint, {}, ())
    statistics = tuple(LayerStatistics(**s) for s in report["statistics"])
    return render_card(base, Recipe.model_validate(report["recipe"]), report, statistics, repo=checkpoint.name)
