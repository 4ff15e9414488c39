"""Everything that `shiftdc-export MODEL` does, in order: plan, export, evaluate, ONNX graphs, push."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from exporter.checkpoint.report import OnnxRecord
from exporter.errors import InputError
from exporter.evaluation.results_json import as_document
from exporter.onnx.export import OnnxEntry, check_family, export_onnx
from exporter.onnx.interface import SUFFIXES
from exporter.pipeline.evaluate import EvaluationOptions, Evidence, gather
from exporter.pipeline.export import Export, export
from exporter.pipeline.plan import ExportOptions, Plan, make_plan
from exporter.publishing.push import Pushed, push
from exporter.publishing.push_preflight import check_base, preflight
from exporter.runtime.progress import Progress
from exporter.runtime.ranks import Ranks, joined


@dataclass(frozen=True)
class PushOptions:
    """Where an export goes on the Hub. `repo_id`: by default the export's name, under the user's account."""

    repo_id: str | None = None
    private: bool = False
    create_pr: bool = False
    allow_ineffective: bool = False


@dataclass(frozen=True)
class Request:
    """A model, how it is exported, and what is done beside that."""

    model: str
    options: ExportOptions
    evaluate: bool = False
    onnx: bool = False
    push: PushOptions | None = None
    dry_run: bool = False


class Show(Protocol):
    """What a person, or a program, is shown of a run."""

    def announce(self, line: str) -> None: ...
    def progress(self) -> AbstractContextManager[Progress]: ...
    def planned(self, plan: Plan, repo_id: str | None) -> None: ...
    def exported(self, done: Export) -> None: ...
    def evaluated(self, found: Evidence) -> None: ...
    def traced(self, checkpoint: Path, entry: OnnxEntry) -> None: ...
    def pushed(self, done: Pushed) -> None: ...


def run(request: Request, show: Show) -> Export | None:
    """Do it all, and show each result as it comes; None after a dry run, and on all ranks but the first. Raises InputError."""
    with joined() as ranks:
        plan, target = prepare(request, ranks, show)
        if request.dry_run:
            if ranks.is_main:
                show.planned(plan, None if target is None else target.repo_id)
            return None
        with show.progress() as progress:
            done = export(plan, progress, ranks)
    if done is None:  # the first process does the rest
        return None
    show.exported(done)
    added: dict[str, object] = {}
    if request.evaluate:
        added["evaluation"] = evaluate(plan, show)
    if request.onnx:
        added["onnx"] = write_onnx(plan, show)
    if target is not None:
        publish(plan, target, show)
    return replace(done, report=done.report.model_copy(update=added))


def prepare(request: Request, ranks: Ranks, show: Show) -> tuple[Plan, PushOptions | None]:
    """The plan, and where to push; whatever can stop a run stops it here, before hours of work. Raises InputError."""
    plan = ranks.gather(partial(make_plan, request.model, request.options, show.announce))[ranks.rank]
    if request.onnx:
        check_family(plan.recipe.family, plan.base.config)
    if request.push is None:
        return plan, None
    return plan, ranks.broadcast(partial(push_target, plan, request.push, measured=request.evaluate))


def push_target(plan: Plan, wanted: PushOptions, *, measured: bool) -> PushOptions:
    """With the repository's full name. Raises InputError where a push would be refused."""
    if not (measured or wanted.allow_ineffective):
        raise InputError("--push: the effect must be measured first; add --evaluate, or --allow-ineffective.")
    repo_id = preflight(wanted.repo_id or plan.output.name, private=wanted.private, revision=None, create_pr=wanted.create_pr)
    check_base(plan.base.folder, plan.base.name, plan.base.revision)
    return replace(wanted, repo_id=repo_id)


def evaluate(plan: Plan, show: Show) -> dict[str, Any]:
    """The recipe's benchmark under the standard defences, attached to the export."""
    options = EvaluationOptions(benchmark=plan.recipe.benchmark, dtype=plan.dtype, device_map=plan.device_map)
    with show.progress() as progress:
        found = gather(plan.output, options, progress)
    show.evaluated(found)
    return as_document(found.results)


def write_onnx(plan: Plan, show: Show) -> OnnxRecord:
    """ONNX graphs at every precision."""
    with show.progress() as progress:
        entry = export_onnx(plan.output, tuple(SUFFIXES), progress)
    show.traced(plan.output, entry)
    return OnnxRecord.model_validate(entry.as_json())


def publish(plan: Plan, target: PushOptions, show: Show) -> None:
    with show.progress() as progress:
        done = push(
            plan.output,
            str(target.repo_id),
            private=target.private,
            create_pr=target.create_pr,
            allow_ineffective=target.allow_ineffective,
            progress=progress,
        )
    show.pushed(done)
