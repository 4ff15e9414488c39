"""Calibration sets by name, or from a JSONL file, or one of the Hub beside another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from exporter.data.builtin import BUILTIN, builtin
from exporter.data.calibration import MINIMUM, CalibrationLine, CalibrationRow, CalibrationSet
from exporter.data.jsonl import LineError, read_jsonl
from exporter.data.pictures import PictureError, PictureFile, picture_below
from exporter.errors import InputError
from exporter.runtime.reading import NoFileError, UnreadableError

HARMLESS = "harmless"

#: One row of so many is held out where a file does not say which.
FIFTH = 5


def load_calibration(name_or_file: str, own: str = BUILTIN) -> CalibrationSet:
    """`builtin`, `demo`, `harmless`, UNSAFE+SAFE, or a JSONL file; `harmless` is the safe rows of the set `own`.

    Raises InputError.
    """
    if name_or_file == HARMLESS:
        found = load_calibration(BUILTIN if own == HARMLESS else own).labelled("safe")
        return replace(found, name=f"{HARMLESS}, the safe rows of {found.name}", seen=())
    if Path(name_or_file).is_file() or "+" not in name_or_file:
        return _checked(_one_set(name_or_file), name_or_file)
    unsafe, _, safe = name_or_file.partition("+")
    if not (unsafe and safe):
        raise InputError(f"--calibration: {name_or_file} names one set, expected two, as UNSAFE+SAFE; name both.")
    return _checked(_joined(_one_side(unsafe, "unsafe"), _one_side(safe, "safe")), name_or_file)


def _one_set(name: str) -> CalibrationSet:
    if name == BUILTIN:
        return builtin()
    if name == "demo":
        return _demo()
    return read_calibration(Path(name))


def _one_side(name: str, label: Literal["safe", "unsafe"]) -> CalibrationSet:
    """The rows of one label of a set, or a data set of the Hub that has that label."""
    from exporter.data.calibration_hub import HUB_SETS

    if name not in HUB_SETS:
        return _one_set(name).labelled(label)
    if HUB_SETS[name].label != label:
        raise InputError(f"--calibration: {name} has {HUB_SETS[name].label} rows only; the form is UNSAFE+SAFE.")
    return HUB_SETS[name].load()


def _joined(one: CalibrationSet, other: CalibrationSet) -> CalibrationSet:
    both = hashlib.sha256(f"{one.sha256}+{other.sha256}".encode()).hexdigest()
    name = f"{one.name}+{other.name}"
    sources, seen, divided = one.sources + other.sources, one.seen + other.seen, one.divided or other.divided
    return CalibrationSet(name, one.rows + other.rows, both, sources, seen, divided)


def read_calibration(file: Path) -> CalibrationSet:
    """Read a set strictly; errors name the line. Raises InputError."""
    try:
        lines = read_jsonl(file, CalibrationLine)
    except NoFileError as error:
        raise InputError(
            f"--calibration: there is no file {file}; give builtin, demo, harmless, UNSAFE+SAFE, or an existing .jsonl file."
        ) from error
    except UnreadableError as error:
        raise InputError(f"--calibration: {file} cannot be read as UTF-8 text ({error}); give a JSONL file.") from error
    except LineError as error:
        raise InputError(f"--calibration: {error}; correct the line.") from error
    rows = [_row(row, f"{file}, line {number}", file.parent) for number, row in lines.rows]
    divided = not any("split" in row.model_fields_set for row in rows)
    if divided:
        rows = _divided(rows, file.parent)
    return CalibrationSet(file.stem, tuple(rows), lines.sha256, divided=divided)


def _divided(rows: Sequence[CalibrationRow], folder: Path) -> list[CalibrationRow]:
    """A fifth of either label held out: by hashes of rows, so that neither their order nor the folder's name matters, and equal
    rows stay together.
    """
    keys = [_hash(row, folder) for row in rows]
    held_out: set[str] = set()
    for label in ("safe", "unsafe"):
        own = sorted({key for row, key in zip(rows, keys, strict=True) if row.label == label})
        held_out |= set(own[: len(own) // FIFTH])
    return [
        row.model_copy(update={"split": "held_out" if key in held_out else "fit"}) for row, key in zip(rows, keys, strict=True)
    ]


def _hash(row: CalibrationRow, folder: Path) -> str:
    image = row.image.path.relative_to(folder.resolve()).as_posix() if isinstance(row.image, PictureFile) else None
    return hashlib.sha256(json.dumps([row.label, row.request, row.caption, image]).encode()).hexdigest()


def _row(line: CalibrationLine, where: str, folder: Path) -> CalibrationRow:
    if line.image is None and not line.caption:
        raise InputError(f"--calibration: {where}: the row has neither caption nor image; add one of them.")
    return CalibrationRow.of(line, None if line.image is None else _picture(folder, line.image, where))


def _picture(folder: Path, path: Path, where: str) -> PictureFile:
    try:
        image = picture_below(folder, path)
    except PictureError as error:
        raise InputError(f"--calibration: {where}: {error}.") from error
    return PictureFile(image, f"--calibration: the image {image}")


def _checked(calibration: CalibrationSet, where: str) -> CalibrationSet:
    """Safe rows must be enough; unsafe ones may be few or none (`warnings`), but not held out alone."""
    for split, least in MINIMUM.items():
        found = len(calibration.select(split, "safe"))
        if found < least and calibration.divided:
            safe, needed = len(_keys(calibration, "safe")), FIFTH * MINIMUM["held_out"]
            raise InputError(
                f"--calibration: {where} has {safe} safe rows that differ, expected at least {needed} where none has a split; "
                "add some."
            )
        if found < least:
            raise InputError(
                f"--calibration: {where} has {found} safe rows with split {split!r}, expected at least {least}; add some."
            )
    if calibration.select("held_out", "unsafe") and not calibration.select("fit", "unsafe"):
        raise InputError(f"--calibration: {where} has unsafe rows with split 'held_out' only; give some the split 'fit'.")
    both = _keys(calibration, "safe") & _keys(calibration, "unsafe")
    if both:
        number = next(i for i, r in enumerate(calibration.rows, 1) if _key(r) in both)
        raise InputError(
            f"--calibration: {where} has {len(both)} rows that are labelled both safe and unsafe, row {number} the first; "
            "correct the labels, the direction lies between the two."
        )
    return calibration


def _key(row: CalibrationRow) -> tuple[str, str, object]:
    return row.request, row.caption, row.image


def _keys(calibration: CalibrationSet, label: str) -> set[tuple[str, str, object]]:
    return {_key(r) for r in calibration.rows if r.label == label}


def _demo() -> CalibrationSet:
    """The demo's set, its pictures drawn when they are needed."""
    from exporter.data.demo.benchmark import calibration_rows, calibration_text

    return CalibrationSet("demo", tuple(calibration_rows()), hashlib.sha256(calibration_text().encode()).hexdigest())
