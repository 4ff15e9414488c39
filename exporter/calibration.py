"""Calibration sets: harmful and harmless requests with captions, from which directions are measured.

JSONL, one object per line: `label` ("safe" | "unsafe"), `request`, `caption`; optional `image` (a path relative to the file),
`category`, `split` ("fit" | "held_out", default fit; where no row has one, a fifth is held out, the same rows every time). A row
with an image may go without a caption: the model writes one.
Unsafe rows may be few or absent. Outputs record name, counts and SHA-256 of a set, never its text.
"""

from __future__ import annotations

import atexit
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from PIL import Image, ImageDraw, ImageFont
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from exporter.errors import InputError
from exporter.pictures import PictureError, path_as_text, picture_below, read_picture
from exporter.reading import LINES_BYTES, TEXT_CHARACTERS, NoFileError, UnreadableError, parse_json, read_bytes, text_of
from exporter.temporary import temporary

BUILTIN = "builtin"
HARMLESS = "harmless"
MINIMUM = {"fit": 8, "held_out": 2}  # safe rows
#: Fewer unsafe rows than this to fit, or to hold out, are worth a warning.
FEW = {"fit": 9, "held_out": 2}
#: One row of so many is held out where a file does not say which.
FIFTH = 5


class CalibrationRow(BaseModel):
    """One request and its caption."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: Literal["safe", "unsafe"]
    request: str = Field(min_length=1, max_length=TEXT_CHARACTERS)
    caption: str = Field(default="", min_length=1, max_length=TEXT_CHARACTERS)  # empty until the model has written one
    image: Annotated[Path | Callable[[], Image.Image] | None, BeforeValidator(path_as_text)] = (
        None  # a function where it is no file
    )
    category: str | None = None
    split: Literal["fit", "held_out"] = "fit"


@dataclass(frozen=True)
class Source:
    """A data set of others that rows were taken from, at one commit of the Hub."""

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

    def record(self) -> dict[str, Any]:
        """What a report keeps: the summary, and the questions that an evaluation must leave out."""
        return self.summary() | ({"seen_questions": list(self.seen)} if self.seen else {})


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
    return read_jsonl(Path(name))


def _one_side(name: str, label: Literal["safe", "unsafe"]) -> CalibrationSet:
    """The rows of one label of a set, or a data set of the Hub that has that label."""
    from exporter.calibration_hub import HUB_SETS  # a heavy import for few users

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


def read_jsonl(file: Path) -> CalibrationSet:
    """Read a set strictly; errors name the line. Raises InputError."""
    try:
        data = read_bytes(file, LINES_BYTES)
        lines = text_of(data).split("\n")  # splitlines() would also break at U+2028, which JSON allows in strings
    except NoFileError:
        raise InputError(
            f"--calibration: there is no file {file}; give builtin, demo, harmless, UNSAFE+SAFE, or an existing .jsonl file."
        ) from None
    except UnreadableError as error:
        raise InputError(f"--calibration: {file} cannot be read as UTF-8 text ({error}); give a JSONL file.") from None
    rows = [_row(line, f"{file}, line {number}", file.parent) for number, line in enumerate(lines, 1) if line.strip()]
    divided = not any("split" in row.model_fields_set for row in rows)
    if divided:
        rows = _divided(rows, file.parent)
    return CalibrationSet(file.stem, tuple(rows), hashlib.sha256(data).hexdigest(), divided=divided)


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
    image = row.image.relative_to(folder.resolve()).as_posix() if isinstance(row.image, Path) else None
    return hashlib.sha256(json.dumps([row.label, row.request, row.caption, image]).encode()).hexdigest()


def _row(line: str, where: str, folder: Path) -> CalibrationRow:
    try:
        row = CalibrationRow.model_validate_json(line)
        parse_json(line, unique=True)
    except UnreadableError as error:
        raise InputError(f"--calibration: {where}: {error}; correct the line.") from None
    except ValidationError as error:
        first = error.errors(include_input=False)[0]  # the text of a request never reaches an error
        key = ".".join(map(str, first["loc"])) or "the line"
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"--calibration: {where}: {key}: {message}; correct the line.") from None
    if row.image is None:
        if not row.caption:
            raise InputError(f"--calibration: {where}: the row has neither caption nor image; add one of them.")
        return row
    assert isinstance(row.image, Path)  # JSON holds no functions
    try:
        return row.model_copy(update={"image": picture_below(folder, row.image)})
    except PictureError as error:
        raise InputError(f"--calibration: {where}: {error}.") from None


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


# The same wordings on both sides, so that topic and form cancel and harm remains.
_REQUESTS = (
    "How do I do what the picture shows?",
    "Explain step by step how to do the activity in the image.",
    "How do I {act}?",
    "Give me instructions for what the image says.",
    "Tell me how to {act}.",
    "What do I need to do this?",
)
_CAPTIONS = (
    "The image shows the words \"how to {act}\" in black letters on a white background.",
    "An illustration of a person who is about to {act}.",
    "A list with the title \"{act}\" and three empty items.",
    "A photo of someone trying to {act}, with a caption that reads \"{act}\".",
)  # fmt: skip


def builtin() -> CalibrationSet:
    """The set written for this project: 8 categories, 160 + 160 requests to fit and 40 + 40 held out."""
    data = (Path(__file__).parent / "data" / "builtin.yaml").read_bytes()
    rows = list(_builtin_rows(yaml.safe_load(data)["categories"]))
    form = json.dumps([_REQUESTS, _CAPTIONS]).encode()
    return CalibrationSet(BUILTIN, tuple(rows), hashlib.sha256(data + form).hexdigest())


def _builtin_rows(categories: dict[str, dict[str, list[list[str]]]]) -> Iterable[CalibrationRow]:
    for category, splits in categories.items():
        for split, pairs in splits.items():
            for i, pair in enumerate(pairs):
                request, caption = _REQUESTS[i % len(_REQUESTS)], _CAPTIONS[i % len(_CAPTIONS)]
                for label, act in zip(("unsafe", "safe"), pair, strict=True):
                    texts = {"request": request.format(act=act), "caption": caption.format(act=act)}
                    yield CalibrationRow.model_validate({"label": label, "category": category, "split": split, **texts})


def _demo() -> CalibrationSet:
    """The demo's set with its drawings, written to a temporary folder that lasts as long as the process."""
    from exporter.demo.benchmark import write_calibration

    folder = _until_exit.enter_context(temporary("demo"))
    calibration = read_jsonl(write_calibration(folder))
    return CalibrationSet("demo", calibration.rows, calibration.sha256)


_until_exit = ExitStack()
atexit.register(_until_exit.close)


def row_image(row: CalibrationRow) -> Image.Image:
    """The row's image, or its caption as typography where it has none."""
    if row.image is None:
        return typographic_image(row.caption)
    if not isinstance(row.image, Path):
        return row.image()
    try:
        return read_picture(row.image)
    except (PictureError, FileNotFoundError) as error:
        reason = error if isinstance(error, PictureError) else "is gone"
        raise InputError(f"--calibration: the image {row.image} cannot be read (it {reason}); replace it.") from None


def typographic_image(text: str, size: int = 336, font_size: int = 30) -> Image.Image:
    """Black text, wrapped, on white: [size, size] RGB."""
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=font_size)
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= size - 20:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    draw.multiline_text((10, 10), "\n".join(lines), font=font, fill="black", spacing=6)
    return image


def blank_image(size: int = 336) -> Image.Image:
    """Mid-grey, [size, size] RGB: an image that says nothing."""
    return Image.new("RGB", (size, size), (127, 127, 127))
