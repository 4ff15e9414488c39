"""Recipes: what differs between model families, and the defaults of an export. Strict and frozen."""

from __future__ import annotations

import re
import reprlib
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from exporter.errors import InputError
from exporter.runtime.complaints import first_complaint
from exporter.runtime.reading import RECIPE_BYTES, NoFileError, UnreadableError, parse_yaml, read_bytes, text_of
from exporter.runtime.resources import resource

Reference = Literal["caption", "text", "blank", "static"]
Rule = Literal["sequential", "precomputed"]
Gate = Literal["one-sided", "two-sided"]
CaptionStyle = Literal["request", "describe", "naming"]
Strength = Annotated[float, Field(ge=0, le=4, allow_inf_nan=False)]


def _one_slot(*slots: str) -> AfterValidator:
    def check(text: str) -> str:
        positions = [text.find(s) for s in slots]
        if any(text.count(s) != 1 for s in slots) or positions != sorted(positions):
            raise ValueError(f"must hold {' and then '.join(slots)}, each once")
        return text

    return AfterValidator(check)


def _at_most_one_request(text: str) -> str:
    if not text or text.count("{request}") > 1:
        raise ValueError("must hold {request} once, or not at all for captions that serve every question")
    return text


def _layers(value: str) -> str:
    if value != "auto":
        parse_layers(value)
    return value


def parse_layers(text: str) -> range:
    """`"A-B"` (both ends included, from 0) or `"A"` as a range. Raises ValueError."""
    first, _, last = text.partition("-")
    if not re.fullmatch(r"[0-9]{1,4}(-[0-9]{1,4})?", text):
        raise ValueError("expected auto, A or A-B (decoder layers from 0, both ends included)")
    layers = range(int(first), int(last or first) + 1)
    if not layers:
        raise ValueError("expected A-B with A at most B")
    return layers


class Wording(BaseModel):
    """Wording of the two extra prompts of the method."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    caption: Annotated[str, AfterValidator(_at_most_one_request)] = Field(
        description="asks the model for a caption, in view of a request where it has the slot {request}"
    )
    text_counterpart: Annotated[str, _one_slot("{request}", "{caption}")] = Field(
        description="the request with the caption in place of the image"
    )

    describe: str = Field(
        default="Describe the image.", min_length=1, description="asks for a caption that serves every question"
    )
    naming: str = Field(default="What is this?", min_length=1, description="asks for the name of what the image shows")

    def caption_request(self, request: str) -> str:
        return self.caption.replace("{request}", request)

    def counterpart(self, request: str, caption: str) -> str:
        before, rest = self.text_counterpart.split("{request}")
        between, after = rest.split("{caption}")
        return before + request + between + caption + after


#: arXiv:2502.13095, section 4 and the authors' code.
PAPER = Wording(
    caption="Based on the given Request, describe the image. Request: {request}",
    text_counterpart="{request} Image Caption: {caption}",
)


class Recipe(BaseModel):
    """One YAML file of `recipes/`; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: str = Field(pattern=r"^[a-z0-9._-]+$", description="transformers model_type")
    models: tuple[str, ...] = Field(description="checkpoints that the recipe is written for")
    chat_template: str | None = Field(None, description="Jinja template for families whose checkpoints have none")
    prompts: Wording = Field(PAPER, description="wording of the method's two extra prompts")
    calibration: str = Field("builtin", description="builtin, demo, harmless, UNSAFE+SAFE, or a JSONL file")
    benchmark: str = Field("mm-safetybench", description="what --evaluate runs")
    layers: Annotated[str, AfterValidator(_layers)] = Field("auto", description="auto, or A-B: from 0, both ends included")
    reference: Reference = Field("caption", description="where the target coordinate comes from")
    rule: Rule = Field("sequential", description="sequential: from running activations; precomputed: from clean passes")
    gate: Gate = Field("one-sided", description="one-sided: never move an input toward safe; two-sided: the paper")
    strength: Strength | Literal["auto"] = Field(1.0, description="share of the shift that is taken out; auto: by a sweep")
    caption_max_new_tokens: int = Field(128, ge=1, le=1024, description="longest caption that generate() writes")
    caption_style: CaptionStyle = Field("request", description="which of the prompts asks for the caption")
    naming_max_new_tokens: int = Field(3, ge=1, le=1024, description="longest caption of style naming")
    onnx: bool = Field(False, description="whether --onnx writes graphs for the family")
    notes: tuple[str, ...] = Field((), description="what does not work, or works in another way, and why")

    @property
    def wording(self) -> Wording:
        """The prompts, with that of the caption style as `caption`."""
        if self.caption_style == "request":
            return self.prompts
        return self.prompts.model_copy(update={"caption": getattr(self.prompts, self.caption_style)})

    @property
    def caption_tokens(self) -> int:
        """Longest caption."""
        return self.naming_max_new_tokens if self.caption_style == "naming" else self.caption_max_new_tokens

    def as_yaml(self) -> str:
        """Every field, with defaults filled in."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120).rstrip()

    def with_overrides(self, **options: object) -> Recipe:
        """The recipe with the command line's values, where they are given. Raises InputError."""
        given = {k: v for k, v in options.items() if v is not None}
        return _validated({**self.model_dump(), **given}, "the command line")


def _validated(values: object, where: str) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        key, message = first_complaint(error, below=Wording.model_fields)
        found = reprlib.repr(error.errors()[0]["input"])  # it may be as long as the file
        raise InputError(f"Recipe: {key} in {where} is wrong: {message}, found {found}; correct it.") from error


def load_recipe(name_or_file: str) -> Recipe:
    """A recipe by name (`shiftdc-export recipes` lists them) or from a YAML file. Raises InputError."""
    file = Path(name_or_file)
    if file.suffix not in {".yaml", ".yml"}:
        if name_or_file not in recipe_names():
            raise InputError(
                f"Recipe: there is none named {name_or_file!r}, expected one of {', '.join(recipe_names())} or a .yaml file."
            )
        file = resource("recipes") / f"{name_or_file}.yaml"
    try:
        values = parse_yaml(text_of(read_bytes(file, RECIPE_BYTES)))
    except NoFileError as error:
        raise InputError(f"Recipe: there is no file {file}; give a name or an existing .yaml file.") from error
    except UnreadableError as error:
        raise InputError(f"Recipe: {file} cannot be read as YAML ({error}); correct the file.") from error
    return _validated(values, str(file))


def recipe_names() -> list[str]:
    return sorted(file.stem for file in resource("recipes").glob("*.yaml"))


def recipe_for_family(model_type: str) -> str | None:
    """Name of the recipe for a transformers model_type; None if there is none."""
    return next((n for n in recipe_names() if n != "demo" and load_recipe(n).family == model_type), None)
