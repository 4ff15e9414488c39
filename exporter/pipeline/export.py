"""From a base checkpoint to a verified export; each stage hands a value to the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from exporter.checkpoint.adapter import merge
from exporter.checkpoint.bake import Baked, bake
from exporter.checkpoint.layout import CARD
from exporter.checkpoint.manifest import hashes
from exporter.checkpoint.open import load_calibrated
from exporter.checkpoint.probe import PROBE
from exporter.checkpoint.staging import scratch, staged
from exporter.checkpoint.verify import Verification, verify
from exporter.directions.layer_choice import LayerChoice
from exporter.evaluation.sweep import run_sweep
from exporter.models.processors import check_same, load_processor, pin
from exporter.pipeline.fingerprint import open_store
from exporter.pipeline.measure import Measurement, measure, probe_unquantised, probed
from exporter.pipeline.plan import Plan
from exporter.pipeline.report import make_report, write_report
from exporter.publishing.card import render_card
from exporter.runtime.batches import Batches, release
from exporter.runtime.clock import Clock
from exporter.runtime.hashing import HashOf, background_hashes
from exporter.runtime.progress import Progress, silent
from exporter.runtime.ranks import Ranks


@dataclass(frozen=True)
class Export:
    """What came of a plan."""

    plan: Plan
    report: dict[str, Any]
    verification: Verification


def export(asked: Plan, progress: Progress = silent, ranks: Ranks | None = None) -> Export | None:
    """Measure, bake, verify. Writes `asked.output` at the very end, or nothing; None on all ranks but the first."""
    ranks, clock = ranks or Ranks(), Clock(progress)
    with ranks.on_main(staged(asked.output, asked.force)) as folder:  # from the start: two runs never work for one output
        store = ranks.broadcast(partial(open_store, asked))
        with merged(asked, clock, ranks) as plan, background_hashes(plan.base.shards if ranks.is_main else ()) as hash_of:
            measured, probe = measure(plan, clock, Batches(ranks, store))
            release()  # what follows loads the model again, or another process does
            if not ranks.is_main:
                return None
            if plan.recipe.strength == "auto":
                plan, measured = swept(plan, measured, clock, hash_of)
            if probe is None:
                probe = probe_unquantised(plan, measured, clock)
                release()
            with clock.stage("bake"):
                baked = bake_measured(plan, measured, folder, hash_of)
            probe.save(folder / PROBE)
            report = describe(plan, measured, baked, folder, store.found)
            with clock.stage("verify"):
                verification = verify(folder, plan.device_map, plan.output)
            report |= {"parity": verification.parity, "seconds": clock.seconds}
            write_report(folder, report)
    store.clear()
    return Export(replace(plan, base=asked.base), report, verification)


def describe(plan: Plan, measured: Measurement, baked: Baked, folder: Path, resumed: int) -> dict[str, Any]:
    """Write the card, and the report as `verify` reads it; returns the report."""
    report = make_report(plan, measured, baked) | {"resumed_batches": resumed}
    card = render_card(plan.base, plan.recipe, report, measured.directions.statistics, repo=plan.output.name)
    (folder / CARD).write_text(card, "utf-8")
    report["files"] = hashes(folder, known=baked.hashes)
    write_report(folder, report)
    return report


@contextmanager
def merged(asked: Plan, clock: Clock, ranks: Ranks) -> Iterator[Plan]:
    """The plan on the base with its adapter merged, in a folder beside the output that is gone afterwards."""
    if asked.adapter is None or asked.keep_adapter:
        yield asked
        return
    with ranks.on_main(scratch(asked.output, "merged")) as folder:
        with clock.stage("merge adapter"):
            base = ranks.broadcast(partial(merge, asked.base, asked.adapter, folder))
        yield replace(asked, base=base)


def swept(plan: Plan, measured: Measurement, clock: Clock, hash_of: HashOf | None) -> tuple[Plan, Measurement]:
    """The plan with the strength, and the measurement with the layers, that a sweep on held-out rows chose."""
    held_out = plan.calibration.select("held_out")
    with scratch(plan.output, "sweep") as folder:
        bake_measured(plan, measured, folder, hash_of, for_a_while=True)
        vlm = load_calibrated(folder, plan.recipe, dtype=plan.dtype, device_map=plan.device_map)
        with clock.stage("sweep"):
            found = run_sweep(vlm, held_out, plan.layers is None, clock.progress)
    chosen = found.chosen.candidate
    left_out = {layer: "left out by the sweep" for layer in measured.choice.layers if layer not in chosen.layers}
    choice = LayerChoice(
        chosen.layers, f"{measured.choice.criterion}; of these by a sweep on held-out rows", measured.choice.left_out | left_out
    )
    recipe = plan.recipe.with_overrides(strength=chosen.strength)
    return replace(plan, recipe=recipe), replace(measured, choice=choice, sweep=found)


def bake_measured(plan: Plan, measured: Measurement, folder: Path, hash_of: HashOf | None, for_a_while: bool = False) -> Baked:
    adapter = plan.adapter.folder if plan.adapter is not None and plan.keep_adapter else None
    directions, layers, recipe, frame = probed(plan, measured)
    written = bake(plan.base, recipe, directions, layers, frame, folder, adapter, hash_of, for_a_while)
    processor = load_processor(plan.base.folder, plan.recipe)
    pin(processor, folder)
    check_same(processor, folder, plan.recipe)
    return written
