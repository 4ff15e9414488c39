"""Measure the base model: directions, layers and the probe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from exporter.checkpoint.calibrated import Calibrated
from exporter.checkpoint.probe import Probe, record_probe
from exporter.checkpoint.staging import scratch
from exporter.directions.captions import captioned
from exporter.directions.directions import Directions
from exporter.directions.fit import fit_directions
from exporter.directions.layer_choice import LayerChoice, choose_layers
from exporter.evaluation.sweep import Sweep
from exporter.models.loading import load_vlm
from exporter.models.vlm import VLM
from exporter.pipeline.plan import Plan
from exporter.runtime.batches import Batches
from exporter.runtime.clock import Clock


@dataclass(frozen=True)
class Measurement:
    """What was measured of the base model, which is released afterwards."""

    directions: Directions
    choice: LayerChoice
    notices: tuple[str, ...] = ()
    sweep: Sweep | None = None


@contextmanager
def loaded(plan: Plan, quantised: int | None = None) -> Iterator[VLM]:
    """The base model, with what is offloaded to disk in a folder that is gone afterwards."""
    adapter = plan.adapter.folder if plan.adapter is not None and plan.keep_adapter else None
    options: dict[str, Any] = {"dtype": plan.dtype, "quantised": quantised, "adapter": adapter}
    if plan.device_map is None:
        yield load_vlm(plan.base, plan.recipe, **options)
        return
    with scratch(plan.output, "offload") as folder:
        yield load_vlm(plan.base, plan.recipe, device_map=plan.device_map, offload=folder, **options)


def measure(plan: Plan, clock: Clock, runner: Batches) -> tuple[Measurement, Probe | None]:
    """Directions and layers; the probe too, unless it must be recorded of another model than the one loaded here."""
    recipe = plan.recipe
    with ExitStack() as stack:
        vlm = clock.stage("load", lambda: stack.enter_context(loaded(plan, plan.quantised)))
        vlm = vlm.framed(plan.checked.frame)
        calibration = plan.calibration
        if calibration.uncaptioned:
            write = (vlm, calibration, recipe.wording, recipe.caption_tokens, plan.batch_size, clock.progress, runner)
            calibration = clock.stage("captions", lambda: captioned(*write))
        options: dict[str, Any] = {
            "layers": plan.layers, "batch_size": plan.batch_size, "runner": runner, "progress": clock.progress,
        }  # fmt: skip
        directions = clock.stage(
            "directions", lambda: fit_directions(vlm, calibration, recipe.prompts, recipe.decoder_layers, **options)
        )
        measured = Measurement(directions, choose(plan, directions), vlm.notices)
        if plan.quantised is not None or recipe.strength == "auto" or not runner.ranks.leads:
            return measured, None
        return measured, clock.stage("probe", lambda: record_probe(vlm, calibrated(plan, measured)))


def probe_unquantised(plan: Plan, measured: Measurement, clock: Clock) -> Probe:
    """The probe of the weights that are exported, with the settings that a sweep may have changed."""

    def record() -> Probe:
        with loaded(plan) as vlm:
            return record_probe(vlm.framed(plan.checked.frame), calibrated(plan, measured))

    return clock.stage("probe", record)


def calibrated(plan: Plan, measured: Measurement) -> Calibrated:
    """What is baked and probed."""
    return Calibrated(plan.recipe, measured.directions, measured.choice.layers, plan.checked.frame)


def choose(plan: Plan, directions: Directions) -> LayerChoice:
    """The layers to calibrate: those asked for, or `choose_layers`'."""
    if plan.layers is None:
        return choose_layers(directions.statistics, plan.depth)
    left_out = {i: "prompts without an image skip it" for i in plan.layers if i not in directions.layers}
    return LayerChoice(directions.layers, "given by the caller", left_out)
