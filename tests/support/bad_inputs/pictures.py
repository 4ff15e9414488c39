"""Pictures, shown to `generate`."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image

from bad_inputs.lines import all_pictures
from bad_inputs.workshop import Case, Workshop


def saved(kind: str, size: tuple[int, int] = (64, 48), **options: Any) -> bytes:
    data = io.BytesIO()
    Image.effect_noise(size, 90).convert("RGB").save(data, kind, **options)
    return data.getvalue()


def png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def tiff(mode: str, white: int) -> bytes:
    """Half black, half `white`."""
    data = io.BytesIO()
    image = Image.new(mode, (64, 48))
    image.paste(white, (0, 0, 32, 48))
    image.save(data, "TIFF")
    return data.getvalue()


def shown(name: str, content: bytes | None) -> Callable[[Workshop], list[Any]]:
    def build(w: Workshop) -> list[Any]:
        if content is not None:
            w.file(name, content)
        return ask(w, name)

    return build


def ask(w: Workshop, name: object) -> list[Any]:
    return ["generate", w.whole_export, "--image", name, "--prompt", "What is it?"]


def folder(w: Workshop) -> list[Any]:
    (w.folder / "a.png").mkdir()
    return ask(w, "a.png")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(ran) (ran.txt) (w) file exch writestring\nshowpage\n%%EOF\n"
SENTENCE = ("--image: a.png cannot be read as a picture", "give a PNG or JPEG")

CASES = [
    Case("no picture", shown("a.png", None), ("--image: there is no file a.png", "give an existing picture")),
    Case("picture of no bytes", shown("a.png", b""), SENTENCE),
    Case("picture cut short", shown("a.png", saved("PNG")[:1500]), SENTENCE),
    Case("JPEG cut short", shown("a.png", saved("JPEG")[:700]), SENTENCE),
    Case("GIF cut short", shown("a.png", saved("GIF")[:400]), SENTENCE),
    Case("WebP cut short", shown("a.png", saved("WEBP")[:300]), SENTENCE),
    Case("TIFF cut short", shown("a.png", saved("TIFF")[:300]), SENTENCE),
    Case("picture of 0 x 0", shown("a.png", png(0, 0)), SENTENCE),
    Case("picture of 50,000 x 50,000", shown("a.png", png(50_000, 50_000)), (*SENTENCE, "pixels")),
    Case("picture of 10,000 x 10,000", shown("a.png", png(10_000, 10_000)), (*SENTENCE, "pixels")),
    *(
        Case(f"TIFF of fractions up to {white}", shown("a.png", tiff("F", white)), (*SENTENCE, "holds fractions", "white"))
        for white in (1, 255, 65_535)
    ),
    Case(
        "TIFF of 32 bits",
        shown("a.png", tiff("I", 10**9)),
        (*SENTENCE, "holds numbers from 0 to 1000000000, expected 0 to 65535"),
    ),
    Case("TIFF of numbers below 0", shown("a.png", tiff("I", -5)), (*SENTENCE, "holds numbers from -5 to 0")),
    Case("text for a picture", shown("a.png", b"a cake"), SENTENCE),
    Case("SVG for a picture", shown("a.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"), SENTENCE),
    Case("PostScript for a picture", shown("a.png", EPS), SENTENCE),
    Case(
        "fractions in a calibration set",
        all_pictures(tiff("F", 1)),
        ("--calibration: ", "a.png", "holds fractions", "replace it"),
    ),
    Case("folder for a picture", folder, SENTENCE),
    Case("pipe for a picture", lambda w: ask(w, w.pipe("a.png").name), (*SENTENCE, "no regular file")),
]
