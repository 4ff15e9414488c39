"""Evidence about an exported checkpoint: evaluate it, draw pictures, and put both into its report and card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from exporter import __version__
from exporter.checkpoint.layout import SHARD
from exporter.checkpoint.open import open_export
from exporter.checkpoint.report import Report, read_report
from exporter.data.benchmarks import load_benchmark
from exporter.data.calibration_hub import calibrated_revision, unseen
from exporter.data.calibration_record import CalibrationRecord
from exporter.data.questions import Benchmark
from exporter.errors import InputError
from exporter.evaluation.defences import DEFENCES, STANDARD, Defence, Run
from exporter.evaluation.evaluate import evaluate
from exporter.evaluation.judges import load_judge
from exporter.evaluation.projections import projections
from exporter.evaluation.replies import FILE as REPLIES
from exporter.evaluation.replies import ReplyLog
from exporter.evaluation.results import About, Results
from exporter.evaluation.results_json import RESULTS
from exporter.evaluation.verdict import Effect, judge_effect
from exporter.models.vlm import VLM
from exporter.publishing import plots
from exporter.publishing.attach import attach_results
from exporter.runtime.hashing import sha256
from exporter.runtime.progress import Progress, silent


@dataclass(frozen=True)
class EvaluationOptions:
    """What is asked, by whom and how. Replies, results.json and pictures go to `output` (default ./<checkpoint>-evaluation).

    With `attach` the checkpoint's report, card and pictures say what was found. `limit` is of questions in a cell.
    """

    defences: Sequence[Defence] = tuple(DEFENCES[name] for name in STANDARD)
    benchmark: str = "demo"
    split: str = "test"
    limit: int | None = None
    categories: Sequence[str] = ()
    judge: str = "prefix"
    output: Path | None = None
    attach: bool = True
    dtype: str = "auto"
    device_map: str | None = None
    batch_size: int = 32
    max_new_tokens: int = 128


@dataclass(frozen=True)
class Evidence:
    """What was found, what it means, where it lies, and the replies of other settings that were set aside."""

    results: Results
    effect: Effect
    folder: Path
    set_aside: Path | None


def gather(checkpoint: Path, options: EvaluationOptions, progress: Progress = silent) -> Evidence:
    """Evaluate `checkpoint`. Only figures and pictures are attached to it, no replies. Raises InputError."""
    report = read_report(checkpoint)
    folder = options.output or Path(f"{checkpoint.name}-evaluation")
    check_results_folder(folder)
    judge = load_judge(options.judge)  # before benchmarks are fetched
    benchmark = asked(options, report.calibration)
    replies = ReplyLog(folder, settings(checkpoint, report, benchmark, options))
    vlm = open_export(checkpoint, dtype=options.dtype, device_map=options.device_map)
    results = evaluate(
        Run(vlm, options.max_new_tokens),
        benchmark,
        options.defences,
        judge,
        replies,
        about(checkpoint, vlm, options),
        batch_size=options.batch_size,
        blank_shifts={s.layer: s.blank_shift for s in report.statistics},
        progress=progress,
    )
    pictures = plots.write_all(results, report.statistics, report.layers.chosen, projections(vlm, benchmark), folder)
    if options.attach:
        attach_results(checkpoint, report, results, pictures)
    return Evidence(results, judge_effect(results), folder, replies.set_aside)


def asked(options: EvaluationOptions, calibrated: CalibrationRecord) -> Benchmark:
    """The questions: none that the checkpoint was calibrated on. Raises InputError."""
    revision = calibrated_revision(calibrated, options.benchmark)
    whole = load_benchmark(options.benchmark, split=options.split, revision=revision)
    return of_categories(unseen(whole, calibrated), options.categories).limited(options.limit)


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


def settings(checkpoint: Path, report: Report, benchmark: Benchmark, options: EvaluationOptions) -> dict[str, object]:
    """What replies depend on: the model bit for bit, the questions, the length and the arithmetic."""
    questions = json.dumps([[q.id, q.request] for q in benchmark.questions]).encode()
    return {
        "shards": report.base_model.shards,
        "directions": sha256(checkpoint / SHARD),
        "config": sha256(checkpoint / "config.json"),
        "benchmark": benchmark.name,
        "source": benchmark.source,
        "questions": hashlib.sha256(questions).hexdigest(),
        "max_new_tokens": options.max_new_tokens,
        "dtype": options.dtype,
    }


def about(checkpoint: Path, vlm: VLM, options: EvaluationOptions) -> About:
    """What a reader of results.json needs to know beside the figures."""
    return About(
        split=options.split,
        limit_per_cell=options.limit,
        checkpoint={"name": checkpoint.name, "directions": sha256(checkpoint / SHARD)[:16]},
        device=torch.cuda.get_device_name() if vlm.device.type == "cuda" else "cpu",
        versions={"shiftdc-export": __version__, "torch": torch.__version__},
    )
