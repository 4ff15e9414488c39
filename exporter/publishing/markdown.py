"""Markdown of values that come from outside: in what is written here they are text, and nothing else."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence

# what separates lines, or turns the direction of writing
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]+")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells that are Markdown already."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def escaped(value: object) -> str:
    """Text in which nothing is read as Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", html.escape(plain(value), quote=False))


def code(value: object) -> str:
    """A code span."""
    text = plain(value)
    if text and not set(text) & set("`|"):
        return f"`{text}`"
    return f"<code>{escaped(text)}</code>"  # backslashes do not work in a span of backticks


def python_string(value: object) -> str:
    """A string literal, also of Python, on one line."""
    return json.dumps(plain(value), ensure_ascii=False)


def measured(value: float | None, digits: int) -> str:
    return "not measured" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def plain(value: object) -> str:
    """One line, without control characters."""
    return CONTROLS.sub(" ", str(value)).strip()
