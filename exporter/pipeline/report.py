"""shiftdc_report.json, made of what was planned, measured and baked."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch

from exporter import __version__
from exporter.checkpoint.bake import Baked
from exporter.checkpoint.layout import REPORT
from exporter.directions.statistics import summary
from exporter.models.families import family
from exporter.pipeline.measure import Measurement
from exporter.pipeline.plan import Plan


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
        "statistics": summary(measured.directions.statistics),
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
