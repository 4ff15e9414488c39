"""Does an ONNX export give what PyTorch gives? Logits, greedy replies and the effect of the correction, at every precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from exporter.data.images import typographic_image
from exporter.models.overridden import overridden
from exporter.models.vlm import VLM, Inputs
from exporter.onnx.interface import GRID
from exporter.onnx.runner import BAKED, UNCALIBRATED, Floats, OnnxShiftDC, Prompts, until_end

#: Harmless requests; the first ones are asked about a picture, all of them without one.
REQUESTS = (
    "What is shown in the image?",
    "What color is this?",
    "How do I make this?",
    "Is there any text in the image?",
    "Please explain how to bake some bread.",
    "What is a chair?",
    "Describe the image.",
    "Give a caption for the image.",
)
WORDS = ("bread", "a red chair", "piano", "how to fold a kite", "green lamp", "soup", "board game", "garden")
#: What the fixed captions of the exact method say.
CAPTION = "a drawing of {word}."
NEW_TOKENS = 16
KINDS = ("text", "uncalibrated", "static", "exact")


@dataclass(frozen=True)
class Tolerance:
    """Largest difference of logits relative to the largest logit (at least 1), smallest share of equal tokens, and smallest
    cosine between what calibration adds to the logits here and in PyTorch."""

    logits: float
    tokens: float
    effect: float


#: Quantised weights change replies; what they may not do is lose the correction.
TOLERANCES = {
    "fp32": Tolerance(2e-4, 0.98, 0.999),
    "fp16": Tolerance(2e-2, 0.8, 0.98),
    "int8": Tolerance(float("inf"), 0.0, 0.8),
    "q4": Tolerance(float("inf"), 0.0, 0.5),
}


@dataclass(frozen=True)
class Expected:
    """What PyTorch gives in float32, by kind: last-token logits [prompts, vocabulary], and replies as token ids."""

    text: Prompts
    image: Prompts
    captions: list[list[int]]
    logits: dict[str, Floats]
    replies: dict[str, list[list[int]]]


@torch.no_grad()
def expected(vlm: VLM, eos: Sequence[int], images: Sequence[Image.Image] | None = None) -> Expected:
    """Ask a calibrated float32 model, left-padded batches of short and long prompts."""
    pictures = list(images) if images is not None else [typographic_image(word) for word in WORDS]
    text, shown = vlm.encode(REQUESTS), vlm.encode(REQUESTS, pictures)
    captions = [_caption(vlm, word) for word in WORDS]
    model = vlm.model
    reference = model.shiftdc_reference(**shown, captions=captions)
    asked: dict[str, tuple[Inputs, dict[str, object]]] = {
        "text": (text, {}),
        "uncalibrated": (shown, {"shiftdc": False}),
        "static": (shown, {}),
        "exact": (shown, {"shiftdc_reference": reference}),
    }
    logits, replies = {}, {}
    for kind, (inputs, options) in asked.items():
        with overridden(model, {"reference": "static"} if kind == "static" else {}):
            logits[kind] = model(**inputs, **options, logits_to_keep=1).logits[:, -1].numpy()
            out = model.generate(**inputs, **options, max_new_tokens=NEW_TOKENS, do_sample=False)
        replies[kind] = [until_end(row, eos) for row in out[:, inputs["input_ids"].shape[1] :].tolist()]
    return Expected(as_prompts(text), as_prompts(shown), captions, logits, replies)


def as_prompts(inputs: Inputs) -> Prompts:
    arrays = {k: v.numpy() for k, v in inputs.items()}
    ids, mask = arrays.pop("input_ids"), arrays.pop("attention_mask")
    if "pixel_attention_mask" in arrays:
        arrays["pixel_attention_mask"] = arrays["pixel_attention_mask"] > 0
    return Prompts(ids, mask, {k: v for k, v in arrays.items() if k.startswith("pixel_") or k == GRID})


def _caption(vlm: VLM, word: str) -> list[int]:
    return vlm.tokenizer(CAPTION.format(word=word), add_special_tokens=False)["input_ids"]


@dataclass(frozen=True)
class Parity:
    """How the graphs of one precision compare with PyTorch; differences and cosines by kind."""

    max_logit_difference: dict[str, float]
    largest_logit: float
    prompts: int
    token_agreement: float
    effect_cosine: dict[str, float | None]


def parity_of(folder: Path, precision: str, wanted: Expected, threads: int | None = None) -> Parity:
    """Raises InputError where the folder lacks a graph of this precision."""
    runner = OnnxShiftDC(folder, precision, threads)
    corrections = {
        "text": BAKED,
        "uncalibrated": UNCALIBRATED,
        "static": BAKED,
        "exact": runner.towards(wanted.image, runner.reference(wanted.image, "caption", wanted.captions)),
    }
    logits, replies = {}, {}
    for kind, correction in corrections.items():
        prompts = wanted.text if kind == "text" else wanted.image
        logits[kind] = runner.logits(prompts, correction)
        replies[kind] = runner.generate(prompts, correction, NEW_TOKENS)
    return Parity(
        max_logit_difference={kind: _rounded(np.abs(logits[kind] - wanted.logits[kind]).max()) for kind in KINDS},
        largest_logit=_rounded(max(np.abs(there).max() for there in wanted.logits.values())),
        prompts=len(KINDS) * len(REQUESTS),
        token_agreement=_agreement(replies, wanted.replies),
        effect_cosine={kind: _effect(logits, wanted.logits, kind) for kind in ("static", "exact")},
    )


def _agreement(found: dict[str, list[list[int]]], wanted: dict[str, list[list[int]]]) -> float:
    """Share of the reply tokens (and ends) that are equal."""
    pairs = [(a, b) for kind in KINDS for a, b in zip(found[kind], wanted[kind], strict=True)]
    equal = sum(sum(x == y for x, y in zip(a, b, strict=False)) + (len(a) == len(b)) for a, b in pairs)
    return _rounded(equal / sum(max(len(a), len(b)) + 1 for a, b in pairs))


def _effect(found: dict[str, Floats], wanted: dict[str, Floats], kind: str) -> float | None:
    """Cosine between what calibration adds to the logits here and there; None where PyTorch's adds nothing."""
    here, there = (of[kind].astype(np.float64) - of["uncalibrated"] for of in (found, wanted))
    if not there.any():
        return None
    norms = float(np.linalg.norm(here) * np.linalg.norm(there))
    return 0.0 if norms == 0 else _rounded(float((here * there).sum()) / norms)


def _rounded(value: float) -> float:
    return float(f"{float(value):.4g}")


def failures(precision: str, parity: Parity) -> list[str]:
    """What is not as it must be, one sentence each."""
    tolerance, scale = TOLERANCES[precision], max(1.0, parity.largest_logit)
    found = []
    for kind, difference in parity.max_logit_difference.items():
        if not difference <= tolerance.logits * scale:  # also catches NaN
            found.append(f"{kind} logits differ by {difference:g}, expected at most {tolerance.logits * scale:.2g}")
    if not parity.token_agreement >= tolerance.tokens:
        found.append(f"{parity.token_agreement:.0%} of the tokens agree, expected {tolerance.tokens:.0%}")
    for kind, cosine in parity.effect_cosine.items():
        if cosine is not None and not cosine >= tolerance.effect:
            found.append(f"the {kind} correction has another effect (cosine {cosine:g}, expected {tolerance.effect:g})")
    return [f"{precision}: {sentence}" for sentence in found]
