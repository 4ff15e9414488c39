"""Ways to answer a request about an image: no defence, ShiftDC in all its forms, what it is compared with, and controls.

Wordings of the prompts are our own; the procedures are AdaShield-S (arXiv:2403.09513), ECSO (arXiv:2403.09572) and, for the
blank-image control, CMRM (arXiv:2410.09047) restricted to the safety direction.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from PIL import Image

from exporter.data.defence_prompts import ADASHIELD_REQUEST, ECSO_ANSWER, ECSO_CAPTION, ECSO_JUDGE, fill
from exporter.models.hooks import hooked
from exporter.models.overridden import overridden
from exporter.models.vlm import VLM, Inputs

Seconds = dict[str, float]
Images = Sequence[Image.Image] | None
T = TypeVar("T")


@dataclass(frozen=True)
class Answers:
    """Replies to a batch and the seconds that it took, by stage: caption, reference, judge, prefill, decode."""

    texts: list[str]
    seconds: Seconds


@dataclass(frozen=True)
class Defence:
    """A way to answer, `words` in tables. `settings` replace those of the checkpoint's `shiftdc` block.

    `seed` draws random directions; `blank_shift` puts the mean shift of a blank image in the place of the baked one.
    """

    name: str
    answer: Callable[[Run, Sequence[str], Images], Answers]
    words: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None
    blank_shift: bool = False


@dataclass(frozen=True)
class Run:
    """A model that answers greedily, at most `max_new_tokens` tokens."""

    vlm: VLM
    max_new_tokens: int

    def generate(self, inputs: Inputs, **options: object) -> Answers:
        """Replies with the time to the first token (prefill) apart from the rest (decode)."""
        start = time.perf_counter()
        with _first_pass(self.vlm) as passed:
            out = self.vlm.model.generate(**inputs, **options, max_new_tokens=self.max_new_tokens, do_sample=False)
        end = time.perf_counter()
        texts = [self.vlm.decode(row) for row in out[:, inputs["input_ids"].shape[1] :]]
        return Answers(texts, {"prefill": passed[0] - start, "decode": end - passed[0]})

    def ask(self, requests: Sequence[str], images: Images = None) -> Answers:
        """The base model's replies."""
        return self.generate(self.vlm.encode(requests, images), shiftdc=False)


@contextmanager
def _first_pass(vlm: VLM) -> Iterator[list[float]]:
    """Holds when the last decoder layer first ended, once it has."""
    passed: list[float] = []

    def note(number: int, hidden: torch.Tensor) -> None:
        if not passed:
            if vlm.device.type == "cuda":
                torch.cuda.synchronize()
            passed.append(time.perf_counter())

    last = vlm.decoder_layers[-1]
    with hooked([last], note):
        yield passed


def direct(run: Run, requests: Sequence[str], images: Images) -> Answers:
    """No defence."""
    return run.ask(requests, images)


def text_only(run: Run, requests: Sequence[str], images: Images) -> Answers:
    """The text-only counterpart with the model's own caption: what ShiftDC aims at."""
    if images is None:
        return run.ask(requests)
    inputs = run.vlm.encode(requests, images)
    seconds: Seconds = {}
    with _timed(seconds, "caption"):
        captions = run.vlm.model.shiftdc_captions(**inputs)
    composer = run.vlm.model.shiftdc_composer
    rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), captions, strict=True)
    counterparts = run.vlm.pad([composer.text_prompt(ids[mask].tolist(), caption) for ids, mask, caption in rows])
    answers = run.generate(counterparts, shiftdc=False)
    return Answers(answers.texts, {**seconds, **answers.seconds})


def shiftdc(run: Run, requests: Sequence[str], images: Images) -> Answers:
    """The calibrated model; caption and reference pass are timed apart."""
    inputs, model = run.vlm.encode(requests, images), run.vlm.model
    kind = model.config.shiftdc["reference"]
    if images is None or kind == "static":
        return run.generate(inputs)
    seconds: Seconds = {}
    options, read = {}, None
    if kind == "caption":
        with _timed(seconds, "caption"):
            read = model.shiftdc_image(**inputs)
        options["captions"] = read.captions
    with _timed(seconds, "reference"):
        reference = model.shiftdc_reference(**inputs, **options)
    answers = run.generate(inputs, shiftdc_reference=reference, shiftdc_image=read)
    return Answers(answers.texts, {**seconds, **answers.seconds})


def adashield(run: Run, requests: Sequence[str], images: Images) -> Answers:
    """AdaShield-S: a fixed defence prompt between two copies of the request."""
    return run.ask([fill(ADASHIELD_REQUEST, question=r) for r in requests], images)


def ecso(run: Run, requests: Sequence[str], images: Images) -> Answers:
    """ECSO: answer, ask the model whether the answer is harmful, and where it says yes answer anew from a caption alone."""
    first = run.ask(requests, images)
    seconds = dict(first.seconds)
    with _timed(seconds, "judge"):
        asked = [fill(ECSO_JUDGE, question=q, response=r) for q, r in zip(requests, first.texts, strict=True)]
        verdicts = run.ask(asked, images)
    flagged = [i for i, verdict in enumerate(verdicts.texts) if verdict.lower() in ("yes", "yes.")]
    if not flagged or images is None:
        return Answers(first.texts, seconds)
    questions = [requests[i] for i in flagged]
    with _timed(seconds, "caption"):
        captions = run.ask([fill(ECSO_CAPTION, question=q) for q in questions], [images[i] for i in flagged])
    prompts = [fill(ECSO_ANSWER, question=q, caption=c) for q, c in zip(questions, captions.texts, strict=True)]
    with _timed(seconds, "reference"):
        second = run.ask(prompts)
    texts = list(first.texts)
    for i, text in zip(flagged, second.texts, strict=True):
        texts[i] = text
    return Answers(texts, seconds)


@contextmanager
def _timed(seconds: Seconds, stage: str) -> Iterator[None]:
    """Put the seconds that the block takes under its stage."""
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


DEFENCES = {
    d.name: d
    for d in (
        Defence("direct", direct, "no defence"),
        Defence("text_only", text_only, "text only (ceiling)"),
        Defence("shiftdc", shiftdc, "ShiftDC, as shipped"),
        Defence("shiftdc_caption", shiftdc, "ShiftDC, caption", {"reference": "caption"}),
        Defence("shiftdc_text", shiftdc, "ShiftDC, text", {"reference": "text"}),
        Defence("shiftdc_blank", shiftdc, "ShiftDC, blank image", {"reference": "blank"}),
        Defence("shiftdc_static", shiftdc, "ShiftDC, static", {"reference": "static"}),
        Defence("shiftdc_precomputed", shiftdc, "ShiftDC, precomputed", {"rule": "precomputed"}),
        Defence("shiftdc_one_sided", shiftdc, "ShiftDC, one-sided", {"gate": "one-sided"}),
        Defence("shiftdc_two_sided", shiftdc, "ShiftDC, two-sided", {"gate": "two-sided"}),
        Defence("adashield", adashield, "AdaShield-S"),
        Defence("ecso", ecso, "ECSO"),
        *(Defence(f"random_direction_{seed}", shiftdc, f"random direction {seed}", seed=seed) for seed in range(3)),
        # two-sided, because a blank image may also shift away from "safe"
        Defence(
            "blank_image_shift", shiftdc, "mean blank-image shift", {"reference": "static", "gate": "two-sided"}, blank_shift=True
        ),
    )
}

#: No defence, what the method aims at, the method, and a control that must do nothing.
STANDARD = ("direct", "text_only", "shiftdc", "random_direction_0")
#: In tables and pictures random directions stand last.
_ROWS = {d.name: row for row, d in enumerate(sorted(DEFENCES.values(), key=lambda d: d.seed is not None))}


def defence_words(name: str) -> str:
    """A defence as tables name it, also one that is not known here."""
    return DEFENCES[name].words if name in DEFENCES else name.replace("_", " ")


def defences_in_rows(by_defence: Mapping[str, T]) -> dict[str, T]:
    """In the order of tables; defences that are not known here come last, in the order that they have."""
    return dict(sorted(by_defence.items(), key=lambda entry: _ROWS.get(entry[0], len(_ROWS))))


@contextmanager
def applied(vlm: VLM, defence: Defence, blank_shifts: Mapping[int, float] | None = None) -> Iterator[None]:
    """The model under a defence's settings; as it was afterwards.

    blank_shifts: by layer, what a blank image adds along the direction; needed by `blank_image_shift`.
    """
    with overridden(vlm.model, defence.settings) as corrections:
        for layer, correction in zip(vlm.model.config.shiftdc["layers"], corrections, strict=True):
            if defence.seed is not None:
                correction.direction.copy_(_random_unit(len(correction.direction), 1000 * defence.seed + layer))
            if defence.blank_shift:
                assert blank_shifts is not None
                correction.shift.fill_(blank_shifts[layer])
        yield


def _random_unit(size: int, seed: int) -> torch.Tensor:
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()
