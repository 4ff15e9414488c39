"""What works in which family: one list for `recipes`, its JSON and the table in the README."""

from __future__ import annotations

from typing import TypedDict, get_args

from exporter.models.recipe import Recipe, Reference, load_recipe, recipe_names

#: Models of the paper without a recipe, by model_type or name, and why.
REFUSED = {
    "qwen": "the original Qwen-VL is code of its own repository, which pins transformers 4.32 and imports classes that "
    "transformers 5 no longer has; take Qwen2-VL or a successor",
    "share4v": "ShareGPT4V as published is code for LLaVA's first repository; convert it to LLaVA's transformers layout",
    "minigpt4": "MiniGPT-4 is no transformers checkpoint but a research code base with weights in pickle files",
}


class Row(TypedDict):
    """A recipe, in the order of the command's JSON."""

    name: str
    family: str
    models: list[str]
    references: list[str]
    onnx: bool
    notes: list[str]


def supported() -> list[Row]:
    """One per recipe but the demo's."""
    return [_row(name, load_recipe(name)) for name in recipe_names() if name != "demo"]


def _row(name: str, recipe: Recipe) -> Row:
    return {
        "name": name,
        "family": recipe.family,
        "models": list(recipe.models),
        "references": list(get_args(Reference)),
        "onnx": recipe.onnx,
        "notes": list(recipe.notes),
    }


def markdown() -> str:
    """The table of the README."""
    lines = ["| recipe | checkpoints it is written for | references | ONNX | to know |", "|---|---|---|---|---|"]
    for row in supported():
        onnx = "yes" if row["onnx"] else "no"
        cells = (f"`{row['name']}`", ", ".join(row["models"]), ", ".join(row["references"]), onnx, " ".join(row["notes"]))
        lines.append("| " + " | ".join(cells) + " |")
    refused = [f"- Not supported (`{name}`): {reason}." for name, reason in REFUSED.items()]
    return "\n".join([*lines, "", *refused])
