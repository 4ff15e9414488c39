"""A benchmark of the user's own: a JSONL file with one question per line."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from exporter.data.cells import ATTACKS, Cell, Kind
from exporter.data.pictures import PictureError, path_as_text, picture_below
from exporter.data.questions import Benchmark, Question, picture_of
from exporter.errors import InputError
from exporter.runtime.reading import LINES_BYTES, TEXT_CHARACTERS, NoFileError, UnreadableError, parse_json, read_bytes, text_of


class _Row(BaseModel):
    """One line of a FILE.jsonl."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: Annotated[Path, BeforeValidator(path_as_text)]
    prompt: str = Field(min_length=1, max_length=TEXT_CHARACTERS)
    kind: Kind
    category: str | None = None
    image_kind: str | None = None
    answer: str | None = None
    cell: Cell | None = None

    @model_validator(mode="after")
    def _consistent(self) -> _Row:
        if self.cell is not None and (self.cell in ATTACKS) != (self.kind == "harmful"):
            raise ValueError(f"the cell {self.cell} does not go with the kind {self.kind}")
        return self

    @property
    def where(self) -> Cell:
        return self.cell or ("harmful_image" if self.kind == "harmful" else "harmless_image")


def read_jsonl(file: Path) -> Benchmark:
    """Read a benchmark strictly; errors name the line and never show its texts. Raises InputError."""
    try:
        data = read_bytes(file, LINES_BYTES)
        lines = text_of(data).split("\n")  # splitlines() would also break at U+2028, which JSON allows in strings
    except NoFileError:
        raise InputError(f"--benchmark: there is no file {file}; correct the path.") from None
    except UnreadableError as error:
        raise InputError(f"--benchmark: {file} cannot be read as UTF-8 text ({error}); give a JSONL file.") from None
    questions = tuple(_question(line, file, number) for number, line in enumerate(lines, 1) if line.strip())
    if not questions:
        raise InputError(f"--benchmark: {file} holds no questions; give a file with one JSON object per line.")
    return Benchmark(file.stem, questions, f"{file.name}, SHA-256 {hashlib.sha256(data).hexdigest()}")


def _question(line: str, file: Path, number: int) -> Question:
    where = f"{file}, line {number}"
    try:
        row = _Row.model_validate_json(line)
        parse_json(line, unique=True)
    except UnreadableError as error:
        raise InputError(f"--benchmark: {where}: {error}; correct the line.") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the line"
        raise InputError(
            f"--benchmark: {where}: {key}: {first['msg'].removeprefix('Value error, ')}; correct the line."
        ) from None
    image = partial(picture_of, _below(file.parent, row.image, where), where)
    name = f"{file.stem}-{number:05d}"
    return Question(name, row.prompt, row.kind, row.where, row.category, row.image_kind, row.answer, image)


def _below(folder: Path, path: Path, where: str) -> Path:
    try:
        return picture_below(folder, path)
    except PictureError as error:
        raise InputError(f"--benchmark: {where}: {error}.") from None
