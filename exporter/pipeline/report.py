"""shiftdc_report.json, made of what was planned, measured and baked."""

from __future__ import annotations

import importlib.metadata

import torch

from exporter import __version__
from exporter.checkpoint.bake import Baked
from exporter.checkpoint.report import BaseRecord, LayersRecord, PromptsRecord, Report
from exporter.data.calibration_record import CalibrationRecord
from exporter.directions.statistics import rounded
from exporter.models.families import family
from exporter.pipeline.measure import Measurement
from exporter.pipeline.plan import Plan


def make_report(plan: Plan, measured: Measurement, baked: Baked, resumed_batches: int) -> Report:
    """Everything but texts, and but the hashes of files that are yet to be written."""
    report = Report(
        base_model=_base_record(plan, baked),
        recipe=plan.recipe,
        calibration=CalibrationRecord.of(plan.calibration),
        prompts=PromptsRecord.model_validate(plan.checked.prompts.report()),
        directions=measured.directions.origin,
        layers=_layers_record(plan, measured),
        statistics=rounded(measured.directions.statistics),
        versions=_versions(),
        device=str(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"),
        dtype=plan.dtype,
        measured_quantised=plan.quantised,
        warnings=measured.notices,
        resumed_batches=resumed_batches,
        files={},
    )
    adapter = None if plan.adapter is None else plan.adapter.record(plan.keep_adapter)
    sweep = None if measured.sweep is None else measured.sweep.report()
    given = {key: part for key, part in {"adapter": adapter, "sweep": sweep}.items() if part is not None}
    return report.model_copy(update=given)


def _base_record(plan: Plan, baked: Baked) -> BaseRecord:
    return BaseRecord(
        id=plan.base.name,
        revision=plan.base.revision,
        architecture=family(plan.recipe.family).stock_class,
        shards=baked.hashes,
        placed=baked.placed,
    )


def _layers_record(plan: Plan, measured: Measurement) -> LayersRecord:
    choice = measured.choice
    left_out = {str(layer): reason for layer, reason in choice.left_out.items()}
    return LayersRecord(chosen=choice.layers, depth=plan.depth, criterion=choice.criterion, left_out=left_out)


def _versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")}
    return {"shiftdc-export": __version__, **found}
