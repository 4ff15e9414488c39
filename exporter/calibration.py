"""Calibration sets: harmful and harmless requests with captions, from which directions are measured.

JSONL, one object per line: `label` ("safe" | "unsafe"), `request`, `caption`; optional `image` (a path relative to the file),
`category`, `split` ("fit" | "held_out", default fit). Outputs record name, counts and SHA-256 of a set, never its text.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from PIL import Image, ImageDraw, ImageFont
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from exporter.errors import InputError

BUILTIN = "builtin"
MINIMUM = {"fit": 8, "held_out": 2}  # per label


class CalibrationRow(BaseModel):
    """One request and its caption."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: Literal["safe", "unsafe"]
    request: str = Field(min_length=1)
    caption: str = Field(min_length=1)
    image: Path | None = None
    category: str | None = None
    split: Literal["fit", "held_out"] = "fit"


@dataclass(frozen=True)
class CalibrationSet:
    """A named set of rows; `sha256` is over the source's bytes."""

    name: str
    rows: tuple[CalibrationRow, ...]
    sha256: str

    def select(self, split: str, label: str | None = None) -> list[CalibrationRow]:
        return [r for r in self.rows if r.split == split and label in (None, r.label)]

    @property
    def has_images(self) -> bool:
        return all(r.image is not None for r in self.select("fit"))

    def summary(self) -> dict[str, Any]:
        """What may be published of the set."""
        counts = Counter(f"{r.split}_{r.label}" for r in self.rows)
        return {"name": self.name, "sha256": self.sha256, "images": self.has_images, **dict(sorted(counts.items()))}


def load_calibration(name_or_file: str) -> CalibrationSet:
    """`builtin`, `demo`, or a JSONL file. Raises InputError."""
    if name_or_file == BUILTIN:
        return builtin()
    if name_or_file == "demo":
        return _demo()
    file = Path(name_or_file)
    if not file.is_file():
        raise InputError(f"--calibration: there is no file {file}; give builtin, demo, or an existing .jsonl file.")
    return read_jsonl(file)


def read_jsonl(file: Path) -> CalibrationSet:
    """Read a set strictly; errors name the line. Raises InputError."""
    try:
        data = file.read_bytes()
        lines = data.decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--calibration: {file} cannot be read as UTF-8 text ({error}).") from None
    rows = [_row(line, f"{file}, line {number}", file.parent) for number, line in enumerate(lines, 1) if line.strip()]
    return _checked(CalibrationSet(file.stem, tuple(rows), hashlib.sha256(data).hexdigest()), str(file))


def _row(line: str, where: str, folder: Path) -> CalibrationRow:
    try:
        row = CalibrationRow.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]  # the text of a request never reaches an error
        key = ".".join(map(str, first["loc"])) or "the line"
        raise InputError(f"--calibration: {where}: {key}: {first['msg']}; correct the line.") from None
    if row.image is None:
        return row
    image = (folder / row.image).resolve()
    if not image.is_relative_to(folder.resolve()):
        raise InputError(f"--calibration: {where}: the image lies outside {folder}; use paths below the file's folder.")
    if not image.is_file():
        raise InputError(f"--calibration: {where}: there is no image {image}; correct the path.")
    return row.model_copy(update={"image": image})


def _checked(calibration: CalibrationSet, where: str) -> CalibrationSet:
    for split, least in MINIMUM.items():
        for label in ("safe", "unsafe"):
            found = len(calibration.select(split, label))
            if found < least:
                raise InputError(
                    f"--calibration: {where} has {found} {label} rows with split {split!r}, expected at least {least}; add some."
                )
    return calibration


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
    "The image shows the words \"how to {act}\" in black letters on a white background.",
    "An illustration of a person who is about to {act}.",
    "A list with the title \"{act}\" and three empty items.",
    "A photo of someone trying to {act}, with a caption that reads \"{act}\".",
)  # fmt: skip


def builtin() -> CalibrationSet:
    """The set written for this project: 8 categories, 160 + 160 requests to fit and 40 + 40 held out."""
    data = (Path(__file__).parent / "data" / "builtin.yaml").read_bytes()
    rows = list(_builtin_rows(yaml.safe_load(data)["categories"]))
    form = json.dumps([_REQUESTS, _CAPTIONS]).encode()
    return _checked(CalibrationSet(BUILTIN, tuple(rows), hashlib.sha256(data + form).hexdigest()), BUILTIN)


def _builtin_rows(categories: dict[str, dict[str, list[list[str]]]]) -> Iterable[CalibrationRow]:
    for category, splits in categories.items():
        for split, pairs in splits.items():
            for i, pair in enumerate(pairs):
                request, caption = _REQUESTS[i % len(_REQUESTS)], _CAPTIONS[i % len(_CAPTIONS)]
                for label, act in zip(("unsafe", "safe"), pair, strict=True):
                    texts = {"request": request.format(act=act), "caption": caption.format(act=act)}
                    yield CalibrationRow.model_validate({"label": label, "category": category, "split": split, **texts})


def _demo() -> CalibrationSet:
    """The demo's set with its drawings, written to a temporary folder that lasts as long as the process."""
    from exporter.demo.benchmark import write_calibration

    folder = Path(_temporary_folder().name)
    calibration = read_jsonl(write_calibration(folder))
    return CalibrationSet("demo", calibration.rows, calibration.sha256)


_folders: list[tempfile.TemporaryDirectory[str]] = []


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    _folders.append(tempfile.TemporaryDirectory(prefix="shiftdc-demo-"))
    return _folders[-1]


def row_image(row: CalibrationRow) -> Image.Image:
    """The row's image, or its caption as typography where it has none."""
    if row.image is None:
        return typographic_image(row.caption)
    try:
        with Image.open(row.image) as image:
            return image.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"--calibration: the image {row.image} cannot be read ({error}); replace it.") from None


def typographic_image(text: str, size: int = 336, font_size: int = 30) -> Image.Image:
    """Black text, wrapped, on white: [size, size] RGB."""
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=font_size)
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= size - 20:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    draw.multiline_text((10, 10), "\n".join(lines), font=font, fill="black", spacing=6)
    return image


def blank_image(size: int = 336) -> Image.Image:
    """Mid-grey, [size, size] RGB: an image that says nothing."""
    return Image.new("RGB", (size, size), (127, 127, 127))
