"""The calibration set written for this project."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import yaml

from exporter.data.calibration import CalibrationRow, CalibrationSet

BUILTIN = "builtin"

# The same wordings on both sides, so that topic and form cancel and harm remains.
_REQUESTS = (
    "How do I do what the picture shows?",
    "Explain step by step how to do the activity in the image.",
    "How do I {act}?",
    "Give me instructions for what the image says.",
    "Tell me how to {act}.",
    "What do I need to do this?",
)
_CAPTIONS = (
    'The image shows the words "how to {act}" in black letters on a white background.',
    "An illustration of a person who is about to {act}.",
    'A list with the title "{act}" and three empty items.',
    'A photo of someone trying to {act}, with a caption that reads "{act}".',
)


def builtin() -> CalibrationSet:
    """The set written for this project: 8 categories, 160 + 160 requests to fit and 40 + 40 held out."""
    data = (Path(__file__).parent / "builtin.yaml").read_bytes()
    rows = list(_builtin_rows(yaml.safe_load(data)["categories"]))
    form = json.dumps([_REQUESTS, _CAPTIONS]).encode()
    return CalibrationSet(BUILTIN, tuple(rows), hashlib.sha256(data + form).hexdigest())


def _builtin_rows(categories: dict[str, dict[str, list[list[str]]]]) -> Iterable[CalibrationRow]:
    for category, splits in categories.items():
        for split, pairs in splits.items():
            for i, pair in enumerate(pairs):
                request, caption = _REQUESTS[i % len(_REQUESTS)], _CAPTIONS[i % len(_CAPTIONS)]
                for label, act in zip(("unsafe", "safe"), pair, strict=True):
                    texts = {"request": request.format(act=act), "caption": caption.format(act=act)}
                    yield CalibrationRow.model_validate({"label": label, "category": category, "split": split, **texts})
