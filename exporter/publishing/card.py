"""The model card: what was done, what it does, and how to load it, from MODEL_CARD_TEMPLATE.md.

Names, texts and metadata that come from outside are checked or escaped: a card must not change its meaning by what it quotes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from exporter.checkpoint.report import Report
from exporter.directions.statistics import LayerStatistics
from exporter.evaluation.results import Results
from exporter.evaluation.results_json import read_results
from exporter.models.base import BaseCheckpoint
from exporter.models.recipe import Recipe
from exporter.publishing.card_figures import evaluate_command, evaluation, warning
from exporter.publishing.card_metadata import inherit, metadata
from exporter.publishing.markdown import code, escaped, measured, python_string
from exporter.runtime.resources import resource

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
    base: BaseCheckpoint,
    recipe: Recipe,
    report: Report,
    statistics: tuple[LayerStatistics, ...],
    repo: str,
    results: Results | None = None,
    folder: Path | None = None,
) -> str:
    """The README.md of an export.

    `results` are by default those that the report holds. Pictures are those in `assets` of `folder`, by
    default of the base's folder, which is the export itself when its card is made anew. Licence and language are the base's.
    """
    if results is None and report.evaluation is not None:
        results = read_results(report.evaluation)
    inherited = inherit(base)
    return _template().render(
        metadata=metadata(base, inherited, repo, results),
        warning=warning(results),
        base=base,
        recipe=recipe,
        repo=repo,
        layers=report.layers.chosen,
        depth=report.layers.depth,
        layer_reason=report.layers.criterion,
        calibration=report.calibration,
        prompts=report.prompts,
        directions=report.directions,
        mean=_means(statistics, report.layers.chosen),
        evaluation=None if results is None else evaluation(results, (folder or base.folder) / "assets"),
        evaluate_command=evaluate_command(repo, results),
        reference_text=REFERENCE_TEXT[recipe.reference],
        cost_text=COST_TEXT[recipe.reference].format(tokens=recipe.caption_tokens),
        inherited=inherited,
        onnx=report.onnx,
        adapter=report.adapter,
        quantised=report.measured_quantised,
        version=report.versions["shiftdc-export"],
    )


def _template() -> Template:
    loader = FileSystemLoader(resource("MODEL_CARD_TEMPLATE.md").parent)
    environment = Environment(
        loader=loader,
        autoescape=False,  # noqa: S701 (it is for HTML; the card is Markdown, and has filters of its own)
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"escaped": escaped, "code": code, "python": python_string, "measured": measured}
    return environment.get_template("MODEL_CARD_TEMPLATE.md")


def _means(statistics: Sequence[LayerStatistics], layers: Sequence[int]) -> dict[str, float | None]:
    chosen = [s for s in statistics if s.layer in layers]
    known = {k: [v for s in chosen if (v := getattr(s, k)) is not None] for k in ("auroc", "split_half_cosine", "shift_cosine")}
    return {k: sum(values) / len(values) if values else None for k, values in known.items()}
