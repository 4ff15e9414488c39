"""Ways to answer a request about an image: no defence, ShiftDC in all its forms, what it is compared with, and controls.

Wordings of the prompts are our own; the procedures are AdaShield-S (arXiv:2403.09513), ECSO (arXiv:2403.09572) and, for the
blank-image control, CMRM (arXiv:2410.09047) restricted to the safety direction.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from exporter.data.defence_prompts import ADASHIELD_REQUEST, ECSO_ANSWER, ECSO_CAPTION, ECSO_JUDGE, fill
from exporter.models.vlm import VLM, Inputs

Seconds = dict[str, float]
Images = Sequence[Image.Image] | None


@dataclass(frozen=True)
class Answers:
    """Replies to a batch and the seconds that it took, by stage: caption, reference, judge, prefill, decode."""

    texts: list[str]
    seconds: Seconds


@dataclass(frozen=True)
class Defence:
    """A way to answer. `settings` replace those of the checkpoint's `shiftdc` block; `seed` draws random directions.

    `blank_shift` puts the mean shift of a blank image in the place of the baked one.
    """

    name: str
    answer: Callable[[Run, Sequence[str], Images], Answers]
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    blank_shift: bool = False


@dataclass(frozen=True)
class Run:
    """A model that answers greedily, at most `max_new_tokens` tokens."""

    vlm: VLM
    max_new_tokens: int

    def generate(self, inputs: Inputs, **options: Any) -> Answers:
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

    def note(*_: Any) -> None:
        if not passed:
            if vlm.device.type == "cuda":
                torch.cuda.synchronize()
            passed.append(time.perf_counter())

    handle = vlm.decoder_layers(vlm.model.config.shiftdc["decoder_layers"])[-1].register_forward_hook(note)
    try:
        yield passed
    finally:
        handle.remove()


def direct(run: Run, requests: Sequence[str], images: Images) -> Answers:
    """No defence."""
    return run.ask(requests, images)


def text_only(run: Run, requests: Sequence[str], images: Images) -> Answers:
    """The text-only counterpart with the model's own caption: what ShiftDC aims at."""
    if images is None:
        return run.ask(requests)
    inputs = run.vlm.encode(requests, images)
    captions, seconds = _timed(lambda: run.vlm.model.shiftdc_captions(**inputs))
    composer = run.vlm.model.shiftdc_composer
    rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), captions, strict=True)
    counterparts = run.vlm.pad([composer.text_prompt(ids[mask].tolist(), caption) for ids, mask, caption in rows])
    answers = run.generate(counterparts, shiftdc=False)
    return Answers(answers.texts, {"caption": seconds, **answers.seconds})


def shiftdc(run: Run, requests: Sequence[str], images: Images) -> Answers:
    """The calibrated model; caption and reference pass are timed apart."""
    inputs, model = run.vlm.encode(requests, images), run.vlm.model
    kind = model.config.shiftdc["reference"]
    if images is None or kind == "static":
        return run.generate(inputs)
    options, spent = {}, {}
    read = None
    if kind == "caption":
        read, spent["caption"] = _timed(lambda: model.shiftdc_image(**inputs))
        options["captions"] = read.captions
    reference, spent["reference"] = _timed(lambda: model.shiftdc_reference(**inputs, **options))
    answers = run.generate(inputs, shiftdc_reference=reference, shiftdc_image=read)
    return Answers(answers.texts, {**spent, **answers.seconds})


def adashield(run: Run, requests: Sequence[str], images: Images) -> Answers:
    """AdaShield-S: a fixed defence prompt between two copies of the request."""
    return run.ask([fill(ADASHIELD_REQUEST, question=r) for r in requests], images)


def ecso(run: Run, requests: Sequence[str], images: Images) -> Answers:
    """ECSO: answer, ask the model whether the answer is harmful, and where it says yes answer anew from a caption alone."""
    first = run.ask(requests, images)
    verdicts, judging = _timed(
        lambda: run.ask([fill(ECSO_JUDGE, question=q, response=r) for q, r in zip(requests, first.texts, strict=True)], images)
    )
    flagged = [i for i, verdict in enumerate(verdicts.texts) if verdict.lower() in ("yes", "yes.")]
    seconds = {**first.seconds, "judge": judging}
    if not flagged or images is None:
        return Answers(first.texts, seconds)
    questions = [requests[i] for i in flagged]
    captions, seconds["caption"] = _timed(
        lambda: run.ask([fill(ECSO_CAPTION, question=q) for q in questions], [images[i] for i in flagged])
    )
    prompts = [fill(ECSO_ANSWER, question=q, caption=c) for q, c in zip(questions, captions.texts, strict=True)]
    second, seconds["reference"] = _timed(lambda: run.ask(prompts))
    texts = list(first.texts)
    for i, text in zip(flagged, second.texts, strict=True):
        texts[i] = text
    return Answers(texts, seconds)


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


DEFENCES = {
    d.name: d
    for d in (
        Defence("direct", direct),
        Defence("text_only", text_only),
        Defence("shiftdc", shiftdc),
        *(Defence(f"shiftdc_{r}", shiftdc, {"reference": r}) for r in ("caption", "text", "blank", "static")),
        Defence("shiftdc_precomputed", shiftdc, {"rule": "precomputed"}),
        Defence("shiftdc_one_sided", shiftdc, {"gate": "one-sided"}),
        Defence("shiftdc_two_sided", shiftdc, {"gate": "two-sided"}),
        Defence("adashield", adashield),
        Defence("ecso", ecso),
        *(Defence(f"random_direction_{seed}", shiftdc, seed=seed) for seed in range(3)),
        # two-sided, because a blank image may also shift away from "safe"
        Defence("blank_image_shift", shiftdc, {"reference": "static", "gate": "two-sided"}, blank_shift=True),
    )
}

#: No defence, what the method aims at, the method, and a control that must do nothing.
STANDARD = ("direct", "text_only", "shiftdc", "random_direction_0")


@contextmanager
def applied(vlm: VLM, defence: Defence, blank_shifts: Mapping[int, float] | None = None) -> Iterator[None]:
    """The model under a defence's settings; as it was afterwards.

    blank_shifts: by layer, what a blank image adds along the direction; needed by `blank_image_shift`.
    """
    config, corrections = vlm.model.config, vlm.model.shiftdc_corrections
    settings = config.shiftdc
    kept = [(c.direction.clone(), c.shift.clone(), c.one_sided) for c in corrections]
    try:
        config.shiftdc = {**settings, **defence.settings}
        for layer, correction in zip(settings["layers"], corrections, strict=True):
            correction.one_sided = config.shiftdc["gate"] == "one-sided"
            if defence.seed is not None:
                correction.direction.copy_(_random_unit(correction.direction, 1000 * defence.seed + layer))
            if defence.blank_shift:
                assert blank_shifts is not None
                correction.shift.fill_(blank_shifts[layer])
        yield
    finally:
        config.shiftdc = settings
        for correction, (direction, shift, one_sided) in zip(corrections, kept, strict=True):
            correction.direction.copy_(direction)
            correction.shift.copy_(shift)
            correction.one_sided = one_sided


def _random_unit(like: torch.Tensor, seed: int) -> torch.Tensor:
    vector = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    return (vector / vector.norm()).to(like)
