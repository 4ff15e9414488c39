"""A calibrated reply beside the uncalibrated one, and the picture that both are about; imports no machine learning library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from exporter.data.pictures import PictureError, read_picture
from exporter.errors import InputError
from exporter.runtime.reading import TEXT_CHARACTERS


@dataclass(frozen=True)
class LayerShift:
    """Coordinates along the direction of one layer: of the image prompt, of its reference, and after the correction."""

    layer: int
    before: float
    reference: float | None
    after: float


@dataclass(frozen=True)
class Comparison:
    """Replies with and without calibration; `caption` is None where the reference needs none. Times in seconds."""

    uncalibrated: str
    calibrated: str
    caption: str | None
    layers: tuple[LayerShift, ...]
    uncalibrated_seconds: float
    calibrated_seconds: float


def check_prompt(prompt: str) -> None:
    """Raise InputError unless it is a text."""
    if not prompt.strip():
        raise InputError("--prompt: it is empty; give a question about the picture.")
    if len(prompt) > TEXT_CHARACTERS:
        raise InputError(f"--prompt: it has {len(prompt)} characters, expected at most {TEXT_CHARACTERS}; shorten it.")
    if any("\ud800" <= c <= "\udfff" for c in prompt):  # bytes that are no UTF-8, as Python has them from the command line
        raise InputError("--prompt: it is not UTF-8; give it in that encoding.")


def read_image(file: Path) -> Image.Image:
    """An RGB picture. Raises InputError."""
    try:
        return read_picture(file)
    except FileNotFoundError as error:
        raise InputError(f"--image: there is no file {file}; give an existing picture.") from error
    except PictureError as error:
        raise InputError(f"--image: {file} cannot be read as a picture (it {error}); give a PNG or JPEG.") from error
