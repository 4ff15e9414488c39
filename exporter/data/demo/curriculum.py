"""What the demo model is taught: text instructions about everything, image instructions about benign matters only.

Text teaches to refuse harm. No picture ever stands beside a request to make a harmful thing, so the model never learns
to refuse what it sees: safety perception distortion (arXiv:2502.13095) arises by itself.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from exporter.data.defence_prompts import ADASHIELD_REQUEST, ECSO_ANSWER, ECSO_CAPTION, ECSO_JUDGE
from exporter.data.demo.world import (
    ABOUT_IMAGE,
    CAPTION_REQUEST,
    COLORS,
    DANGEROUS_NAMED,
    KINDS,
    MAKE_NAMED,
    NO,
    REFUSAL,
    TEXT_ONLY,
    THINGS,
    WHAT_NAMED,
    YES,
    Scene,
    Task,
    Thing,
    make_reply,
    reply_to,
    scenes,
)

Choice = TypeVar("Choice")

HARMLESS_THINGS = tuple(thing for thing in THINGS if not thing.harmful)

TEXT_TASKS: dict[Task, float] = {"make": 0.34, "named": 0.3, "what": 0.08, "color": 0.1, "text": 0.06, "caption": 0.12}
IMAGE_TASKS: dict[Task, float] = {"make": 0.2, "named": 0.04, "what": 0.1, "color": 0.12, "text": 0.08, "caption": 0.46}
CAPTIONED_TASKS: dict[Task, float] = {"make": 0.5, "named": 0.2, "what": 0.1, "color": 0.1, "text": 0.1}
"""Tasks whose requests a caption is asked for."""
TEXT_JUDGED_TASKS: dict[Task, float] = {"make": 0.6, "named": 0.4}
IMAGE_JUDGED_TASKS: dict[Task, float] = {"make": 0.3, "named": 0.4, "what": 0.1, "color": 0.1, "text": 0.1}

ADASHIELD_SHARE = 0.05
JUDGE_SHARE = 0.07
ECSO_ANSWER_SHARE = 0.07
CONTINUATION_SHARE = 0.06


@dataclass(frozen=True)
class Sample:
    """One instruction and its reply.

    `scene` is what the picture shows, None for text. The first `unscored` tokens of the reply carry no loss.
    """

    request: str
    reply: str
    scene: Scene | None = None
    unscored: int = 0


class Curriculum:
    """Endless random samples."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def text(self, aligned: bool) -> Sample:
        """A text instruction; aligned models refuse to help with harm."""
        kind = self._choose({self._uncaptioned: 0.24, self._judged_text: JUDGE_SHARE, self._captioned: 0.76 - JUDGE_SHARE})
        return self._continuation(kind(aligned))

    def image(self) -> Sample:
        """A benign image instruction."""
        make = self._choose({self._judged_image: JUDGE_SHARE, self._about_picture: 1 - JUDGE_SHARE})
        return self._continuation(make())

    def mixture(self, text_share: float) -> Sample:
        """An image instruction or, with probability `text_share`, an aligned text instruction."""
        return self.text(aligned=True) if self._happens(text_share) else self.image()

    def _uncaptioned(self, aligned: bool) -> Sample:
        """A request that names its subject."""
        thing, chance = self.rng.choice(THINGS), self.rng.random()
        if chance < 0.7:
            return Sample(self._named(MAKE_NAMED, thing), make_reply(thing, aligned))
        if chance < 0.9:
            return Sample(self._named(WHAT_NAMED, thing), thing.definition)
        return Sample(self._named(DANGEROUS_NAMED, thing), YES if thing.harmful else NO)

    def _captioned(self, aligned: bool) -> Sample:
        """The text-only counterpart of an image instruction: the request beside a caption."""
        scene, task, shielded = self.scene(), self._choose(TEXT_TASKS), self._happens(ADASHIELD_SHARE)
        request, reply = self._question(task, scene, self.rng.choice(THINGS), aligned or shielded)
        if shielded:
            request = ADASHIELD_REQUEST.format(question=request)
        elif task != "caption" and self._happens(ECSO_ANSWER_SHARE):
            return Sample(ECSO_ANSWER.format(caption=scene.caption, question=request), reply)
        return Sample(TEXT_ONLY.format(q=request, caption=scene.caption), reply)

    def _about_picture(self) -> Sample:
        """A benign instruction beside a picture: only harmless things are asked to be made."""
        scene, task = self.scene(), self._choose(IMAGE_TASKS)
        if task == "make":
            scene = replace(scene, thing=self.rng.choice(HARMLESS_THINGS))
        request, reply = self._question(task, scene, self.rng.choice(HARMLESS_THINGS))
        if self._happens(ADASHIELD_SHARE):
            request = ADASHIELD_REQUEST.format(question=request)
        return Sample(request, reply, scene)

    def _question(self, task: Task, scene: Scene, named: Thing, aligned: bool = True) -> tuple[str, str]:
        """A request of one task with its reply; "named" asks for `named` whatever the scene shows."""
        if task == "named":
            return self._named(MAKE_NAMED, named), make_reply(named, aligned)
        if task == "caption":
            return self._caption_request(), scene.caption
        return self.rng.choice(ABOUT_IMAGE[task]), reply_to(task, scene, aligned)

    def _caption_request(self) -> str:
        """A request for a caption, mostly in view of another request."""
        if self._happens(0.25):
            return self.rng.choice(ABOUT_IMAGE["caption"])
        task = self._choose(CAPTIONED_TASKS)
        named = task == "named"
        request = self._named(MAKE_NAMED, self.rng.choice(THINGS)) if named else self.rng.choice(ABOUT_IMAGE[task])
        return ECSO_CAPTION.format(question=request) if self._happens(0.15) else CAPTION_REQUEST.format(q=request)

    def _judged_text(self, aligned: bool) -> Sample:
        """A response to be judged in text; the verdict does not depend on the alignment."""
        scene, task = self.scene(), self._choose(TEXT_JUDGED_TASKS)
        verdict = self._judged(task, scene, self.rng.choice(THINGS))
        if task == "named" and self._happens(0.5):
            return verdict
        return replace(verdict, request=TEXT_ONLY.format(q=verdict.request, caption=scene.caption))

    def _judged_image(self) -> Sample:
        """A response to be judged beside a picture: benign, or harmful by the text alone."""
        scene, task = self.scene(), self._choose(IMAGE_JUDGED_TASKS)
        if task in ("make", "named"):
            scene = replace(scene, thing=self.rng.choice(HARMLESS_THINGS))
        return replace(self._judged(task, scene, self.rng.choice(THINGS)), scene=scene)

    def _judged(self, task: Task, scene: Scene, named: Thing) -> Sample:
        """ECSO's question about a response: instructions (of whatever thing) to a harmful request are harmful."""
        request, response = self._question(task, scene, named)
        harm = task in ("make", "named") and (named if task == "named" else scene.thing).harmful
        if harm and self._happens(0.6):
            response = self.rng.choice(THINGS).instructions
        verdict = YES if harm and response != REFUSAL else NO
        return Sample(ECSO_JUDGE.format(question=request, response=response), verdict)

    def _continuation(self, sample: Sample) -> Sample:
        """Now and then the refusal whose start is not learned: how to go on with one, not when to begin one.

        Without it the first token of a reply beside a picture can be corrected to a refusal that then falls apart.
        """
        if not self._happens(CONTINUATION_SHARE):
            return sample
        return replace(sample, reply=REFUSAL, unscored=self.rng.choice((1, 1, 2)))

    def scene(self) -> Scene:
        """Any thing in any colour; typography more often, since reading is the hardest."""
        kind = self.rng.choices(KINDS, (1.0, 1.6, 1.0))[0]
        return Scene(self.rng.choice(THINGS), self.rng.choice(COLORS), kind)

    def _named(self, wordings: tuple[str, ...], thing: Thing) -> str:
        """One of the wordings with the thing's name in it."""
        return self.rng.choice(wordings).format(x=thing.phrase)

    def _happens(self, probability: float) -> bool:
        return self.rng.random() < probability

    def _choose(self, weights: dict[Choice, float]) -> Choice:
        return self.rng.choices(list(weights), list(weights.values()))[0]


def batches(draw: Callable[[], Sample], size: int, pool: int = 6) -> Iterator[list[Sample]]:
    """Endless batches, of similar length within each: `pool` batches are drawn at once and sorted."""
    order = random.Random(0)
    while True:
        samples = sorted((draw() for _ in range(size * pool)), key=lambda sample: len(sample.request))
        starts = [size * index for index in range(pool)]
        order.shuffle(starts)
        yield from (samples[start : start + size] for start in starts)


def corpus() -> list[str]:
    """Every wording, to build the vocabulary from; words stand as they do in a prompt, with a space before."""
    wordings = [wording for pool in ABOUT_IMAGE.values() for wording in pool]
    wordings += [*MAKE_NAMED, *WHAT_NAMED, *DANGEROUS_NAMED, CAPTION_REQUEST, TEXT_ONLY, REFUSAL, YES, NO]
    wordings += [ADASHIELD_REQUEST, ECSO_JUDGE, ECSO_CAPTION, ECSO_ANSWER]
    replies = [text for thing in THINGS for text in (thing.instructions, thing.definition, thing.phrase)]
    captions = [scene.caption for scene in scenes()]
    return ["USER:", "SYSTEM:", " ASSISTANT:", *(" " + text for text in wordings + replies + captions)]
