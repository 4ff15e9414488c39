"""One prompt with one image on an ONNX export: the calibrated reply beside the uncalibrated one. Needs no PyTorch."""

from __future__ import annotations

import time

from PIL import Image

from exporter.evaluation.comparison import Comparison, LayerShift
from exporter.onnx.interface import AMOUNTS, COORDINATES, EXACT
from exporter.onnx.runner import UNCALIBRATED, Correction, OnnxShiftDC, Prompts


def compare(runner: OnnxShiftDC, image: Image.Image, prompt: str, max_new_tokens: int = 128) -> Comparison:
    """Greedy replies to one prompt. The calibrated time includes the caption and the reference pass."""
    prompts = runner.encode([prompt], [image])
    start = time.perf_counter()
    plain = runner.generate(prompts, UNCALIBRATED, max_new_tokens)[0]
    middle = time.perf_counter()
    kind, captions, reference = runner.settings["reference"], None, None
    if kind == "static":
        correction = runner.correction(prompts)
    else:
        captions = runner.captions(prompts) if kind == "caption" else None
        reference = runner.reference(prompts, kind, captions)
        correction = runner.towards(prompts, reference)
    calibrated = runner.generate(prompts, correction, max_new_tokens)[0]
    end = time.perf_counter()
    return Comparison(
        uncalibrated=runner.writer.text(plain),
        calibrated=runner.writer.text(calibrated),
        caption=None if captions is None else runner.writer.text(captions[0]),
        layers=_layer_shifts(runner, prompts, correction, None if reference is None else reference[0].tolist()),
        uncalibrated_seconds=middle - start,
        calibrated_seconds=end - middle,
    )


def _layer_shifts(
    runner: OnnxShiftDC, prompts: Prompts, correction: Correction, reference: list[float] | None
) -> tuple[LayerShift, ...]:
    """Coordinates after the correction follow from those that each layer found, because directions have norm 1."""
    before = runner.coordinates(prompts)[0].tolist()
    found = runner.forward(prompts, correction, [COORDINATES])[COORDINATES].numpy()[0].tolist()
    if correction.kind == EXACT and correction.target is not None:
        amounts = [x - r for x, r in zip(found, correction.target[0].tolist(), strict=True)]
    elif correction.kind == AMOUNTS and correction.target is not None:
        amounts = correction.target[0].tolist()
    else:
        amounts = runner.settings["onnx"]["shifts"]
    settings = runner.settings
    gated = [max(0.0, a) if settings["gate"] == "one-sided" else a for a in amounts]
    return tuple(
        LayerShift(
            layer=layer,
            before=before[i],
            reference=None if reference is None else reference[i],
            after=found[i] - settings["strength"] * gated[i],
        )
        for i, layer in enumerate(settings["layers"])
    )
