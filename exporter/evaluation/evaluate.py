"""Collect the replies of defences to a benchmark, judge them, and write down what they come to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch

from exporter.data.questions import Benchmark, Question
from exporter.errors import InputError
from exporter.evaluation.defences import DEFENCES, Answers, Defence, Run, applied
from exporter.evaluation.figures import judged, summarise
from exporter.evaluation.judges import Judge
from exporter.evaluation.replies import Reply, ReplyLog
from exporter.evaluation.results import About, Results
from exporter.evaluation.results_json import write_results
from exporter.runtime.batches import ShrinkingBatches
from exporter.runtime.progress import Progress, silent


@torch.no_grad()
def collect(
    run: Run,
    benchmark: Benchmark,
    defence: Defence,
    log: ReplyLog,
    *,
    batch_size: int = 32,
    blank_shifts: Mapping[int, float] | None = None,
    progress: Progress = silent,
) -> None:
    """Add the replies to `log` that it lacks."""
    questions = {q.id: q for q in benchmark.questions}
    missing = [questions[i] for i in log.missing(defence.name, questions)]
    done = len(questions) - len(missing)
    progress(defence.name, done, len(questions))
    shrinking = ShrinkingBatches(partial(_answers, run, defence))
    with applied(run.vlm, defence, blank_shifts):
        for batch in _batches(missing, batch_size):
            for part, answers in shrinking(batch):
                seconds = {stage: spent / len(part) for stage, spent in answers.seconds.items()}
                log.append(Reply(defence.name, q.id, text, seconds) for q, text in zip(part, answers.texts, strict=True))
                done += len(part)
                progress(defence.name, done, len(questions))


def _answers(run: Run, defence: Defence, batch: list[Question]) -> Answers:
    images = None if batch[0].image is None else [q.image.load() for q in batch if q.image is not None]
    return defence.answer(run, [q.request for q in batch], images)


def _batches(questions: Sequence[Question], size: int) -> Iterable[list[Question]]:
    """Batches of questions that all have an image, or all have none."""
    for has_image in (True, False):
        chosen = [q for q in questions if (q.image is not None) == has_image]
        for start in range(0, len(chosen), size):
            yield chosen[start : start + size]


def named_defences(names: Sequence[str]) -> list[Defence]:
    """Defences by name; `all` for every one. Raises InputError."""
    wanted = list(DEFENCES) if "all" in names else list(dict.fromkeys(names))
    if unknown := [n for n in wanted if n not in DEFENCES]:
        raise InputError(f"--defence: there is none named {unknown[0]!r}, expected all or of {', '.join(DEFENCES)}.")
    return [DEFENCES[n] for n in wanted]


def evaluate(
    run: Run,
    benchmark: Benchmark,
    defences: Sequence[Defence],
    judge: tuple[str, Judge],
    log: ReplyLog,
    about: About,
    *,
    batch_size: int = 32,
    blank_shifts: Mapping[int, float] | None = None,
    progress: Progress = silent,
) -> Results:
    """Collect the replies that are missing, judge all, and write results.json beside the log."""
    outcomes = {}
    ids = [q.id for q in benchmark.questions]
    for defence in defences:
        collect(run, benchmark, defence, log, batch_size=batch_size, blank_shifts=blank_shifts, progress=progress)
        outcomes[defence.name] = judged(benchmark.questions, log.of(defence.name, ids), judge[1])
    results = summarise(benchmark, outcomes, judge[0], about)
    write_results(log.file.parent, results)
    return results
