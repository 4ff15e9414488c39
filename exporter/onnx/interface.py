"""What ONNX graphs and the code that runs them agree on: names, precisions, and how a reference reaches the decoder.

The decoder corrects rows that hold an image, at the last token of the forward that reads the image. How is its *kind*:

    STATIC   the mean shift baked at export; what a row gets if nothing is fed
    EXACT    to a target coordinate per calibrated layer: the text-only counterpart's (arXiv:2502.13095, Eq. 7)
    AMOUNTS  by amounts that were computed beforehand (`rule: precomputed`)
    OFF      not at all; only on request

A runtime that can feed any input gives `shiftdc_mode` and `shiftdc_target`. transformers.js cannot, and sends a message in
`position_ids` (the graph derives positions from the mask): int64 [batch, layers + 1] = [-kind, round(target * 2^24), ...].
The output `shiftdc_reference` of a text-only forward is such a message, of kind EXACT. Where positions follow from the shapes of
pictures (qwen2_vl, qwen2_5_vl) `position_ids` are positions, there is no such output, and transformers.js gets STATIC only.

This module imports nothing.
"""

from __future__ import annotations

STATIC, EXACT, AMOUNTS, OFF = range(4)
#: Targets in a message are multiples of 1 / SCALE.
SCALE = 2**24

VISION, EMBED, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"
GRAPHS = (VISION, EMBED, DECODER)
#: File name suffix of each precision, as transformers.js looks for it (its names: fp32, fp16, q8, q4).
SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_quantized", "q4": "_q4"}
JS_NAMES = {"fp32": "fp32", "fp16": "fp16", "int8": "q8", "q4": "q4"}

#: Optional inputs of the decoder: graph inputs with a default.
MODE, TARGET, STRENGTH, ONE_SIDED = "shiftdc_mode", "shiftdc_target", "shiftdc_strength", "shiftdc_one_sided"
OPTIONAL = (MODE, TARGET, STRENGTH, ONE_SIDED)
#: Outputs of the decoder: `x.d` of the last token at every calibrated layer, float32 [batch, layers]; the same as a message.
COORDINATES, MESSAGE = "shiftdc_coordinates", "shiftdc_reference"

#: Frames, rows and columns of patches of each picture, int64 [pictures, 3], as processors call it.
GRID = "image_grid_thw"

#: The last channel of `inputs_embeds` says what a token is: part of an image, or one that ends a reply.
IMAGE_FLAG, END_FLAG = 1.0, 2.0


def graph_file(graph: str, precision: str) -> str:
    return f"{graph}{SUFFIXES[precision]}.onnx"


def past_names(layers: int) -> list[str]:
    return [f"past_key_values.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]


def present_names(layers: int) -> list[str]:
    return [f"present.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
