"""The whole flow, from a base checkpoint to a verified export; each stage hands a value to the next."""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from exporter import __version__
from exporter.activations import AUTO_TOKENS
from exporter.adapter import Adapter, changed_shards, merge, resolve_adapter
from exporter.bake import REPORT, Baked, HashOf, bake, hashed_aside
from exporter.batches import Batches, release
from exporter.calibration import CalibrationSet, load_calibration
from exporter.captions import captioned
from exporter.card import render_card
from exporter.check import Check, check, recipe_of
from exporter.directions import BLANK_IMAGES, Directions, fit_directions, image_rows, summary
from exporter.errors import InputError, refusing
from exporter.exported import load_calibrated
from exporter.families import family
from exporter.layer_choice import LayerChoice, choose_layers
from exporter.manifest import CARD, hashes
from exporter.modeling.prompts_shiftdc import PromptFrame
from exporter.needs import Needs, needs
from exporter.placing import will_be_linked
from exporter.probe import PROBE, Probe, record_probe
from exporter.processors import check_same, load_processor, pin
from exporter.progress import Progress, silent
from exporter.ranks import Ranks, launched
from exporter.recipes import Recipe, parse_layers
from exporter.resume import Store, base_identity, calibration_identity, code_identity
from exporter.source import (
    Announce,
    BaseCheckpoint,
    BaseFiles,
    check_path,
    resolve_small,
    resolve_weights,
    unannounced,
)
from exporter.staging import check_output, scratch, staged
from exporter.sweep import Sweep, run_sweep
from exporter.verify import Verification, verify
from exporter.vlm import VLM, check_quantisation, check_widths, load_vlm

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """Everything that an export will do, checked, before anything is loaded or written."""

    base: BaseCheckpoint
    recipe: Recipe
    checked: Check
    calibration: CalibrationSet
    output: Path
    force: bool
    dtype: str
    device_map: str | None
    batch_size: int | None
    adapter: Adapter | None = None
    keep_adapter: bool = False
    quantised: int | None = None

    @property
    def depth(self) -> int:
        return int(text_config(self.base)["num_hidden_layers"])

    @property
    def layers(self) -> range | None:
        return parsed_layers(self.recipe)


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
    adapter: str | None = None,
    keep_adapter: bool = False,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    allow_inexact_prompts: bool = False,
    announce: Announce = unannounced,
    **overrides: object,
) -> Plan:
    """Resolve and check all input. Raises InputError; loads no weights and writes nothing.

    What small files can tell comes first: weights on the Hub are fetched last, and `announce` is told their size before.
    """
    if output is not None:
        check_output(output, force)  # before anything is fetched
    files = resolve_small(model, revision)
    quantised = _quantised(load_in_4bit, load_in_8bit)
    check_quantisation(quantised, files)
    if device_map is not None and launched() > 1:
        raise InputError(
            "--device-map: under torchrun every process loads the model on a device of its own; leave one of them out."
        )
    if keep_adapter and adapter is None:
        raise InputError("--keep-adapter: there is no adapter to keep; give --adapter too.")
    default = recipe_of(files, recipe)
    chosen = default.with_overrides(**overrides)
    calibration = load_calibration(chosen.calibration, default.calibration)
    if chosen.strength == "auto" and not calibration.select("held_out", "unsafe"):
        raise InputError("--strength auto: it needs held-out unsafe rows, and the calibration set has none; give --strength X.")
    layers, depth = parsed_layers(chosen), int(text_config(files)["num_hidden_layers"])
    if layers is not None and layers[-1] >= depth:
        raise InputError(
            f"--layers: {chosen.layers} ends at {layers[-1]}, and {files.name} has decoder layers 0 to {depth - 1}; "
            "both ends are included."
        )
    output = output or Path(f"{files.short_name}-shiftdc")
    check_path(output.resolve(), "--output")
    check_output(output, force)
    if output.resolve().is_relative_to(files.folder):
        raise InputError(f"--output: {output} lies in the base model's folder; give another folder.")
    checked = check(files, chosen, allow_inexact=allow_inexact_prompts)
    base = resolve_weights(files, announce)
    check_widths(quantised, base)
    return Plan(
        base=base,
        recipe=chosen,
        checked=checked,
        calibration=calibration,
        output=output,
        force=force,
        dtype=dtype,
        device_map=device_map,
        batch_size=batch_size,
        adapter=None if adapter is None else resolve_adapter(adapter, base),
        keep_adapter=keep_adapter,
        quantised=quantised,
    )


def parsed_layers(recipe: Recipe) -> range | None:
    """The layers asked for; None for auto."""
    return None if recipe.layers == "auto" else parse_layers(recipe.layers)


def _quantised(load_in_4bit: bool, load_in_8bit: bool) -> int | None:
    if load_in_4bit and load_in_8bit:
        raise InputError("--load-in-4bit and --load-in-8bit exclude each other; give one.")
    return 4 if load_in_4bit else 8 if load_in_8bit else None


def plan_needs(plan: Plan) -> Needs:
    """Memory and disk that the plan takes, from headers alone."""
    text = text_config(plan.base)
    rows = {"held_out": len(plan.calibration.select("held_out"))}
    rows["all"] = len(plan.calibration.rows) + 2 * len(image_rows(plan.calibration)) + 4 * BLANK_IMAGES
    device = "cuda" if torch.cuda.is_available() else "cpu"
    changed = set() if plan.adapter is None or plan.keep_adapter else changed_shards(plan.adapter, plan.base)
    copied = [s for s in plan.base.shards if s in changed or not will_be_linked(s, plan.output)]
    return needs(
        plan.base, text, dtype=plan.dtype, quantised=plan.quantised, tokens=AUTO_TOKENS[device], rows=rows,
        layers=len(plan.layers or range(plan.depth)), copied=sum(shard.stat().st_size for shard in copied),
    )  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """What was measured of the base model, which is released afterwards."""

    directions: Directions
    choice: LayerChoice
    notices: tuple[str, ...] = ()
    sweep: Sweep | None = None


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
        hash_of = stack.enter_context(hashed_aside(plan.base)) if ranks.leads else None
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
        report = make_report(plan, measured, baked) | {"resumed_batches": store.found}
        card = render_card(plan.base, plan.recipe, report, measured.directions.statistics, repo=plan.output.name)
        (folder / CARD).write_text(card, "utf-8")
        report["files"] = hashes(folder, known=baked.hashes)
        write_report(folder, report)  # verify reads it; the parity that it finds is added
        verification = clock.stage("verify", lambda: verify(folder, plan.device_map, plan.output))
        report |= {"parity": verification.parity, "seconds": clock.seconds}
        write_report(folder, report)
    store.clear()
    return Export(replace(plan, base=base), report, verification)


def fingerprint(plan: Plan) -> dict[str, Any]:
    """What the activations depend on, to the bit."""
    return {
        "base": base_identity(plan.base),
        "adapter": None if plan.adapter is None else [plan.adapter.sha256, plan.keep_adapter],
        "calibration": calibration_identity(plan.calibration),
        "recipe": plan.recipe.model_dump(include={"family", "decoder_layers", "prompts", "layers"}),
        "captions": [plan.recipe.wording.caption, plan.recipe.caption_tokens],
        "arithmetic": [plan.dtype, plan.device_map, plan.quantised, plan.batch_size],
        "code": code_identity(),
    }


@contextmanager
def adapted(plan: Plan, clock: Clock, ranks: Ranks) -> Iterator[Plan]:
    """The plan on the base with its adapter merged, in a folder beside the output that is gone afterwards."""
    adapter = plan.adapter
    if adapter is None or plan.keep_adapter:
        yield plan
        return
    with scratch(plan.output, "merged") if ranks.leads else nullcontext(Path()) as folder:
        yield replace(plan, base=clock.stage("merge adapter", lambda: ranks.share(lambda: merge(plan.base, adapter, folder))))


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
        return measured, clock.stage("probe", lambda: record_probe(vlm, *probed(plan, measured)))


def probe_unquantised(plan: Plan, measured: Measurement, clock: Clock) -> Probe:
    """The probe of the weights that are exported, with the settings that a sweep may have changed."""

    def record() -> Probe:
        with loaded(plan) as vlm:
            return record_probe(vlm.framed(plan.checked.frame), *probed(plan, measured))

    return clock.stage("probe", record)


def probed(plan: Plan, measured: Measurement) -> tuple[Directions, tuple[int, ...], Recipe, PromptFrame]:
    """What is baked, and what `record_probe` takes beside the model."""
    return measured.directions, measured.choice.layers, plan.recipe, plan.checked.frame


def swept(plan: Plan, measured: Measurement, clock: Clock, hash_of: HashOf | None) -> tuple[Plan, Measurement]:
    """The plan with the strength, and the measurement with the layers, that a sweep on held-out rows chose."""
    held_out = plan.calibration.select("held_out")
    with scratch(plan.output, "sweep") as folder:
        bake_measured(plan, measured, folder, hash_of, for_a_while=True)
        vlm = load_calibrated(folder, plan.recipe, dtype=plan.dtype, device_map=plan.device_map)
        found = clock.stage("sweep", lambda: run_sweep(vlm, held_out, plan.layers is None, clock.progress))
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


def choose(plan: Plan, directions: Directions) -> LayerChoice:
    """The layers to calibrate: those asked for, or `choose_layers`'."""
    if plan.layers is None:
        return choose_layers(directions.statistics, plan.depth)
    left_out = {i: "prompts without an image skip it" for i in plan.layers if i not in directions.layers}
    return LayerChoice(directions.layers, "given by the caller", left_out)


def make_report(plan: Plan, measured: Measurement, baked: Baked) -> dict[str, Any]:
    """shiftdc_report.json: everything but texts."""
    base, choice = plan.base, measured.choice
    return {
        "base_model": {
            "id": base.name,
            "revision": base.revision,
            "architecture": family(plan.recipe.family).stock_class,
            "shards": baked.hashes,
            "placed": baked.placed,
        },
        **({} if plan.adapter is None else {"adapter": plan.adapter.report(plan.keep_adapter)}),
        "recipe": plan.recipe.model_dump(),
        "calibration": plan.calibration.record(),
        "prompts": plan.checked.prompts.report(),
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
        "measured_quantised": plan.quantised,  # bits; the exported weights are never quantised
        "warnings": list(measured.notices),  # what transformers said of the base's files
    }


def write_report(folder: Path, report: dict[str, Any]) -> None:
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def text_config(base: BaseFiles) -> dict[str, Any]:
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
