"""A benchmark of the user's own: a JSONL file with one question per line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from exporter.data.cells import ATTACKS, Cell, Kind
from exporter.data.jsonl import LineError, read_jsonl
from exporter.data.pictures import PictureError, PictureFile, path_as_text, picture_below
from exporter.data.questions import Benchmark, Question
from exporter.errors import InputError
from exporter.runtime.reading import TEXT_CHARACTERS, NoFileError, UnreadableError


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


def read_benchmark(file: Path) -> Benchmark:
    """Read a benchmark strictly; errors name the line and never show its texts. Raises InputError."""
    try:
        lines = read_jsonl(file, _Row)
    except NoFileError as error:
        raise InputError(f"--benchmark: there is no file {file}; correct the path.") from error
    except UnreadableError as error:
        raise InputError(f"--benchmark: {file} cannot be read as UTF-8 text ({error}); give a JSONL file.") from error
    except LineError as error:
        raise InputError(f"--benchmark: {error}; correct the line.") from error
    questions = tuple(_question(row, file, number) for number, row in lines.rows)
    if not questions:
        raise InputError(f"--benchmark: {file} holds no questions; give a file with one JSON object per line.")
    return Benchmark(file.stem, questions, f"{file.name}, SHA-256 {lines.sha256}")


def _question(row: _Row, file: Path, number: int) -> Question:
    where = f"{file}, line {number}"
    image = PictureFile(_below(file.parent, row.image, where), f"--benchmark: {where}: the image")
    name = f"{file.stem}-{number:05d}"
    return Question(name, row.prompt, row.kind, row.where, row.category, row.image_kind, row.answer, image)


def _below(folder: Path, path: Path, where: str) -> Path:
    try:
        return picture_below(folder, path)
    except PictureError as error:
        raise InputError(f"--benchmark: {where}: {error}.") from error
