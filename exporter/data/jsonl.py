"""JSON Lines: one object a line, read strictly. Errors name the line and never show its texts, which may be requests."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from exporter.runtime.complaints import first_complaint
from exporter.runtime.reading import LINES_BYTES, UnreadableError, parse_json, read_bytes, text_of

Row = TypeVar("Row", bound=BaseModel)


class LineError(ValueError):
    """A line that is no row: where it stands, and what is wrong with it."""


@dataclass(frozen=True)
class Lines(Generic[Row]):
    """The rows of a file, each with its line number from 1, and the SHA-256 of its bytes."""

    rows: tuple[tuple[int, Row], ...]
    sha256: str


def read_jsonl(file: Path, row: type[Row]) -> Lines[Row]:
    """Empty lines count as lines, and are no rows. Raises NoFileError, UnreadableError, LineError."""
    data = read_bytes(file, LINES_BYTES)
    lines = text_of(data).split("\n")  # splitlines() would also break at U+2028, which JSON allows in strings
    rows = tuple((i, _row(line, row, f"{file}, line {i}")) for i, line in enumerate(lines, 1) if line.strip())
    return Lines(rows, hashlib.sha256(data).hexdigest())


def _row(line: str, row: type[Row], where: str) -> Row:
    try:
        found = row.model_validate_json(line)
        parse_json(line, unique=True)
    except UnreadableError as error:
        raise LineError(f"{where}: {error}") from error
    except ValidationError as error:
        key, message = first_complaint(error, "the line")
        raise LineError(f"{where}: {key}: {message}") from None  # it quotes the line
    return found
