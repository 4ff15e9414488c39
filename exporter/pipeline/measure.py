"""Measure the base model: directions, layers and the probe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from exporter.checkpoint.calibrated import Calibrated
from exporter.checkpoint.probe import Probe, record_probe
from exporter.checkpoint.staging import scratch
from exporter.data.calibration import CalibrationSet
from exporter.directions.captions import captioned
from exporter.directions.directions import Directions
from exporter.directions.fit import fit_directions
from exporter.directions.layer_choice import LayerChoice, choose_layers
from exporter.evaluation.sweep import Sweep
from exporter.modeling.configuration_shiftdc import ShiftDCTraits
from exporter.models.loading import load_vlm
from exporter.models.trials import tried_traits
from exporter.models.vlm import VLM
from exporter.pipeline.plan import Plan
from exporter.runtime.batches import Batches
from exporter.runtime.clock import Clock


@dataclass(frozen=True)
class Measurement:
    """What was measured of the base model, which is released afterwards."""

    directions: Directions
    choice: LayerChoice
    traits: ShiftDCTraits
    notices: tuple[str, ...] = ()
    sweep: Sweep | None = None


@contextmanager
def load_base(plan: Plan, quantised: int | None = None, traits: ShiftDCTraits | None = None) -> Iterator[VLM]:
    """The base model, with what is offloaded to disk in a folder that is gone afterwards; traits: None tries the model."""
    adapter = plan.adapter.folder if plan.adapter is not None and plan.keep_adapter else None
    with ExitStack() as stack:
        offload = None if plan.device_map is None else stack.enter_context(scratch(plan.output, "offload"))
        vlm = load_vlm(
            plan.base,
            plan.recipe,
            dtype=plan.dtype,
            device_map=plan.device_map,
            offload=offload,
            quantised=quantised,
            adapter=adapter,
        )
        yield replace(vlm.framed(plan.checked.frame), tried=traits or tried_traits(vlm))


def measure(plan: Plan, clock: Clock, runner: Batches) -> tuple[Measurement, Probe | None]:
    """Directions and layers; the probe too, unless it must be recorded of another model than the one loaded here."""
    recipe = plan.recipe
    with ExitStack() as stack:
        with clock.stage("load"):
            vlm = stack.enter_context(load_base(plan, plan.quantised))
        calibration = with_captions(plan, vlm, clock, runner)
        with clock.stage("directions"):
            directions = fit_directions(
                vlm,
                calibration,
                recipe.prompts,
                layers=plan.layers,
                batch_size=plan.batch_size,
                runner=runner,
                progress=clock.progress,
            )
        measured = Measurement(directions, choose(plan, directions), vlm.traits, vlm.notices)
        if plan.quantised is not None or recipe.strength == "auto" or not runner.ranks.is_main:
            return measured, None
        with clock.stage("probe"):
            return measured, record_probe(vlm, calibrated(plan, measured))


def with_captions(plan: Plan, vlm: VLM, clock: Clock, runner: Batches) -> CalibrationSet:
    """The calibration set; captions that it lacks are the model's own."""
    if not plan.calibration.uncaptioned:
        return plan.calibration
    recipe = plan.recipe
    with clock.stage("captions"):
        return captioned(vlm, plan.calibration, recipe.wording, recipe.caption_tokens, plan.batch_size, clock.progress, runner)


def probe_unquantised(plan: Plan, measured: Measurement, clock: Clock) -> Probe:
    """The probe of the weights that are exported, with the settings that a sweep may have changed."""
    with clock.stage("probe"), load_base(plan, traits=measured.traits) as vlm:
        return record_probe(vlm, calibrated(plan, measured))


def calibrated(plan: Plan, measured: Measurement) -> Calibrated:
    """What is baked and probed."""
    return Calibrated(plan.recipe, measured.directions, measured.choice.layers, plan.checked.frame, measured.traits)


def choose(plan: Plan, directions: Directions) -> LayerChoice:
    """The layers to calibrate: those asked for, or `choose_layers`'."""
    if plan.layers is None:
        return choose_layers(directions.statistics, plan.depth)
    left_out = {i: "prompts without an image skip it" for i in plan.layers if i not in directions.layers}
    return LayerChoice(directions.layers, "given by the caller", left_out)
