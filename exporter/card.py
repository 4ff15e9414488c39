"""The model card: what was done, what it does, and how to load it, from MODEL_CARD_TEMPLATE.md.

Names, texts and metadata that come from outside are checked or escaped: a card must not change its meaning by what it quotes.
"""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from exporter.directions import DIFFERENCE, LayerStatistics
from exporter.plots import PICTURES
from exporter.reading import CARD_BYTES, UnreadableError, parse_yaml, read_bytes, text_of
from exporter.recipes import Recipe
from exporter.resources import resource
from exporter.source import DEMO, BaseCheckpoint
from exporter.verdict import Effect, bounds, cell_name, cells, defence_name, defences, judge_effect, number, percent

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
TAGS = ["shiftdc", "safety", "vision-language"]
HUB = "https://huggingface.co"
MISSING = "\N{EN DASH}"

# what separates lines, or turns the direction of writing
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]+")
_FRONT_MATTER = re.compile(r"\s*---[\r\n]+(.*?)[\r\n]+---(?:\r?\n|\r|$)", re.DOTALL)
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")
_LICENSE_NAME = re.compile(r"[\w.,+()/-][\w .,+()/-]{0,99}")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")
_REPOSITORY = re.compile(r"([\w.-]+/)?[\w.-]+", re.ASCII)
_DATASET = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})\b")


def render_card(
    base: BaseCheckpoint,
    recipe: Recipe,
    report: dict[str, Any],
    statistics: tuple[LayerStatistics, ...],
    repo: str,
    results: dict[str, Any] | None = None,
    folder: Path | None = None,
) -> str:
    """The README.md of an export.

    `results` is results.json's content, by default what the report holds of it. Pictures are those in `assets` of `folder`, by
    default of the base's folder, which is the export itself when its card is made anew. Licence and language are the base's.
    """
    results = results or report.get("evaluation")
    inherited = inherit(base)
    return _template().render(
        metadata=metadata(base, inherited, repo, results),
        warning=warning(results),
        base=base,
        recipe=recipe,
        repo=repo,
        layers=report["layers"]["chosen"],
        depth=report["layers"]["depth"],
        layer_reason=report["layers"]["criterion"],
        calibration=report["calibration"],
        directions=report.get("directions", DIFFERENCE),
        mean=_means(statistics, report["layers"]["chosen"]),
        evaluation=None if results is None else evaluation(results, (folder or base.folder) / "assets"),
        evaluate_command=evaluate_command(repo, results),
        reference_text=REFERENCE_TEXT[recipe.reference],
        cost_text=COST_TEXT[recipe.reference].format(tokens=recipe.caption_tokens),
        inherited=inherited,
        onnx=report.get("onnx"),
        adapter=report.get("adapter"),
        quantised=report.get("measured_quantised"),
        version=report["versions"]["shiftdc-export"],
    )


def _template() -> Any:
    loader = FileSystemLoader(resource("MODEL_CARD_TEMPLATE.md").parent)
    # autoescape is for HTML; the card is Markdown, and has filters of its own
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, autoescape=False, **options)  # noqa: S701
    environment.filters |= {"escaped": escaped, "code": code, "python": python_string, "measured": measured}
    return environment.get_template("MODEL_CARD_TEMPLATE.md")


def _means(statistics: Sequence[LayerStatistics], layers: Sequence[int]) -> dict[str, float | None]:
    chosen = [s for s in statistics if s.layer in layers]
    known = {k: [v for s in chosen if (v := getattr(s, k)) is not None] for k in ("auroc", "split_half_cosine", "shift_cosine")}
    return {k: number(sum(values) / len(values)) if values else None for k, values in known.items()}


# What the base's card says, for ours


@dataclass(frozen=True)
class Inherited:
    """Licence and language of the base model; `problem` says why there is no licence."""

    license: tuple[str, ...] = ()
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    problem: str | None = None


def inherit(base: BaseCheckpoint) -> Inherited:
    """What the front matter of the base's README.md says. A damaged one gives no licence, and is no error."""
    if base.name == DEMO:  # part of this package
        return Inherited(license=("apache-2.0",), language=("en",))
    readme = base.folder / "README.md"
    if not readme.is_file():
        return Inherited(problem="The base model came without a card, so its licence is not known here")
    try:
        front = _FRONT_MATTER.match(text_of(read_bytes(readme, CARD_BYTES)))
        found = (parse_yaml(front[1]) if front else None) or {}
        if not isinstance(found, dict):
            raise UnreadableError("it is no mapping")
    except UnreadableError:
        return Inherited(problem="The metadata of the base model's card cannot be read, so its licence is not known here")
    licenses = tuple(x for x in _listed(found.get("license")) if isinstance(x, str) and _LICENSE.fullmatch(x))
    languages = ["no" if x is False else x for x in _listed(found.get("language"))]  # YAML reads Norwegian as false
    language = tuple(x for x in languages if isinstance(x, str) and _LANGUAGE.fullmatch(x))
    if not licenses:
        return Inherited(language=language, problem="The base model's card names no licence that can be taken over")
    name = found.get("license_name")
    return Inherited(
        license=licenses,
        license_name=name if isinstance(name, str) and _LICENSE_NAME.fullmatch(name) else None,
        license_link=_license_link(base, found.get("license_link")),
        language=language,
    )


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _license_link(base: BaseCheckpoint, link: object) -> str | None:
    """A web address; relative ones lead to the base's repository, or to a file that is copied into the export."""
    if not isinstance(link, str) or not link or _CONTROLS.search(link):
        return None
    try:
        parts = urlsplit(link)
    except ValueError:
        return None
    if parts.scheme in ("http", "https") and parts.netloc:
        return quote(link, safe="/:?#@!$&'*+,;=%~")
    path = Path(link)
    if parts.scheme or parts.netloc or path.is_absolute() or ".." in path.parts:
        return None
    if _on_hub(base):
        return f"{HUB}/{base.name}/blob/{quote(base.revision or 'main', safe='')}/{quote(path.as_posix())}"
    return quote(path.as_posix()) if path in base.companions else None


def _on_hub(base: BaseCheckpoint) -> bool:
    return base.revision is not None and base.name != DEMO and _REPOSITORY.fullmatch(base.name) is not None


# Metadata


def metadata(base: BaseCheckpoint, inherited: Inherited, repo: str, results: Mapping[str, Any] | None) -> str:
    """The YAML front matter, as huggingface_hub writes it."""
    evaluated = eval_results(results) if results is not None else []
    options: dict[str, Any] = {
        "base_model": base.name if _on_hub(base) else None,
        "base_model_relation": "finetune" if _on_hub(base) else None,
        "language": list(inherited.language) or None,
        "license": inherited.license[0] if len(inherited.license) == 1 else list(inherited.license) or None,
        "license_name": inherited.license_name,
        "license_link": inherited.license_link,
        "pipeline_tag": "image-text-to-text",
        "library_name": "transformers",
        "tags": TAGS,
    }
    if evaluated:
        options |= {"eval_results": evaluated, "model_name": _plain(repo)}
    return ModelCardData(**options).to_yaml()


def eval_results(results: Mapping[str, Any]) -> list[EvalResult]:
    """The figures of the checkpoint's own settings for `model-index`, as shares from 0 to 1."""
    figures = defences(results).get("shiftdc", {})
    benchmark = _plain(results.get("benchmark", "unnamed"))
    dataset = _DATASET.match(str(results.get("source", "")))
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=dataset["id"] if dataset else re.sub(r"[^\w.-]+", "-", benchmark),
            dataset_name=benchmark,
            dataset_revision=dataset["commit"] if dataset else None,
            dataset_split=_plain(results["split"]) if results.get("split") else None,
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
            metric_args=_metric_args(results, figures, metric, n),
        )
        for metric, n, kind, name in (
            ("asr", "n_harmful", "attack_success_rate", "Attack success rate (lower is better)"),
            ("over_refusal", "n_benign", "over_refusal_rate", "Refusals of harmless requests (lower is better)"),
            ("utility", "n_benign", "exact_match", "Right answers to harmless requests"),
        )
        if (value := number(figures.get(metric))) is not None
    ]


def _metric_args(results: Mapping[str, Any], figures: Mapping[str, Any], metric: str, n: str) -> dict[str, Any]:
    interval, count = bounds(figures.get(f"{metric}_ci95")), number(figures.get(n))
    return {
        "judge": _plain(results.get("judge", "not named")),
        **({} if count is None else {"n": int(count)}),
        **({} if interval is None else {"ci95": [round(b, 4) for b in interval]}),
    }


# What was measured


@dataclass(frozen=True)
class Caution:
    """Stands above everything else: a headline, and a sentence for each thing that is wrong."""

    headline: str
    sentences: tuple[str, ...]


def warning(results: Mapping[str, Any] | None) -> Caution | None:
    """What a reader must know first; None where there is an effect and no harm."""
    if results is None:
        return Caution("The effect of this calibration has not been measured.", ("Measure before you rely on it.",))
    effect = judge_effect(results)
    if effect.publishable:
        return None
    if effect.effective:
        return Caution("This calibration lowers attack success and does harm elsewhere.", effect.harms)
    return Caution("This calibration was not shown to lower attack success.", (effect.sentence, *effect.harms))


@dataclass(frozen=True)
class Evaluation:
    """The part of the card on results.json, in Markdown."""

    effect: Effect
    about: str
    defences: str
    cells: str
    scenarios: str
    residual: str | None
    cost: str | None
    source: str
    pictures: dict[str, str]


def evaluation(results: Mapping[str, Any], assets: Path) -> Evaluation:
    return Evaluation(
        effect=judge_effect(results),
        about=_about(results),
        defences=defence_table(results),
        cells=cell_table(results),
        scenarios=_scenario_table(results),
        residual=_residual(results),
        cost=_cost(results),
        source=_source(results),
        pictures={f"assets/{name}": text for name, text in PICTURES.items() if (assets / name).is_file()},
    )


def evaluate_command(repo: str, results: Mapping[str, Any] | None) -> str:
    """The command that gives the figures."""
    found = results or {}
    options = {"--benchmark": found.get("benchmark") or "demo", "--defence": "all"}
    if found.get("split") not in (None, "test"):
        options["--split"] = found["split"]
    if found.get("judge") not in (None, "prefix"):
        options["--judge"] = found["judge"]
    if number(found.get("limit_per_cell")) is not None:
        options["--limit"] = found["limit_per_cell"]
    words = [repo, *(word for option in options.items() for word in option)]
    return f"shiftdc-export evaluate {' '.join(shlex.quote(_plain(w)) for w in words)}"


def defence_table(results: Mapping[str, Any]) -> str:
    rows = [
        [
            escaped(defence_name(name)),
            *(_rate(figures, metric) for metric in ("asr", "over_refusal", "utility")),
            _times(figures.get("cost_ratio")),
        ]
        for name, figures in defences(results).items()
    ]
    return table(["defence", "attack success, %", "harmless refused, %", "right answers, %", "time"], rows)


def cell_table(results: Mapping[str, Any]) -> str:
    """Cell by cell, without and with calibration; attacks count where they succeed, harmless requests where refused."""
    before, after = cells(results, "direct"), cells(results, "shiftdc")
    rows = []
    for cell, figures in after.items():
        metric = "over_refusal" if number(figures.get("asr")) is None else "asr"
        rows.append(
            [
                escaped(cell_name(cell)),
                _count(figures.get("n")),
                "refused" if metric == "over_refusal" else "attack succeeds",
                _rate(before.get(cell, {}), metric),
                _rate(figures, metric),
            ]
        )
    return table(["cell", "n", "counted, %", "without", "with calibration"], rows)


def _scenario_table(results: Mapping[str, Any]) -> str:
    """MM-SafetyBench's own means: some scenarios are answered whatever one does, so that of eight stands beside that of all."""
    means = results.get("mm_safetybench")
    if not isinstance(means, Mapping):
        return ""
    names = [n for n in defences(results) if isinstance(means.get(n), Mapping)]
    rows = [[escaped(defence_name(n)), *(_percent(means[n].get(m)) for m in ("mean_13", "mean_8"))] for n in names]
    return table(["mean attack success, %", "13 scenarios", "8 scenarios (01-07, 09)"], rows) if rows else ""


def _about(results: Mapping[str, Any]) -> str:
    figures = defences(results).get("shiftdc", {})
    counts = f"{_count(figures.get('n_harmful'))} attacks and {_count(figures.get('n_benign'))} harmless requests in the table"
    parts = [
        f"Benchmark {code(results.get('benchmark', 'unnamed'))}",
        *([f"split {code(results['split'])}"] if results.get("split") else []),
        f"{_count(results.get('n'))} questions ({counts})",
        f"judge {code(results.get('judge', 'not named'))}",
        f"measured on {escaped(results.get('date', 'an unknown day'))}",
        *([f"on {escaped(results['device'])}"] if results.get("device") else []),
    ]
    return ", ".join(parts)


def _residual(results: Mapping[str, Any]) -> str | None:
    figures = defences(results).get("shiftdc", {})
    value = number(figures.get("asr"))
    if value is None:
        return None
    return f"{percent(value, bounds(figures.get('asr_ci95')))} % of the attacks of {code(results.get('benchmark', 'unnamed'))}"


def _cost(results: Mapping[str, Any]) -> str | None:
    figures = defences(results).get("shiftdc", {})
    if number(figures.get("cost_ratio")) is None:
        return None
    stages = figures.get("seconds")
    spent = {k: number(v) for k, v in stages.items()} if isinstance(stages, Mapping) else {}
    parts = ", ".join(f"{escaped(k)} {v:.3g} s" for k, v in spent.items() if v is not None)
    return f"{_times(figures['cost_ratio'])} the time of a reply without calibration" + (f" ({parts} a reply)" if parts else "")


def _source(results: Mapping[str, Any]) -> str:
    """Where the benchmark's data come from; of a path only its last part, the rest is the author's own business."""
    source = _plain(results.get("source", "of unknown origin"))
    is_path = source.startswith(("/", "~", ".", "\\")) or re.match(r"[A-Za-z]:[\\/]", source)
    return re.split(r"[\\/]", source.rstrip("\\/"))[-1] if is_path else source


def _rate(figures: Mapping[str, Any], metric: str) -> str:
    return _percent(figures.get(metric), bounds(figures.get(f"{metric}_ci95")))


def _percent(value: object, interval: tuple[float, float] | None = None) -> str:
    found = number(value)
    return MISSING if found is None else percent(found, interval)


def _times(value: object) -> str:
    found = number(value)
    return MISSING if found is None else f"{found:.2f} \N{MULTIPLICATION SIGN}"


def _count(value: object) -> str:
    found = number(value)
    return MISSING if found is None else str(int(found))


# Markdown


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells that are Markdown already."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def escaped(value: object) -> str:
    """Text in which nothing is read as Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", html.escape(_plain(value), quote=False))


def code(value: object) -> str:
    """A code span."""
    text = _plain(value)
    if text and not set(text) & set("`|"):
        return f"`{text}`"
    return f"<code>{escaped(text)}</code>"  # backslashes do not work in a span of backticks


def python_string(value: object) -> str:
    """A string literal, also of Python, on one line."""
    return json.dumps(_plain(value), ensure_ascii=False)


def measured(value: float | None, digits: int) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"


def _plain(value: object) -> str:
    """One line, without control characters."""
    return _CONTROLS.sub(" ", str(value)).strip()
