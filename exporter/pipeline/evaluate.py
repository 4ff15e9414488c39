"""Evidence about an exported checkpoint: evaluate it, draw pictures, and put both into its report and card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from exporter import __version__
from exporter.checkpoint.layout import SHARD
from exporter.checkpoint.open import open_export
from exporter.checkpoint.report import Report, read_report
from exporter.data.benchmarks import load_benchmark
from exporter.data.calibration_hub import calibrated_revision, unseen
from exporter.data.questions import Benchmark
from exporter.errors import InputError
from exporter.evaluation.defences import Defence, Run
from exporter.evaluation.evaluate import RESULTS, evaluate
from exporter.evaluation.judges import load_judge
from exporter.evaluation.projections import projections
from exporter.evaluation.replies import FILE as REPLIES
from exporter.evaluation.replies import ReplyLog
from exporter.evaluation.verdict import Effect, judge_effect
from exporter.models.vlm import VLM
from exporter.publishing import plots
from exporter.publishing.attach import attach_results
from exporter.runtime.hashing import sha256
from exporter.runtime.progress import Progress


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
    calibrated = report.calibration
    whole = load_benchmark(benchmark, split=split, revision=calibrated_revision(calibrated, benchmark))
    found = of_categories(unseen(whole, calibrated), categories).limited(limit)
    replies = ReplyLog(folder, settings(checkpoint, report, found, max_new_tokens, dtype))
    vlm = open_export(checkpoint, dtype=dtype, device_map=device_map)
    blank_shifts = {s.layer: s.blank_shift for s in report.statistics}
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


def settings(checkpoint: Path, report: Report, benchmark: Benchmark, max_new_tokens: int, dtype: str) -> dict[str, Any]:
    """What replies depend on: the model to the bit, the questions, the length and the arithmetic."""
    questions = json.dumps([[q.id, q.request] for q in benchmark.questions]).encode()
    return {
        "shards": report.base_model.shards,
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
