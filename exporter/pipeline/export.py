"""The whole flow, from a base checkpoint to a verified export; each stage hands a value to the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from exporter.checkpoint.adapter import merge
from exporter.checkpoint.bake import Baked, bake
from exporter.checkpoint.layout import CARD
from exporter.checkpoint.manifest import hashes
from exporter.checkpoint.open import load_calibrated
from exporter.checkpoint.probe import PROBE
from exporter.checkpoint.report import Report, write_report
from exporter.checkpoint.staging import scratch, staged
from exporter.checkpoint.verify import Verification, verify
from exporter.directions.layer_choice import LayerChoice
from exporter.evaluation.sweep import run_sweep
from exporter.models.processors import check_same, load_processor, pin
from exporter.pipeline.fingerprint import fingerprint
from exporter.pipeline.measure import Measurement, calibrated, measure, probe_unquantised
from exporter.pipeline.plan import Plan
from exporter.pipeline.report import make_report
from exporter.publishing.card import render_card
from exporter.runtime.batches import Batches, release
from exporter.runtime.clock import Clock
from exporter.runtime.hashing import HashOf, background_hashes
from exporter.runtime.progress import Progress, silent
from exporter.runtime.ranks import Ranks
from exporter.runtime.store import Store


@dataclass(frozen=True)
class Export:
    """What came of a plan."""

    plan: Plan
    report: Report
    verification: Verification


def export(plan: Plan, progress: Progress = silent, ranks: Ranks | None = None) -> Export | None:
    """Measure, bake, verify. Writes `plan.output` at the very end, or nothing; None on all ranks but the first."""
    ranks = ranks or Ranks()
    clock = Clock(progress)
    base = plan.base
    with ExitStack() as stack:
        # from the start, so that two runs never work for one output
        folder = ranks.share(lambda: stack.enter_context(staged(plan.output, plan.force)))
        store = ranks.share(lambda: Store.open(fingerprint(plan)))
        plan = stack.enter_context(adapted(plan, clock, ranks))
        hash_of = stack.enter_context(background_hashes(plan.base.shards)) if ranks.leads else None
        measured, probe = measure(plan, clock, Batches(ranks, store))
        release()  # what follows loads the model again, or another process does
        if not ranks.leads:
            return None
        if plan.recipe.strength == "auto":
            plan, measured = swept(plan, measured, clock, hash_of)
        if probe is None:
            probe = probe_unquantised(plan, measured, clock)
            release()
        baked = clock.stage("bake", lambda: bake_measured(plan, measured, folder, hash_of))
        probe.save(folder / PROBE)
        report = make_report(plan, measured, baked, store.found)
        card = render_card(plan.base, plan.recipe, report, measured.directions.statistics, repo=plan.output.name)
        (folder / CARD).write_text(card, "utf-8")
        report = report.model_copy(update={"files": hashes(folder, known=baked.hashes)})
        write_report(folder, report)  # verify reads it; the parity that it finds is added
        verification = clock.stage("verify", lambda: verify(folder, plan.device_map, plan.output))
        report = report.model_copy(update={"parity": verification.parity, "seconds": clock.seconds})
        write_report(folder, report)
    store.clear()
    return Export(replace(plan, base=base), report, verification)


@contextmanager
def adapted(plan: Plan, clock: Clock, ranks: Ranks) -> Iterator[Plan]:
    """The plan on the base with its adapter merged, in a folder beside the output that is gone afterwards."""
    adapter = plan.adapter
    if adapter is None or plan.keep_adapter:
        yield plan
        return
    with scratch(plan.output, "merged") if ranks.leads else nullcontext(Path()) as folder:
        yield replace(plan, base=clock.stage("merge adapter", lambda: ranks.share(lambda: merge(plan.base, adapter, folder))))


def swept(plan: Plan, measured: Measurement, clock: Clock, hash_of: HashOf | None) -> tuple[Plan, Measurement]:
    """The plan with the strength, and the measurement with the layers, that a sweep on held-out rows chose."""
    held_out = plan.calibration.select("held_out")
    with scratch(plan.output, "sweep") as folder:
        bake_measured(plan, measured, folder, hash_of, temporary=True)
        vlm = load_calibrated(folder, plan.recipe, dtype=plan.dtype, device_map=plan.device_map)
        found = clock.stage("sweep", lambda: run_sweep(vlm, held_out, plan.layers is None, clock.progress))
    chosen = found.chosen.candidate
    left_out = {layer: "left out by the sweep" for layer in measured.choice.layers if layer not in chosen.layers}
    choice = LayerChoice(
        chosen.layers, f"{measured.choice.criterion}; of these by a sweep on held-out rows", measured.choice.left_out | left_out
    )
    recipe = plan.recipe.with_overrides(strength=chosen.strength)
    return replace(plan, recipe=recipe), replace(measured, choice=choice, sweep=found)


def bake_measured(plan: Plan, measured: Measurement, folder: Path, hash_of: HashOf | None, temporary: bool = False) -> Baked:
    adapter = plan.adapter.folder if plan.adapter is not None and plan.keep_adapter else None
    written = bake(plan.base, calibrated(plan, measured), folder, adapter=adapter, hash_of=hash_of, temporary=temporary)
    processor = load_processor(plan.base.folder, plan.recipe)
    pin(processor, folder)
    check_same(processor, folder, plan.recipe)
    return written
