"""One prompt with one image: the calibrated reply beside the uncalibrated one, with what it took."""

from __future__ import annotations

import time

import torch
from PIL import Image

from exporter.directions.activations import last_token, recording
from exporter.evaluation.comparison import Comparison, LayerShift
from exporter.models.vlm import VLM, Inputs


@torch.no_grad()
def compare(vlm: VLM, image: Image.Image, prompt: str, max_new_tokens: int = 128) -> Comparison:
    """Greedy replies to one prompt. The calibrated time includes the caption and the reference pass."""
    inputs = vlm.encode([prompt], [image])
    model = vlm.model
    start = time.perf_counter()
    plain = _reply(vlm, inputs, max_new_tokens, shiftdc=False)
    middle = time.perf_counter()
    read = reference = None
    if model.config.shiftdc["reference"] == "caption":
        read = model.shiftdc_image(**inputs)
        reference = model.shiftdc_reference(**inputs, captions=read.captions)
    elif model.config.shiftdc["reference"] != "static":
        reference = model.shiftdc_reference(**inputs)
    calibrated = _reply(vlm, inputs, max_new_tokens, shiftdc_reference=reference, shiftdc_image=read)
    end = time.perf_counter()
    return Comparison(
        uncalibrated=plain,
        calibrated=calibrated,
        caption=None if read is None else vlm.decode(read.captions[0]),
        layers=_layer_shifts(vlm, inputs, reference),
        uncalibrated_seconds=middle - start,
        calibrated_seconds=end - middle,
    )


def _reply(vlm: VLM, inputs: Inputs, max_new_tokens: int, **options: object) -> str:
    out = vlm.model.generate(**inputs, **options, max_new_tokens=max_new_tokens, do_sample=False)
    return vlm.decode(out[0, inputs["input_ids"].shape[1] :])


def _layer_shifts(vlm: VLM, inputs: Inputs, reference: torch.Tensor | None) -> tuple[LayerShift, ...]:
    settings = vlm.model.config.shiftdc
    layers = vlm.decoder_layers
    before = vlm.model.shiftdc_coordinates(**inputs)[0]
    position = last_token(inputs["attention_mask"])
    # these hooks run after the corrections', which were registered first
    with recording(vlm, [layers[i] for i in settings["layers"]], position) as recorded:
        vlm.model(**inputs, shiftdc_reference=reference, shiftdc_position=position, logits_to_keep=1)
    return tuple(
        LayerShift(
            layer=layer,
            before=before[i].item(),
            reference=None if reference is None else reference[0, i].item(),
            after=(recorded[i][0] @ layers[layer].shiftdc.direction.cpu()).item(),
        )
        for i, layer in enumerate(settings["layers"])
    )
