"""What a report keeps of a calibration set: counts, hashes and sources, never its texts."""

from __future__ import annotations

from typing import Annotated

from exporter.data.calibration import CalibrationSet, Source
from exporter.runtime.record import AsList, InFull, Record, Texts


class CalibrationRecord(Record):
    """`seen_questions`: hashes of benchmark questions that an evaluation must leave out (`calibration_hub.unseen`)."""

    name: str
    sha256: str
    images: bool = False
    fit_safe: int
    fit_unsafe: int
    held_out_safe: int
    held_out_unsafe: int
    captions_by_the_model: int = 0
    sources: Annotated[tuple[Source, ...], AsList, InFull] = ()
    warnings: Texts = ()
    seen_questions: Texts = ()

    @classmethod
    def of(cls, calibration: CalibrationSet) -> CalibrationRecord:
        """Written are the keys of the summary, and the questions where there are any."""
        seen = {"seen_questions": calibration.seen} if calibration.seen else {}
        return cls.model_validate({**calibration.summary(), **seen})
