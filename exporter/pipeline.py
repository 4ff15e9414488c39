"""The whole flow, from a base checkpoint to a verified export; each stage hands a value to the next."""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from exporter import __version__
from exporter.bake import REPORT, bake
from exporter.calibration import CalibrationSet, load_calibration
from exporter.captions import captioned
from exporter.card import render_card
from exporter.directions import Directions, Progress, fit_directions, summary
from exporter.errors import InputError, refusing
from exporter.exported import load_calibrated
from exporter.families import family
from exporter.family_table import REFUSED
from exporter.layer_choice import LayerChoice, choose_layers
from exporter.manifest import CARD, hashes
from exporter.probe import PROBE, Probe, record_probe
from exporter.prompt_pieces import prompt_pieces
from exporter.recipes import Recipe, load_recipe, parse_layers, recipe_for_family
from exporter.source import DEMO, BaseCheckpoint, resolve
from exporter.staging import check_output, scratch, staged
from exporter.sweep import Sweep, run_sweep
from exporter.verify import Verification, verify
from exporter.vlm import VLM, load_vlm

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """Everything that an export will do, checked, before anything is loaded or written."""

    base: BaseCheckpoint
    recipe: Recipe
    calibration: CalibrationSet
    output: Path
    force: bool
    dtype: str
    device_map: str | None
    batch_size: int | None

    @property
    def depth(self) -> int:
        return int(text_config(self.base)["num_hidden_layers"])

    @property
    def layers(self) -> range | None:
        """The layers asked for; None for auto."""
        return None if self.recipe.layers == "auto" else parse_layers(self.recipe.layers)


@dataclass(frozen=True)
class Export:
    """What came of a plan."""

    plan: Plan
    report: dict[str, Any]
    verification: Verification


def make_plan(
    model: str,
    *,
    output: Path | None = None,
    recipe: str | None = None,
    revision: str | None = None,
    force: bool = False,
    dtype: str = "auto",
    device_map: str | None = None,
    batch_size: int | None = None,
    **overrides: object,
) -> Plan:
    """Resolve and check all input. Raises InputError; loads and writes nothing."""
    base = resolve(model, revision)
    default = load_recipe(recipe or recipe_name(base))
    chosen = default.with_overrides(**overrides)
    if chosen.family != base.model_type:
        raise InputError(f"Recipe: it is for family {chosen.family!r}, and {base.name} is a {base.model_type!r}; choose another.")
    check_supported(base, chosen)
    plan = Plan(
        base=base,
        recipe=chosen,
        calibration=load_calibration(chosen.calibration, default.calibration),
        output=output or Path(f"{base.short_name}-shiftdc"),
        force=force,
        dtype=dtype,
        device_map=device_map,
        batch_size=batch_size,
    )
    if plan.layers is not None and plan.layers[-1] >= plan.depth:
        raise InputError(
            f"--layers: {chosen.layers} ends at {plan.layers[-1]}, and {base.name} has decoder layers 0 to {plan.depth - 1}; "
            "both ends are included."
        )
    if chosen.strength == "auto" and not plan.calibration.select("held_out", "unsafe"):
        raise InputError("--strength auto: it needs held-out unsafe rows, and the calibration set has none; give --strength X.")
    check_output(plan.output, force)
    if plan.output.resolve().is_relative_to(base.folder):
        raise InputError(f"--output: {plan.output} lies in the base model's folder; give another folder.")
    return plan


def check_supported(base: BaseCheckpoint, recipe: Recipe) -> None:
    """Raise InputError where the family, or this checkpoint of it, cannot be calibrated."""
    if not base.has_chat_template and recipe.chat_template is None:
        raise InputError(
            f"MODEL: {base.name} has no chat template (looked for chat_template.jinja, chat_template.json and "
            "tokenizer_config.json); the method compares prompts as the model was trained to see them, so add one to the "
            "checkpoint."
        )
    with refusing(f"MODEL: the config.json of {base.name} cannot be used", "restore it"):
        reason = family(recipe.family).config.shiftdc_unsupported(base.config)
    if reason is not None:
        raise InputError(f"MODEL: {base.name} cannot be calibrated: {reason}.")


def recipe_name(base: BaseCheckpoint) -> str:
    """The recipe that fits a checkpoint. Raises InputError."""
    if base.name == DEMO:
        return DEMO
    if (reason := REFUSED.get(base.model_type)) is not None:
        raise InputError(f"MODEL: {base.name} cannot be calibrated: {reason}.")
    name = recipe_for_family(base.model_type)
    if name is None:
        raise InputError(
            f"MODEL: {base.name} is of family {base.model_type!r}, for which there is no recipe; "
            "'shiftdc-export recipes' lists the families supported."
        )
    return name


@dataclass(frozen=True)
class Measurement:
    """What was measured of the base model, which is released afterwards."""

    directions: Directions
    choice: LayerChoice
    pieces: dict[str, Any]
    sweep: Sweep | None = None


def export(plan: Plan, progress: Progress = lambda stage, done, total: None) -> Export:
    """Measure, bake, verify. Writes `plan.output` at the very end, or nothing."""
    clock = Clock(progress)
    with staged(plan.output, plan.force) as folder:  # from the start, so that two runs never work for one output
        if plan.recipe.strength == "auto":
            plan, measured = swept(plan, measure(plan, clock)[0], clock)
            probe = clock.stage("probe", lambda: record_probe(load(plan), *probed(plan, measured)))
        else:
            measured, probe = measure(plan, clock)
        shards = clock.stage("bake", lambda: bake_measured(plan, measured, folder))
        probe.save(folder / PROBE)
        report = make_report(plan, measured, shards)
        card = render_card(plan.base, plan.recipe, report, measured.directions.statistics, repo=plan.output.name)
        (folder / CARD).write_text(card, "utf-8")
        report["files"] = hashes(folder, known=shards)
        write_report(folder, report)  # verify reads it; the parity that it finds is added
        verification = clock.stage("verify", lambda: verify(folder))
        report |= {"parity": verification.parity, "seconds": clock.seconds}
        write_report(folder, report)
    return Export(plan, report, verification)


def load(plan: Plan) -> VLM:
    return load_vlm(plan.base, plan.recipe, dtype=plan.dtype, device_map=plan.device_map)


def measure(plan: Plan, clock: Clock) -> tuple[Measurement, Probe]:
    """Everything that needs the base model in memory."""
    recipe = plan.recipe
    vlm = clock.stage("load", lambda: load(plan))
    with refusing(f"MODEL: prompts of {plan.base.name} cannot be composed", "restore its chat template and tokenizer"):
        pieces = clock.stage("prompt pieces", lambda: prompt_pieces(vlm, recipe.prompts))
    calibration = plan.calibration
    if calibration.uncaptioned:
        write = (vlm, calibration, recipe.prompts, recipe.caption_max_new_tokens, plan.batch_size, clock.progress)
        calibration = clock.stage("captions", lambda: captioned(*write))
    options: dict[str, Any] = {"layers": plan.layers, "batch_size": plan.batch_size, "progress": clock.progress}
    directions = clock.stage(
        "directions", lambda: fit_directions(vlm, calibration, recipe.prompts, recipe.decoder_layers, **options)
    )
    measured = Measurement(directions, choose(plan, directions), pieces)
    return measured, clock.stage("probe", lambda: record_probe(vlm, *probed(plan, measured)))


def probed(plan: Plan, measured: Measurement) -> tuple[Directions, tuple[int, ...], Recipe, dict[str, Any]]:
    """What `record_probe` takes beside the model."""
    return measured.directions, measured.choice.layers, plan.recipe, measured.pieces


def swept(plan: Plan, measured: Measurement, clock: Clock) -> tuple[Plan, Measurement]:
    """The plan with the strength, and the measurement with the layers, that a sweep on held-out rows chose."""
    held_out = plan.calibration.select("held_out")
    with scratch(plan.output, "sweep") as folder:
        bake_measured(plan, measured, folder)
        vlm = load_calibrated(folder, plan.recipe, dtype=plan.dtype, device_map=plan.device_map)
        found = clock.stage("sweep", lambda: run_sweep(vlm, held_out, plan.layers is None, clock.progress))
    chosen = found.chosen.candidate
    left_out = {layer: "left out by the sweep" for layer in measured.choice.layers if layer not in chosen.layers}
    choice = LayerChoice(
        chosen.layers, f"{measured.choice.criterion}; of these by a sweep on held-out rows", measured.choice.left_out | left_out
    )
    recipe = plan.recipe.with_overrides(strength=chosen.strength)
    return replace(plan, recipe=recipe), replace(measured, choice=choice, sweep=found)


def bake_measured(plan: Plan, measured: Measurement, folder: Path) -> dict[str, str]:
    return bake(plan.base, plan.recipe, measured.directions, measured.choice.layers, measured.pieces, folder)


def choose(plan: Plan, directions: Directions) -> LayerChoice:
    """The layers to calibrate: those asked for, or `choose_layers`'."""
    if plan.layers is None:
        return choose_layers(directions.statistics, plan.depth)
    left_out = {i: "prompts without an image skip it" for i in plan.layers if i not in directions.layers}
    return LayerChoice(directions.layers, "given by the caller", left_out)


def make_report(plan: Plan, measured: Measurement, shards: dict[str, str]) -> dict[str, Any]:
    """shiftdc_report.json: everything but texts."""
    base, choice = plan.base, measured.choice
    return {
        "base_model": {
            "id": base.name,
            "revision": base.revision,
            "architecture": family(plan.recipe.family).stock_class,
            "shards": shards,
        },
        "recipe": plan.recipe.model_dump(),
        "calibration": plan.calibration.record(),
        "directions": measured.directions.origin,
        "layers": {
            "chosen": list(choice.layers),
            "depth": plan.depth,
            "criterion": choice.criterion,
            "left_out": {str(k): v for k, v in choice.left_out.items()},
        },
        "statistics": summary(measured.directions),
        **({} if measured.sweep is None else {"sweep": measured.sweep.report()}),
        "versions": {
            "shiftdc-export": __version__,
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")},
        },
        "device": str(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"),
        "dtype": plan.dtype,
    }


def write_report(folder: Path, report: dict[str, Any]) -> None:
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def text_config(base: BaseCheckpoint) -> dict[str, Any]:
    """The language model's part of config.json, with the class's defaults filled in."""
    from transformers import AutoConfig

    with refusing(f"MODEL: the config.json of {base.name} cannot be used", "restore it"):
        config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False).get_text_config().to_dict()
        if config["num_hidden_layers"] < 1:
            raise ValueError(f"num_hidden_layers is {config['num_hidden_layers']}")
        return config


class Clock:
    """Runs stages and keeps how long each took."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self.progress = progress

    def stage(self, name: str, run: Callable[[], T]) -> T:
        start = time.perf_counter()
        self.progress(name, 0, 1)
        result = run()
        self.progress(name, 1, 1)
        self.seconds[name] = round(time.perf_counter() - start, 3)
        return result
