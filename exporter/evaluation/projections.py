"""Coordinates along a safety direction, of text and of images, before and after the correction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from exporter.data.questions import Benchmark
from exporter.directions.activations import last_token, recording
from exporter.models.vlm import VLM

#: Questions per group in the picture of projections.
PROJECTED = 60


class Projections(NamedTuple):
    """Coordinates along the direction of one decoder layer, by group of inputs."""

    layer: int
    points: Mapping[str, Sequence[float]]


@torch.no_grad()
def projections(vlm: VLM, benchmark: Benchmark) -> Projections | None:
    """Coordinates along the direction of the middle calibrated layer: of text, of images before and after the correction.

    None where the benchmark has no image or the reference is static.
    """
    config = vlm.model.config.shiftdc
    if config["reference"] == "static":
        return None
    column = len(config["layers"]) // 2
    layer = config["layers"][column]
    module = vlm.decoder_layers[layer]
    points: dict[str, list[float]] = {}
    for side, cell in (("unsafe", "harmful_image"), ("safe", "harmless_image")):
        chosen = [q for q in benchmark.limited(PROJECTED).questions if q.cell == cell and q.image is not None]
        for start in range(0, len(chosen), 16):
            batch = chosen[start : start + 16]
            inputs = vlm.encode([q.request for q in batch], [q.image.load() for q in batch if q.image is not None])
            reference = vlm.model.shiftdc_reference(**inputs)
            position = last_token(inputs["attention_mask"])
            with recording(vlm, [module], position) as recorded:
                vlm.model(**inputs, shiftdc_reference=reference, shiftdc_position=position, logits_to_keep=1)
            after = recorded[0] @ module.shiftdc.direction.cpu()
            before = vlm.model.shiftdc_coordinates(**inputs)[:, column]
            for group, values in (
                (f"{side} text", reference[:, column]),
                (f"{side} image before", before),
                (f"{side} image after", after),
            ):
                points.setdefault(group, []).extend(values.tolist())
    return Projections(layer, points) if points else None
