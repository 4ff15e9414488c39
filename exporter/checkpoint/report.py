"""shiftdc_report.json as one frozen value: parsed once, checked in what is relied on, written as it was read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, PrivateAttr, ValidationError

from exporter.checkpoint.layout import REPORT
from exporter.data.calibration_record import CalibrationRecord
from exporter.directions.directions import DIFFERENCE
from exporter.directions.statistics import LayerStatistics
from exporter.errors import InputError
from exporter.modeling.configuration_shiftdc import FORMAT_VERSION
from exporter.models.recipe import Recipe
from exporter.runtime.complaints import first_complaint
from exporter.runtime.reading import UnreadableError, read_json
from exporter.runtime.record import AsList, InFull, Record, Texts

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ShardName = Annotated[str, Field(pattern=r"^[\w-][\w.-]*\.safetensors$")]
Name = Annotated[str, Field(min_length=1, max_length=1024)]
#: How far a loaded export is from its probe, by what was compared; of some only whether it is equal.
Parity = dict[str, float | bool]


class BaseRecord(Record):
    """The base model: SHA-256 of its shards by name, and their bytes by the way in which they got into the export."""

    id: Name
    revision: Name | None
    architecture: Name
    shards: Annotated[dict[ShardName, Sha256], Field(min_length=1)]
    placed: dict[str, int] = Field({})


class AdapterRecord(Record):
    """The LoRA adapter, and whether it was merged into the weights."""

    id: Name
    revision: Name | None
    sha256: Sha256
    merged: bool


class PromptsRecord(Record):
    """How many composed prompts were compared with the chat template's own, and how many differ."""

    compared: int
    different: int


class LayersRecord(Record):
    """The layers that are calibrated, and one sentence for each layer that was left out."""

    chosen: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AsList]
    depth: int
    criterion: str
    left_out: dict[str, str] = Field({})


class OnnxRecord(Record):
    """The ONNX graphs: packages, and what was measured of each precision."""

    versions: dict[str, str]
    variants: dict[str, dict[str, object]]


class Report(Record):
    """What an export consists of and how it was made. Written are the keys that are set, and no others."""

    base_model: BaseRecord
    adapter: AdapterRecord | None = None
    recipe: Recipe
    calibration: CalibrationRecord
    prompts: PromptsRecord
    directions: str = DIFFERENCE
    layers: LayersRecord
    statistics: Annotated[tuple[LayerStatistics, ...], AsList, InFull]
    sweep: dict[str, object] | None = None
    versions: dict[str, str]
    device: str | None = None
    dtype: str | None = None
    measured_quantised: int | None = None  # bits; the exported weights are never quantised
    warnings: Texts = ()  # what transformers said of the base's files
    resumed_batches: int = 0
    files: dict[str, Sha256]
    parity: Parity | None = None
    seconds: dict[str, float] | None = None
    evaluation: dict[str, object] | None = None
    onnx: OnnxRecord | None = None

    #: Keys in the order in which they were read.
    _read: tuple[str, ...] = PrivateAttr(())

    @classmethod
    def parse(cls, document: object) -> Report:
        """Raises ValidationError."""
        report = cls.model_validate(document)
        report._read = tuple(document) if isinstance(document, Mapping) else ()
        return report

    def document(self) -> dict[str, object]:
        """As it is written: what was read in its order, what is new in the order of this class."""
        values = self.model_dump(exclude_unset=True)
        return {key: values[key] for key in dict.fromkeys((*self._read, *values))}

    def text(self) -> str:
        return json.dumps(self.document(), indent=2) + "\n"


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


def read_report(folder: Path) -> Report:
    """The report of an export. Raises InputError."""
    try:
        return Report.parse(read_json(folder / REPORT))
    except UnreadableError as error:
        raise InputError(
            f"CHECKPOINT: {folder} has no readable {REPORT} ({error}); give a folder that shiftdc-export wrote."
        ) from error
    except ValidationError as error:
        key, message = first_complaint(error)
        raise InputError(f"CHECKPOINT: {folder / REPORT}: {key}: {message}; export again.") from error


def write_report(folder: Path, report: Report) -> None:
    (folder / REPORT).write_text(report.text(), "utf-8")
