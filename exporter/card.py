"""The model card: what was done, what it does, and how to load it, from MODEL_CARD_TEMPLATE.md."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from exporter.directions import LayerStatistics
from exporter.recipes import Recipe
from exporter.resources import resource
from exporter.source import DEMO, BaseCheckpoint

REFERENCE_TEXT = {
    "caption": "the coordinate of the same request with the model's own caption in place of the image",
    "text": "the coordinate of the request alone, without image or caption",
    "blank": "the coordinate of the same prompt with a neutral image",
    "static": "the mean shift of the calibration set, baked in",
}
COST_TEXT = {
    "caption": "For a prompt with an image, `generate()` writes a caption of at most {tokens} tokens first and reads one "
    "text-only prompt, then answers. Give `shiftdc_captions=` or `shiftdc_reference=` to reuse them.",
    "text": "For a prompt with an image, `generate()` reads one text-only prompt first.",
    "blank": "For a prompt with an image, `generate()` reads the prompt once more, with a neutral image.",
    "static": "None to speak of: one projection per calibrated layer.",
}


def render_card(
    base: BaseCheckpoint, recipe: Recipe, report: dict[str, Any], statistics: tuple[LayerStatistics, ...], repo: str
) -> str:
    """The README.md of an export."""
    chosen = [s for s in statistics if s.layer in report["layers"]["chosen"]]
    mean = {k: sum(getattr(s, k) for s in chosen) / len(chosen) for k in ("auroc", "split_half_cosine", "shift_cosine")}
    loader = FileSystemLoader(resource("MODEL_CARD_TEMPLATE.md").parent)
    # autoescape is for HTML; the card is Markdown, and its values are checked names and numbers
    environment = Environment(loader=loader, undefined=StrictUndefined, autoescape=False)  # noqa: S701
    template = environment.get_template("MODEL_CARD_TEMPLATE.md")
    return template.render(
        base=base,
        hub_base=base.revision is not None and base.name != DEMO,
        recipe=recipe,
        repo=repo,
        layers=report["layers"]["chosen"],
        depth=report["layers"]["depth"],
        layer_reason=report["layers"]["criterion"],
        calibration=report["calibration"],
        mean=mean,
        evaluation=report.get("evaluation"),
        evaluation_rows="",
        reference_text=REFERENCE_TEXT[recipe.reference],
        cost_text=COST_TEXT[recipe.reference].format(tokens=recipe.caption_max_new_tokens),
        version=report["versions"]["shiftdc-export"],
    )
