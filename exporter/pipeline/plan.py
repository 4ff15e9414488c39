"""The plan of an export: everything it will do, checked, before anything is loaded or written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from exporter.checkpoint.adapter import Adapter, changed_shards, resolve_adapter
from exporter.checkpoint.staging import check_output
from exporter.data.calibration import CalibrationSet
from exporter.data.calibration_sets import load_calibration
from exporter.directions.activations import AUTO_TOKENS
from exporter.directions.fit import BLANK_IMAGES, image_rows
from exporter.errors import InputError, refusing
from exporter.models.base import Announce, BaseCheckpoint, BaseFiles, check_path, resolve_small, resolve_weights, unannounced
from exporter.models.check import Check, check, recipe_of
from exporter.models.footprint import Footprint, footprint
from exporter.models.quantisation import check_quantisation, check_widths
from exporter.models.recipe import Recipe, parse_layers
from exporter.runtime.linking import will_be_linked
from exporter.runtime.ranks import world_size


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
        """How many decoder layers the model has."""
        return self.checked.depth

    @property
    def layers(self) -> range | None:
        return parsed_layers(self.recipe)


@dataclass(frozen=True)
class ExportOptions:
    """How an export is made.

    output: by default a folder named after the model. recipe: by default the model family's. adapter: folder or Hub id of a PEFT
    adapter, merged unless `keep_adapter`. batch_size: None for as many prompts as fit. settings: of the recipe, in place of its
    own (`layers`, `reference`, `strength`, ...; None leaves a setting as it is). experimental_family: whether a model type that
    is new in transformers is tried.
    """

    output: Path | None = None
    recipe: str | None = None
    revision: str | None = None
    force: bool = False
    dtype: str = "auto"
    device_map: str | None = None
    batch_size: int | None = None
    adapter: str | None = None
    keep_adapter: bool = False
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    allow_inexact_prompts: bool = False
    experimental_family: bool = False
    settings: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, **given: Any) -> ExportOptions:
        """From names as the command line has them: what is no field here is a setting of the recipe."""
        own = {f.name for f in fields(cls)}
        settings = {name: value for name, value in given.items() if name not in own}
        return cls(**{name: value for name, value in given.items() if name in own}, settings=settings)

    @property
    def quantised(self) -> int | None:
        """Bits of the weights while measuring; None for those that are stored. Raises InputError."""
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("--load-in-4bit and --load-in-8bit exclude each other; give one.")
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None


def make_plan(model: str, options: ExportOptions | None = None, announce: Announce = unannounced) -> Plan:
    """Resolve and check all input. Raises InputError; loads no weights and writes nothing.

    What small files can tell comes first: weights on the Hub are fetched last, and `announce` is told their size before.
    """
    options = options or ExportOptions()
    if options.output is not None:
        check_output(options.output, options.force)  # before anything is fetched
    files = resolve_small(model, options.revision)
    quantised = options.quantised
    check_quantisation(quantised, files)
    if options.device_map is not None and world_size() > 1:
        raise InputError(
            "--device-map: under torchrun every process loads the model on a device of its own; leave one of them out."
        )
    if options.keep_adapter and options.adapter is None:
        raise InputError("--keep-adapter: there is no adapter to keep; give --adapter too.")
    default = recipe_of(files, options.recipe, experimental=options.experimental_family)
    chosen = default.with_overrides(**options.settings)
    calibration = load_calibration(chosen.calibration, default.calibration)
    if chosen.strength == "auto" and not calibration.select("held_out", "unsafe"):
        raise InputError("--strength auto: it needs held-out unsafe rows, and the calibration set has none; give --strength X.")
    layers, depth = parsed_layers(chosen), int(text_config(files)["num_hidden_layers"])
    if layers is not None and layers[-1] >= depth:
        raise InputError(
            f"--layers: {chosen.layers} ends at {layers[-1]}, and {files.name} has decoder layers 0 to {depth - 1}; "
            "both ends are included."
        )
    output = options.output or Path(f"{files.short_name}-shiftdc")
    check_path(output.resolve(), "--output")
    check_output(output, options.force)
    if output.resolve().is_relative_to(files.folder):
        raise InputError(f"--output: {output} lies in the base model's folder; give another folder.")
    checked = check(files, chosen, allow_inexact=options.allow_inexact_prompts)
    base = resolve_weights(files, announce)
    check_widths(quantised, base)
    return Plan(
        base=base,
        recipe=chosen,
        checked=checked,
        calibration=calibration,
        output=output,
        force=options.force,
        dtype=options.dtype,
        device_map=options.device_map,
        batch_size=options.batch_size,
        adapter=None if options.adapter is None else resolve_adapter(options.adapter, base),
        keep_adapter=options.keep_adapter,
        quantised=quantised,
    )


def parsed_layers(recipe: Recipe) -> range | None:
    """The layers asked for; None for auto."""
    return None if recipe.layers == "auto" else parse_layers(recipe.layers)


def plan_needs(plan: Plan) -> Footprint:
    """Memory and disk that the plan takes, from headers alone."""
    text = text_config(plan.base)
    rows = {"held_out": len(plan.calibration.select("held_out"))}
    rows["all"] = len(plan.calibration.rows) + 2 * len(image_rows(plan.calibration)) + 4 * BLANK_IMAGES
    device = "cuda" if torch.cuda.is_available() else "cpu"
    changed = set() if plan.adapter is None or plan.keep_adapter else changed_shards(plan.adapter, plan.base)
    copied = [s for s in plan.base.shards if s in changed or not will_be_linked(s, plan.output)]
    return footprint(
        plan.base, text, dtype=plan.dtype, quantised=plan.quantised, tokens=AUTO_TOKENS[device], rows=rows,
        layers=len(plan.layers or range(plan.depth)), copied=sum(shard.stat().st_size for shard in copied),
    )  # fmt: skip


def text_config(base: BaseFiles) -> dict[str, Any]:
    """The language model's part of config.json, with the class's defaults filled in."""
    from transformers import AutoConfig

    with refusing(f"MODEL: the config.json of {base.name} cannot be used", "restore it"):
        text = AutoConfig.from_pretrained(base.folder, trust_remote_code=False).get_text_config()
        layers = getattr(text, "num_hidden_layers", None)  # of hybrids it follows from the list of their kinds
    config = {**text.to_dict(), "num_hidden_layers": layers}
    if not isinstance(layers, int) or layers < 1:
        raise InputError(f"MODEL: the config.json of {base.name} cannot be used (num_hidden_layers is {layers!r}); restore it.")
    return config
