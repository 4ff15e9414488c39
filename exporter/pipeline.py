"""The whole flow, from a base checkpoint to a verified export; each stage hands a value to the next."""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from exporter import __version__
from exporter.bake import REPORT, bake, check_output, family, staged
from exporter.calibration import CalibrationSet, load_calibration
from exporter.card import render_card
from exporter.directions import Directions, Progress, fit_directions, summary
from exporter.errors import InputError
from exporter.layer_choice import LayerChoice, choose_layers
from exporter.probe import PROBE, Probe, record_probe
from exporter.prompt_pieces import prompt_pieces
from exporter.recipes import Recipe, load_recipe, parse_layers, recipe_for_family
from exporter.source import DEMO, BaseCheckpoint, resolve
from exporter.verify import Verification, verify
from exporter.vlm import load_vlm

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
    chosen = load_recipe(recipe or recipe_name(base)).with_overrides(**overrides)
    if chosen.family != base.model_type:
        raise InputError(f"Recipe: it is for family {chosen.family!r}, and {base.name} is a {base.model_type!r}; choose another.")
    family(chosen.family)
    plan = Plan(
        base=base,
        recipe=chosen,
        calibration=load_calibration(chosen.calibration),
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
    check_output(plan.output, force)
    if plan.output.resolve().is_relative_to(base.folder):
        raise InputError(f"--output: {plan.output} lies in the base model's folder; give another folder.")
    return plan


def recipe_name(base: BaseCheckpoint) -> str:
    """The recipe that fits a checkpoint. Raises InputError."""
    if base.name == DEMO:
        return DEMO
    name = recipe_for_family(base.model_type)
    if name is None:
        raise InputError(
            f"MODEL: {base.name} is of family {base.model_type!r}, for which there is no recipe; "
            "see 'shiftdc-export recipes', or give --recipe FILE.yaml."
        )
    return name


@dataclass(frozen=True)
class Measurement:
    """What is needed of the loaded base model; it is released afterwards."""

    directions: Directions
    choice: LayerChoice
    pieces: dict[str, Any]
    probe: Probe


def export(plan: Plan, progress: Progress = lambda stage, done, total: None) -> Export:
    """Measure, bake, verify. Writes `plan.output` at the very end, or nothing."""
    clock = Clock(progress)
    measured = measure(plan, clock)
    with staged(plan.output, plan.force) as folder:
        shards = clock.stage("bake", lambda: bake_measured(plan, measured, folder))
        report = make_report(plan, measured, shards)
        write_report(folder, report)  # verify reads it; the parity that it finds is added
        verification = clock.stage("verify", lambda: verify(folder))
        report |= {"parity": verification.parity, "seconds": clock.seconds}
        write_report(folder, report)
        card = render_card(plan.base, plan.recipe, report, measured.directions.statistics, repo=plan.output.name)
        (folder / "README.md").write_text(card, "utf-8")
    return Export(plan, report, verification)


def measure(plan: Plan, clock: Clock) -> Measurement:
    """Everything that needs the base model in memory."""
    base, recipe = plan.base, plan.recipe
    vlm = clock.stage("load", lambda: load_vlm(base, recipe, dtype=plan.dtype, device_map=plan.device_map))
    pieces = clock.stage("prompt pieces", lambda: prompt_pieces(vlm, recipe.prompts))
    options: dict[str, Any] = {"layers": plan.layers, "batch_size": plan.batch_size, "progress": clock.progress}
    directions = clock.stage(
        "directions", lambda: fit_directions(vlm, plan.calibration, recipe.prompts, recipe.decoder_layers, **options)
    )
    choice = choose(plan, directions)
    probe = clock.stage("probe", lambda: record_probe(vlm, directions, choice.layers, recipe, pieces))
    return Measurement(directions, choice, pieces, probe)


def bake_measured(plan: Plan, measured: Measurement, folder: Path) -> dict[str, str]:
    shards = bake(plan.base, plan.recipe, measured.directions, measured.choice.layers, measured.pieces, folder)
    measured.probe.save(folder / PROBE)
    return shards


def choose(plan: Plan, directions: Directions) -> LayerChoice:
    """The layers to calibrate: those asked for, or `choose_layers`'."""
    if plan.layers is None:
        return choose_layers(directions.statistics, plan.depth)
    return LayerChoice(tuple(plan.layers), "given by the caller", {})


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
        "calibration": plan.calibration.summary(),
        "layers": {
            "chosen": list(choice.layers),
            "depth": plan.depth,
            "criterion": choice.criterion,
            "left_out": {str(k): v for k, v in choice.left_out.items()},
        },
        "statistics": summary(measured.directions),
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

    try:
        return AutoConfig.from_pretrained(base.folder, trust_remote_code=False).get_text_config().to_dict()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"MODEL: the config.json of {base.name} cannot be used: {str(error).splitlines()[0]}") from None


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
