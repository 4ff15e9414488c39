"""Pictures of requests, and the reading of files that come from others: upright RGB, checked before any pixel is decoded."""

from __future__ import annotations

import struct
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

from exporter.errors import InputError
from exporter.runtime.hashing import sha256

#: Decoders that are used; others of Pillow start programs (EPS: Ghostscript) or are rarely looked at.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
#: White in a picture of 16 bits.
WHITE = 65_535
# what Pillow's decoders raise on damaged files
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, struct.error, LookupError, TypeError, AttributeError, ArithmeticError)


class Picture(ABC):
    """What a request shows, loaded when it is needed. Equal where it is the same file, drawing or row."""

    @abstractmethod
    def load(self) -> Image.Image:
        """RGB. Raises InputError."""

    @abstractmethod
    def identity(self) -> str:
        """What tells its pixels from others', in every run: a hash, or a row of a dataset at one commit. Raises InputError."""


@dataclass(frozen=True)
class PictureFile(Picture):
    """A file of the user's. `subject`: what an error begins with, as "--benchmark: a.jsonl, line 3: the image"."""

    path: Path
    subject: str

    def load(self) -> Image.Image:
        return loaded(self.path, self.subject)

    def identity(self) -> str:
        """By content: what was computed serves on where the file was moved."""
        try:
            return sha256(self.path)
        except OSError as error:
            raise InputError(f"{self.subject} cannot be read ({error.strerror}); replace it.") from error


class PictureError(ValueError):
    """The message of `read_picture` continues "the image ..."; that of `picture_below` is a whole clause."""


def loaded(source: Path | BytesIO, subject: str) -> Image.Image:
    """As `read_picture`. Raises InputError, which begins with `subject`."""
    try:
        return read_picture(source)
    except FileNotFoundError as error:
        raise InputError(f"{subject} is gone; replace it.") from error
    except PictureError as error:
        raise InputError(f"{subject} {error}; replace it.") from error


def read_picture(source: Path | BytesIO) -> Image.Image:
    """The first frame in RGB, turned as its EXIF data say, 16-bit grey scaled to 8. Raises PictureError, FileNotFoundError."""
    if isinstance(source, Path) and source.exists() and not source.is_file():  # a pipe would be waited for, for ever
        raise PictureError("is no regular file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow itself refuses only twice the limit
            with Image.open(source, formats=FORMATS) as image:
                if 0 in image.size:
                    raise PictureError("has no pixels")
                return _rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(f"has more than {Image.MAX_IMAGE_PIXELS} pixels") from error
    except (PictureError, FileNotFoundError):
        raise
    except _DAMAGED as error:
        raise PictureError(f"cannot be decoded ({type(error).__name__})") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":  # convert() would make black of 0 to 1, and white of all above 255
        raise PictureError("holds fractions, of which it does not say what is white")
    if image.mode == "I" or image.mode.startswith("I;16"):  # convert() would clip all above 255 to white
        low, high = (int(found) for found in image.convert("I").getextrema())  # type: ignore[arg-type]
        if not 0 <= low <= high <= WHITE:  # of 32 bits
            raise PictureError(f"holds numbers from {low} to {high}, expected 0 to {WHITE}")
        return image.convert("I").point(lambda value: value * (1 / 257)).convert("L").convert("RGB")
    if image.mode == "P":  # with transparency in bytes, Pillow warns of the direct way
        image = image.convert("RGBA")
    return image.convert("RGB")


def path_as_text(value: object) -> object:
    """For models of rows, before the value is taken for a path. Raises ValueError."""
    if isinstance(value, bool | int | float | list | dict):
        raise ValueError("must be a path, as text")
    return value


def picture_below(folder: Path, path: Path) -> Path:
    """`path` below `folder`, links followed. Raises PictureError."""
    try:
        image = (folder / path).resolve()
        inside, exists = image.is_relative_to(folder.resolve()), image.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, a loop of links
        raise PictureError("the image is no usable path; correct the path") from error
    if not inside:
        raise PictureError(f"the image lies outside {folder}; use paths below the file's folder")
    if not exists:
        raise PictureError(f"there is no image {image}; correct the path")
    return image
