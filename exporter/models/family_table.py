"""What works in which family: one list for `recipes`, its JSON and its table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

from exporter.models.recipe import Recipe, load_recipe, recipe_names
from exporter.models.refused import REFUSED
from exporter.runtime.reading import Json


@dataclass(frozen=True)
class Row:
    """A recipe, in the order of the command's JSON."""

    name: str
    family: str
    models: tuple[str, ...]
    onnx: bool
    notes: tuple[str, ...]


def supported() -> list[Row]:
    """One per recipe but the demo's."""
    return [_row(name, load_recipe(name)) for name in recipe_names() if name != "demo"]


def _row(name: str, recipe: Recipe) -> Row:
    return Row(name, recipe.family, recipe.models, recipe.onnx, recipe.notes)


def image_text_types() -> dict[str, str]:
    """The classes that the installed transformers lists for image-text-to-text, by model_type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    return dict(NAMES)


@dataclass(frozen=True)
class FamilyTable:
    """The types of a transformers version: supported, refused, or neither.

    types: class by model_type, as transformers lists them for image-text-to-text. refused: reason by model_type or name.
    """

    transformers: str
    types: Mapping[str, str]
    supported: tuple[Row, ...]
    refused: Mapping[str, str]

    @classmethod
    def of_installed(cls) -> FamilyTable:
        import transformers

        return cls(transformers.__version__, image_text_types(), tuple(supported()), REFUSED)

    @cached_property
    def untried(self) -> tuple[str, ...]:
        """Types that are neither supported nor refused: new in transformers."""
        known = {row.family for row in self.supported} | self.refused.keys()
        return tuple(sorted(self.types.keys() - known))

    @property
    def count(self) -> int:
        """How many of the types are supported."""
        return len(self.types.keys() & {row.family for row in self.supported})

    def count_line(self) -> str:
        new = f" New, and untried: {', '.join(self.untried)}." if self.untried else ""
        return f"{self.count} of {len(self.types)} image-text-to-text types of transformers {self.transformers} supported.{new}"

    def as_json(self) -> dict[str, Json]:
        return {
            "transformers": self.transformers,
            "types": len(self.types),
            "supported_types": self.count,
            "supported": [{**asdict(row), "models": list(row.models), "notes": list(row.notes)} for row in self.supported],
            "refused": dict(self.refused),
            "untried": list(self.untried),
        }

    def text(self) -> str:
        rows = [f"{row.name:24} {', '.join(row.models)}" for row in self.supported]
        refused = [f"{name:24} refused: {reason}" for name, reason in self.refused.items()]
        return "\n".join([self.count_line(), *rows, *refused])

    def markdown(self) -> str:
        rows = [
            f"| `{r.name}` | {', '.join(r.models)} | {'yes' if r.onnx else 'no'} | {' '.join(r.notes)} |" for r in self.supported
        ]
        head = ["| recipe | checkpoints it is written for | ONNX | to know |", "|---|---|---|---|"]
        refused = [f"- Refused (`{name}`): {reason}." for name, reason in self.refused.items()]
        return "\n".join([self.count_line(), "", *head, *rows, "", *refused])
