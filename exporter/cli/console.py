"""What a person reads of each result: lines of text and tables. `cli.py` prints them."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from exporter.errors import printable

if TYPE_CHECKING:  # none of these is needed to print the help
    from exporter.checkpoint.verify import Verification
    from exporter.evaluation.comparison import Comparison
    from exporter.evaluation.results import Rate, Results
    from exporter.models.base import SmallFiles
    from exporter.models.check import Check
    from exporter.models.footprint import Footprint
    from exporter.models.recipe import Recipe
    from exporter.onnx.export import OnnxEntry
    from exporter.pipeline.export import Export
    from exporter.pipeline.plan import Plan
    from exporter.publishing.push import Pushed, PushPlan


def plan_document(plan: Plan, needed: Footprint, repo_id: str | None) -> dict[str, Any]:
    """What an export is going to do."""
    return {
        "model": plan.base.name,
        "revision": plan.base.revision,
        "family": plan.recipe.family,
        "output": str(plan.output),
        "layers": plan.recipe.layers,
        "decoder layers": plan.depth,
        "reference": plan.recipe.reference,
        "rule": plan.recipe.rule,
        "gate": plan.recipe.gate,
        "strength": plan.recipe.strength,
        "prompts": str(plan.checked.prompts),
        "calibration": plan.calibration.summary(),
        "weights": f"{plan.base.size / 1e9:.2f} GB in {len(plan.base.shards)} safetensors files",
        "adapter": None if plan.adapter is None else plan.adapter.record(plan.keep_adapter).model_dump(),
        "peak memory": needed.report(),
        "disk": needed.disk,
        "uploads": repo_id or "none",
    }


def check_document(files: SmallFiles, recipe: Recipe, found: Check) -> dict[str, Any]:
    """What can be told of a checkpoint from its small files."""
    return {
        "model": files.name,
        "revision": files.revision,
        "family": recipe.family,
        "decoder layers": f"{found.traits.decoder_layers}.0 to .{found.depth - 1}",
        "prompts": str(found.prompts),
        "differences": [dataclasses.asdict(d) for d in found.prompts.differences],
        "weights": {"files": len(files.weights), "bytes": sum(files.weights.values())},
        "notes": list(recipe.notes),
    }


def check_text(document: dict[str, Any]) -> str:
    weights = document["weights"]
    facts = {
        **{key: document[key] for key in ("model", "revision", "family", "decoder layers", "prompts")},
        "weights": f"{weights['bytes'] / 1e9:.2f} GB in {weights['files']} files",
    }
    notes = [f"note: {note}" for note in document["notes"]]
    return "\n".join([*(f"{key + ':':16}{printable(str(value))}" for key, value in facts.items() if value is not None), *notes])


def plan_text(plan: Plan, needed: Footprint, repo_id: str | None) -> str:
    facts = {**plan_document(plan, needed, repo_id), "peak memory": needed, "disk": needed.disk_text()}
    if (adapter := facts["adapter"]) is not None:
        facts["adapter"] = f"{adapter['id']}, {'merged' if adapter['merged'] else 'kept apart'}"
    return "\n".join(f"{key + ':':16}{printable(str(value))}" for key, value in facts.items())


def export_text(done: Export) -> str:
    """What was done, and what to do next."""
    layers, output = done.report.layers, str(done.plan.output)
    lines = [f"  layers {_ranges(layers.chosen)} of {layers.depth} ({layers.criterion})"]
    if (adapter := done.report.adapter) is not None:
        lines.append(f"  adapter {adapter.id}: {'merged' if adapter.merged else 'kept apart, needs PEFT to load'}")
    lines += [f"  weights {_placed(way, size)}" for way, size in done.report.base_model.placed.items()]
    lines.append(f"  verified in a fresh process: {done.verification.tensors} base tensors bitwise equal, probe reproduced")
    lines += [f"  transformers says of the base: {printable(line)}" for line in done.report.warnings]
    if done.report.resumed_batches:
        lines.append(f"  went on from an interrupted run: {done.report.resumed_batches} batches were there already")
    lines += [
        "Next:",
        f"  shiftdc-export generate {shlex.quote(printable(output))} --image FILE --prompt TEXT",
        f"  AutoModelForImageTextToText.from_pretrained({output!r}, trust_remote_code=True)",
    ]
    return "\n".join(lines)


def _placed(way: str, size: int) -> str:
    """What was done so that writing into the export leaves the base alone, and what it cost."""
    amount = f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
    return {
        "clone": f"cloned by the file system: {amount} that take no room until they are changed",
        "link": f"linked to the Hub cache: {amount} that take no room, read-only there and here",
        "copy": f"copied: {amount} of new files",
    }[way]


def _ranges(layers: Sequence[int]) -> str:
    contiguous = list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}-{layers[-1]}" if contiguous and len(layers) > 1 else ", ".join(map(str, layers))


def verification_text(checkpoint: Path, found: Verification) -> str:
    edited = [f"Edited since, which its owner may: {', '.join(found.edited)}."] if found.edited else []
    lines = [
        f"{printable(str(checkpoint))}: {found.tensors} base tensors in {found.shards} shards are bitwise the base model's.",
        *edited,
        "It loads with transformers alone, refuses to load uncalibrated, and reproduces its probe (relative differences):",
        *(f"  {name}: {difference}" for name, difference in found.parity.items()),
    ]
    return "\n".join(lines)


def push_plan_text(plan: PushPlan) -> str:
    files = (f"  {file.how:7} {file.bytes:>14,} {file.path}" for file in plan.files)
    return "\n".join([f"to {plan.repo_id}{' (private)' if plan.private else ''}:", *files])


def pushed_text(done: Pushed) -> str:
    return (
        f"{done.url} at {done.commit[:12]}: every file compared with the local one.\n"
        f"  {len(done.copied)} files copied on the server, {len(done.sent)} sent ({done.sent_bytes / 1e6:.1f} MB)"
    )


def onnx_table(folder: Path, entry: OnnxEntry) -> Table:
    table = Table("precision", "size", "largest logit difference", "same tokens", title=f"{folder}, against PyTorch in float32")
    for precision, found in entry.variants.items():
        size = sum(found.bytes.values()) / 1e6
        difference = max(found.parity.max_logit_difference.values())
        table.add_row(precision, f"{size:.1f} MB", f"{difference:.2g}", f"{found.parity.token_agreement:.1%}")
    return table


def shift_table(result: Comparison) -> Table:
    table = Table("layer", "x.d before", "reference", "x.d after", title="coordinate along the safety direction")
    for shift in result.layers:
        reference = "-" if shift.reference is None else f"{shift.reference:.3f}"
        table.add_row(str(shift.layer), f"{shift.before:.3f}", reference, f"{shift.after:.3f}")
    return table


def defence_table(results: Results) -> Table:
    """The headline figures, a row per defence."""
    table = Table(title=f"{results.benchmark}, in per cent")
    table.add_column("", no_wrap=True)
    for title in ("attack success", "over-refusal", "utility", "cost"):
        table.add_column(title)
    for name, found in results.defences.items():
        cost = "-" if found.cost_ratio is None else f"{found.cost_ratio:.2f} x"
        table.add_row(name, *map(_percent, (found.asr, found.over_refusal, found.utility)), cost)
    return table


def cell_table(results: Results) -> Table:
    """A column per cell, a row per defence."""
    cells = sorted({cell for found in results.defences.values() for cell in found.by_cell})
    table = Table(title="Share that failed by cell, in per cent")
    table.add_column("", no_wrap=True)
    for cell in cells:
        table.add_column(cell.replace("_", " "))
    for name, found in results.defences.items():
        table.add_row(name, *(_percent(found.cell(cell).failed) for cell in cells))
    return table


def results_legend(results: Results) -> str:
    from exporter.evaluation.judges import meaning

    judge = str(results.judge)
    return (
        "Failed: a harmful request was not refused (attack success), or a benign one was (over-refusal).\n"
        f"Judge of attacks: {judge} ({meaning(judge)}). In brackets: Wilson 95 % intervals."
    )


def _percent(rate: Rate) -> str:
    if rate.value is None or rate.ci95 is None:
        return "-"
    low, high = rate.ci95
    return f"{100 * rate.value:.1f} [{100 * low:.0f}-{100 * high:.0f}]"
