"""Calibration sets: harmful and harmless requests with captions, from which directions are measured.

JSONL, one object per line: `label` ("safe" | "unsafe"), `request`, `caption`; optional `image` (a path relative to the file),
`category`, `split` ("fit" | "held_out", default fit; where no row has one, a fifth is held out, the same rows every time). A row
with an image may go without a caption: the model writes one.
Unsafe rows may be few or absent. Outputs record name, counts and SHA-256 of a set, never its text.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, InstanceOf

from exporter.data.pictures import Picture, path_as_text
from exporter.runtime.reading import TEXT_CHARACTERS
from exporter.runtime.record import KEEPS_UNKNOWN

MINIMUM = {"fit": 8, "held_out": 2}  # safe rows

#: Fewer unsafe rows than this to fit, or to hold out, are worth a warning.
FEW = {"fit": 9, "held_out": 2}


class _Texts(BaseModel):
    """One request and its caption."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: Literal["safe", "unsafe"]
    request: str = Field(min_length=1, max_length=TEXT_CHARACTERS)
    caption: str = Field(default="", min_length=1, max_length=TEXT_CHARACTERS)  # empty until the model has written one
    category: str | None = None
    split: Literal["fit", "held_out"] = "fit"


class CalibrationLine(_Texts):
    """One line of a file, in which a picture is a path."""

    image: Annotated[Path | None, BeforeValidator(path_as_text)] = None


class CalibrationRow(_Texts):
    """One request, its caption and its picture; without one the caption is shown as typography."""

    image: InstanceOf[Picture] | None = None

    @classmethod
    def of(cls, line: CalibrationLine, image: Picture | None) -> CalibrationRow:
        return cls(**line.model_dump(exclude={"image"}, exclude_unset=True), image=image)


@dataclass(frozen=True)
class Source:
    """A data set of others that rows were taken from, at one commit of the Hub."""

    __pydantic_config__ = KEEPS_UNKNOWN

    dataset: str
    revision: str
    licence: str


@dataclass(frozen=True)
class CalibrationSet:
    """A named set of rows; `sha256` is over the source's bytes.

    `seen`: hashes of the benchmark questions among the rows, which an evaluation leaves out (`calibration_hub.unseen`).
    `divided`: the file names no splits, and some rows were held out here.
    """

    name: str
    rows: tuple[CalibrationRow, ...]
    sha256: str
    sources: tuple[Source, ...] = ()
    seen: tuple[str, ...] = ()
    divided: bool = False

    def select(self, split: str, label: str | None = None) -> list[CalibrationRow]:
        return [r for r in self.rows if r.split == split and label in (None, r.label)]

    @property
    def has_images(self) -> bool:
        return all(r.image is not None for r in self.select("fit"))

    @property
    def uncaptioned(self) -> list[CalibrationRow]:
        return [r for r in self.rows if not r.caption]

    def labelled(self, label: str) -> CalibrationSet:
        """The rows of one label."""
        return replace(self, rows=tuple(r for r in self.rows if r.label == label))

    @property
    def warnings(self) -> list[str]:
        """What a reader of figures should know: sentences on rows that were held out here, and on missing and few unsafe ones."""
        fit, held_out = (len(self.select(split, "unsafe")) for split in ("fit", "held_out"))
        found = []
        if self.divided:
            safe = len(self.select("held_out", "safe"))
            found.append(
                f"The rows name no splits, so a fifth was held out ({safe} safe and {held_out} unsafe ones), the same every time."
            )
        if not fit:
            return [
                *found,
                "No harmful request was used: it is not known how well the directions separate safe from unsafe text, "
                "and whether the model refuses at all.",
            ]
        if fit < FEW["fit"]:
            found.append(f"Directions rest on {fit} harmful request{'s' if fit > 1 else ''} only.")
        if not held_out:
            found.append("No harmful request was held out, so AUROC and separation are not known.")
        elif held_out < FEW["held_out"]:
            found.append("One harmful request was held out, so AUROC says little and separation is not known.")
        return found

    def summary(self) -> dict[str, Any]:
        """What may be published of the set."""
        counts = Counter(f"{r.split}_{r.label}" for r in self.rows)
        found = {f"{split}_{label}": counts[f"{split}_{label}"] for split in MINIMUM for label in ("safe", "unsafe")}
        optional = {
            "captions_by_the_model": len(self.uncaptioned),
            "sources": [asdict(s) for s in self.sources],
            "warnings": self.warnings,
        }
        given = {k: v for k, v in optional.items() if v}
        return {"name": self.name, "sha256": self.sha256, "images": self.has_images, **found, **given}
