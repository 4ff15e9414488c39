"""The model card's front matter: what the base's card says of licence and language, and the figures for `model-index`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from huggingface_hub import EvalResult, ModelCardData

from exporter.evaluation.results import Interval, Results
from exporter.models.base import DEMO, BaseCheckpoint
from exporter.publishing.markdown import CONTROLS, plain
from exporter.runtime.reading import CARD_BYTES, UnreadableError, parse_yaml, read_bytes, text_of

TAGS = ["shiftdc", "safety", "vision-language"]
HUB = "https://huggingface.co"

_FRONT_MATTER = re.compile(r"\s*---[\r\n]+(.*?)[\r\n]+---(?:\r?\n|\r|$)", re.DOTALL)
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")
_LICENSE_NAME = re.compile(r"[\w.,+()/-][\w .,+()/-]{0,99}")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")
_REPOSITORY = re.compile(r"([\w.-]+/)?[\w.-]+", re.ASCII)
_DATASET = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})\b")


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


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _license_link(base: BaseCheckpoint, link: object) -> str | None:
    """A web address; relative ones lead to the base's repository, or to a file that is copied into the export."""
    if not isinstance(link, str) or not link or CONTROLS.search(link):
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


def metadata(base: BaseCheckpoint, inherited: Inherited, repo: str, results: Results | None) -> str:
    """The YAML front matter, as huggingface_hub writes it."""
    evaluated = [] if results is None else eval_results(results)
    on_hub = _on_hub(base)
    return ModelCardData(
        base_model=base.name if on_hub else None,
        base_model_relation="finetune" if on_hub else None,
        language=list(inherited.language) or None,
        license=inherited.license[0] if len(inherited.license) == 1 else list(inherited.license) or None,  # type: ignore[arg-type]
        license_name=inherited.license_name,
        license_link=inherited.license_link,
        pipeline_tag="image-text-to-text",
        library_name="transformers",
        tags=TAGS,
        eval_results=evaluated or None,
        model_name=plain(repo) if evaluated else None,
    ).to_yaml()


def eval_results(results: Results) -> list[EvalResult]:
    """The figures of the checkpoint's own settings for `model-index`, as shares from 0 to 1."""
    benchmark = plain("unnamed" if results.benchmark is None else results.benchmark)
    dataset = _DATASET.match(results.source or "")
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=dataset["id"] if dataset else re.sub(r"[^\w.-]+", "-", benchmark),
            dataset_name=benchmark,
            dataset_revision=dataset["commit"] if dataset else None,
            dataset_split=plain(results.about.split) if results.about.split else None,
            metric_type=metric.kind,
            metric_name=metric.name,
            metric_value=round(metric.value, 4),
            metric_args=_metric_args(results, metric),
        )
        for metric in _metrics(results)
    ]


@dataclass(frozen=True)
class _Metric:
    """A share that was measured, of `n` replies, by the name that the Hub shows."""

    kind: str
    name: str
    value: float
    interval: Interval | None
    n: int | None


def _metrics(results: Results) -> Iterator[_Metric]:
    own = results.shiftdc
    for kind, name, rate, n in (
        ("attack_success_rate", "Attack success rate (lower is better)", own.asr, own.n_harmful),
        ("over_refusal_rate", "Refusals of harmless requests (lower is better)", own.over_refusal, own.n_benign),
        ("exact_match", "Right answers to harmless requests", own.utility, own.n_benign),
    ):
        if rate.value is not None:
            yield _Metric(kind, name, rate.value, rate.ci95, n)


def _metric_args(results: Results, metric: _Metric) -> dict[str, object]:
    return {
        "judge": plain("not named" if results.judge is None else results.judge),
        **({} if metric.n is None else {"n": metric.n}),
        **({} if metric.interval is None else {"ci95": [round(b, 4) for b in metric.interval]}),
    }
