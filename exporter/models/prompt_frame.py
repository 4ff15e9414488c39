"""What a chat template and a processor write around requests and images, found by varying what stands in their slots.

`PromptComposer` in prompts_shiftdc.py says what it is for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

from exporter.errors import InputError
from exporter.modeling.prompts_shiftdc import Parts, PromptComposer, PromptFrame
from exporter.models.chat_template import refused_by_template, rendered
from exporter.models.conversation import Message, text_turn, user_turn
from exporter.models.recipe import Wording
from exporter.models.vlm import VLM, CheckedCodec

#: Texts that share no first and no last character.
_TEXTS = ("How to", "zebras? 7", "Alpha one")
#: Reply and second request: the first two differ in the reply, the last two in the request.
_SECOND_TURNS = (("Image", _TEXTS[0]), ("Request", _TEXTS[0]), ("Request", _TEXTS[1]))
#: Width and height of images that processors cut into as many tiles, columns and rows as they ever do.
_SHAPES = ((64, 64), (8, 8), (1536, 1536), (1536, 96), (96, 1536), (1536, 512))
#: A prompt as single characters, and ids of special tokens.
Cells = list[str | int]


def prompt_frame(vlm: VLM, prompts: Wording) -> PromptFrame:
    """The frame of a checkpoint's prompts. Raises InputError where the template gives no prompt from which it can be read off."""
    _check_template(vlm)
    writer = _Writer(vlm)
    alone, shown = [writer(_turn(t)) for t in _TEXTS], [writer(_turn(t, 1)) for t in _TEXTS]
    behind = [writer.or_none(_turn(t, 1, behind=True)) or shown[i] for i, t in enumerate(_TEXTS)]
    images = [_difference(prompt, alone[0]) for prompt in (shown[0], behind[0])]
    own = any(i is None for i in images)  # the template says more than that there is no image
    first, later = [
        i or _around_image(p, alone[0], vlm.image_token_id) for i, p in zip(images, (shown[0], behind[0]), strict=True)
    ]
    later = _behind_the_request(later)
    forms = [first, later, *_forms(writer, None if own else alone[0], vlm.image_token_id, behind=later.image != first.image)]
    split = [(_split(form.image, vlm.image_token_id), form.ends_turn) for form in forms]
    reply, later_turns = _second_turn(writer)
    heads = [_common_start(alone), _common_start(behind), *later_turns]
    heads = [head for head in heads if vlm.image_token_id not in head]
    openings = [first.start, *_second_opening(writer, vlm.image_token_id, split[0][0][0])]
    return PromptFrame(
        heads=_heads(heads),
        tail=_parts(_common_end([*alone, *shown])),
        reply=_parts(reply),
        opening=_parts(_shared_end(openings)),
        gap=_parts(_common_start(shown)[len(first.start) + len(first.image) :]),
        around=tuple(dict.fromkeys((_parts(s[0]), _parts(s[-1]), ends_turn) for s, ends_turn in split)),
        between=_distinct(part for s, _ in split for part in s[1:-1]),
        instead=(first.instead, later.instead),
        caption=prompts.caption,
        text=prompts.text_counterpart,
        bos_added=writer.bos_added,
        own=own,
        trims=writer(_turn(f" {_TEXTS[0]}\n")) == alone[0],
    )


def _turn(request: str, images: int = 0, *, behind: bool = False, size: tuple[int, int] = _SHAPES[0]) -> Message:
    """A user's turn with grey images before or behind the request."""
    return user_turn(request, *(Image.new("RGB", size, (127, 127, 127)) for _ in range(images)), behind=behind)


def _check_template(vlm: VLM) -> None:
    """Raise InputError where the template takes no prompt without an image, or says nothing of one."""
    try:
        alone = rendered(vlm.processor, [_turn(_TEXTS[0])], add_generation_prompt=True)
    except InputError as error:
        if not refused_by_template(error):
            raise
        raise InputError(
            f"MODEL: its chat template does not render a prompt without an image ({error.__cause__}), and the method compares "
            "with such prompts; restore the template, or give another model."
        ) from error.__cause__
    if not vlm.composed_text and rendered(vlm.processor, [_turn(_TEXTS[0], 1)], add_generation_prompt=True) == alone:
        raise InputError(
            "MODEL: its chat template writes nothing where an image stands, so its prompts cannot be told apart; "
            "restore the template, or give another model."
        )


class _Writer:
    """Conversations as cells, by the chat template and the processor."""

    def __init__(self, vlm: VLM):
        self.vlm = vlm
        self.codec = CheckedCodec(vlm.tokenizer)
        self.bos_added = self._bos_added()
        nothing = PromptFrame(((),), (), (), (), (), (((), (), False),), ((),), ("", ""), "", "", self.bos_added)
        self.composer = PromptComposer(nothing, self.codec, vlm.image_token_id)

    def __call__(self, *turns: Message) -> Cells:
        flat = self.composer.flat(self.vlm.encode_conversations([list(turns)])["input_ids"][0].tolist())
        tokens = {mark: token for token, mark in flat.marks.items()}
        return [tokens.get(character, character) for character in flat.text]

    def or_none(self, *turns: Message) -> Cells | None:
        """None where the template refuses these turns, as some do with several, or the processor an image of that size."""
        try:
            return self(*turns)
        except InputError as error:
            if not (refused_by_template(error) or isinstance(error.__cause__, ValueError)):
                raise
            return None

    def _bos_added(self) -> bool:
        if self.codec.bos is None:
            return False
        shown = _turn(_TEXTS[0], 1)
        text = rendered(self.vlm.processor, [shown], add_generation_prompt=True)
        ids = self.vlm.encode_conversations([[shown]])["input_ids"][0].tolist()
        return self.codec.bos in ids and self.codec.written(self.codec.bos) not in text


@dataclass(frozen=True)
class _ImagePart:
    """What an image makes different in a prompt: the cells before it, its own, and the text that stands there without it.

    ends_turn: what stands before the image is its own only where the end of the turn stands behind it.
    """

    start: Cells
    image: Cells
    instead: str
    ends_turn: bool = False


def _difference(shown: Cells, alone: Cells) -> _ImagePart | None:
    """None where prompts with and without image differ by more than white space beside the image."""
    start = _common(shown, alone)
    end = _common(shown[start:][::-1], alone[start:][::-1])
    instead = alone[start : len(alone) - end]
    if any(isinstance(cell, int) or not cell.isspace() for cell in instead):
        return None
    return _ImagePart(shown[:start], shown[start : len(shown) - end], "".join(map(str, instead)))


def _behind_the_request(part: _ImagePart) -> _ImagePart:
    """What stands on both sides of an image is the image's before it and the turn's behind it, so that a request ends there."""
    start, image = part.start, part.image
    while start and image and start[-1] == image[-1]:
        start, image = start[:-1], [image[-1], *image[:-1]]
    return _ImagePart(start, image, part.instead, ends_turn=len(start) < len(part.start))


def _around_image(shown: Cells, alone: Cells, image: int) -> _ImagePart:
    """The image tokens with the special tokens beside them that text prompts never have. Raises InputError."""
    if image not in shown:
        raise InputError("MODEL: its chat template writes nothing where an image stands; restore the template.")
    known = {cell for cell in alone if isinstance(cell, int)}
    start, end = shown.index(image), len(shown) - shown[::-1].index(image)
    while start and isinstance(shown[start - 1], int) and shown[start - 1] not in known:
        start -= 1
    while end < len(shown) and isinstance(shown[end], int) and shown[end] not in known:
        end += 1
    return _ImagePart(shown[:start], shown[start:end], "")


def _forms(writer: _Writer, alone: Cells | None, image: int, *, behind: bool) -> Iterable[_ImagePart]:
    """Images of other sizes, and two of them; `alone`: the prompt without, None where it differs by more.

    behind: images behind a request are written otherwise than before it, in all their sizes.
    """
    text, both = _TEXTS[0], (False, True)
    sizes = [(_turn(text, 1, behind=b, size=size), b) for b in (both if behind else both[:1]) for size in _SHAPES[1:]]
    # where text prompts differ by more, what joins two images is not the images'
    several = [] if alone is None else [(_turn(text, 2, behind=b), b) for b in both]
    for pictures, is_behind in (*sizes, *several):
        shown = writer.or_none(pictures)
        if shown is None:  # some templates take one image
            continue
        part = _around_image(shown, writer(_turn(text)), image) if alone is None else _difference(shown, alone)
        if part is not None:
            yield _behind_the_request(part) if is_behind else part


def _split(form: Cells, image: int) -> list[Cells]:
    """What stands before, between and behind runs of image tokens."""
    pieces: list[Cells] = [[]]
    for i, cell in enumerate(form):
        if cell != image:
            pieces[-1].append(cell)
        elif not i or form[i - 1] != image:
            pieces.append([])
    return pieces


def _second_turn(writer: _Writer) -> tuple[Cells, list[Cells]]:
    """(what stands before an earlier reply, what stands before the request of a second turn), empty for templates of one turn."""
    try:
        prompts = [[writer(_turn(a), text_turn("assistant", r), _turn(b)) for r, b in _SECOND_TURNS] for a in _TEXTS]
    except InputError as error:
        if not refused_by_template(error):
            raise
        return [], []
    replies = [_common_start(row[:2]) for row in prompts]
    return _common_end(replies), [_common_start(prompts[0][1:])]


def _second_opening(writer: _Writer, image: int, before: Cells) -> list[Cells]:
    """What stands before an image with which a second turn opens; `before`: what stands before image tokens."""
    shown = writer.or_none(_turn("Hello"), text_turn("assistant", "Fine"), _turn(_TEXTS[0], 1))
    if shown is None or image not in shown:
        return []
    start = shown[: shown.index(image)]
    return [start[: len(start) - len(before)]] if start[len(start) - len(before) :] == before else []


def _heads(contexts: Sequence[Cells]) -> tuple[Parts, ...]:
    """What all turns start with; each kind's own where they have nothing in common, as roles behind what is said have not."""
    shared = _shared_end(contexts)
    return _distinct([shared] if shared else [_shared_end([context]) for context in contexts])


def _shared_end(contexts: Sequence[Cells]) -> Cells:
    """What all contexts end with; of a single one what follows its last special token, and that token."""
    if len(contexts) > 1:
        return _common_end(contexts)
    only = contexts[0]
    last = max((i for i, cell in enumerate(only) if isinstance(cell, int)), default=0)
    return only[last:]


def _common(one: Sequence[str | int], two: Sequence[str | int]) -> int:
    length = 0
    for a, b in zip(one, two, strict=False):
        if a != b:
            break
        length += 1
    return length


def _common_start(prompts: Iterable[Cells]) -> Cells:
    first, *others = prompts
    return first[: min((_common(first, other) for other in others), default=len(first))]


def _common_end(prompts: Sequence[Cells]) -> Cells:
    return _common_start([p[::-1] for p in prompts])[::-1]


def _parts(cells: Cells) -> Parts:
    """Neighbouring characters as one string."""
    parts: list[str | int] = []
    for cell in cells:
        last = parts[-1] if parts else None
        if isinstance(cell, str) and isinstance(last, str):
            parts[-1] = last + cell
        else:
            parts.append(cell)
    return tuple(parts)


def _distinct(pieces: Iterable[Cells]) -> tuple[Parts, ...]:
    return tuple(dict.fromkeys(_parts(piece) for piece in pieces))
