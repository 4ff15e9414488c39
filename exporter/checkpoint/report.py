"""shiftdc_report.json, read and checked in what is relied on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from exporter.checkpoint.layout import REPORT
from exporter.directions.statistics import LayerStatistics
from exporter.errors import InputError
from exporter.modeling.configuration_shiftdc import FORMAT_VERSION
from exporter.models.recipe import Recipe
from exporter.runtime.reading import UnreadableError, read_json

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ShardName = Annotated[str, Field(pattern=r"^[\w-][\w.-]*\.safetensors$")]
Name = Annotated[str, Field(min_length=1, max_length=1024)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _BaseModel(_Part):
    id: Name
    revision: Name | None
    architecture: Name
    shards: Annotated[dict[ShardName, Sha256], Field(min_length=1)]


class _Layers(_Part):
    chosen: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    depth: int
    criterion: str


class _Prompts(_Part):
    compared: int
    different: int


class _Report(_Part):
    """What is relied on of a report; more may stand in it."""

    base_model: _BaseModel
    layers: _Layers
    recipe: dict[str, Any]
    calibration: dict[str, Any]
    prompts: _Prompts
    statistics: list[dict[str, Any]]
    versions: dict[str, str]
    files: dict[str, Sha256]
    evaluation: dict[str, Any] | None = None


def require_format(folder: Path) -> None:
    """Raise InputError for an export of another format than this package's, whose code is not the one that lies in it."""
    try:
        config = read_json(folder / "config.json")
    except UnreadableError:
        return  # whoever reads more of it says so
    settings = config.get("shiftdc") if isinstance(config, dict) else None
    found = settings.get("version") if isinstance(settings, dict) else None
    if isinstance(found, int) and found != FORMAT_VERSION:
        raise InputError(
            f"CHECKPOINT: {folder} is of format version {found}, expected {FORMAT_VERSION}: export the checkpoint again; with "
            "transformers alone it goes on with the code that it carries."
        )


def read_report(folder: Path) -> dict[str, Any]:
    """shiftdc_report.json, checked in what is relied on. Raises InputError."""
    try:
        report = read_json(folder / REPORT)
        _Report.model_validate(report)
        Recipe.model_validate(report["recipe"])
        TypeAdapter(list[LayerStatistics]).validate_python(report["statistics"])
    except UnreadableError as error:
        raise InputError(
            f"CHECKPOINT: {folder} has no readable {REPORT} ({error}); give a folder that shiftdc-export wrote."
        ) from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(f"CHECKPOINT: {folder / REPORT}: {key:.200}: {first['msg']}; export again.") from None
    return report
