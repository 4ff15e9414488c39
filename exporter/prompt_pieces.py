"""The token ids around the slots of a chat template, found by varying what stands in the slots.

`generate()` of an exported checkpoint has tokens and no tokenizer, so it composes caption requests and text-only counterparts
from these pieces (`PromptPieces` in modeling_shiftdc_prompts.py says how).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from exporter.errors import InputError
from exporter.modeling.modeling_shiftdc_prompts import PromptPieces
from exporter.recipes import Prompts
from exporter.templates import rendered
from exporter.vlm import VLM, user_turn

# texts that share no first and no last token, with and without a token of their own for " How"
_TEXTS = ("How to", "zebras? 7", "Alpha one")
# width and height of images that processors cut into as many tiles, columns and rows as they ever do
_SHAPES = ((64, 64), (1536, 1536), (1536, 96), (96, 1536), (1536, 512))


def prompt_pieces(vlm: VLM, prompts: Prompts) -> dict[str, Any]:
    """`first_turn_head`, `turn_head`, `image_*`, `tail`: token ids; `caption`, `text`: lists of such lists (`PromptPieces`).

    Raises InputError where the template gives no prompt from which they can be read off.
    """
    image = Image.new("RGB", (64, 64), (127, 127, 127))
    text_head, tail = _around(lambda t: vlm.token_ids(t))
    block = _image_block(vlm, image, text_head)
    spaces = _carried_spaces(vlm, image, block["image_tail"])
    ask, _, ask_end = prompts.caption.partition("{request}")
    before, rest = prompts.text_counterpart.split("{request}")
    between, after = rest.split("{caption}")
    pieces = {
        "first_turn_head": text_head,
        "turn_head": _turn_head(vlm),
        **block,
        "tail": tail,
        "caption": [_piece(vlm, _before_slot(ask, spaces.request)), _piece(vlm, ask_end)],
        "text": [
            _piece(vlm, _before_slot(before, spaces.request)),
            _piece(vlm, between.removesuffix(spaces.reply)),
            _piece(vlm, after),
        ],
    }
    pieces = _with_readable_head(vlm, image, pieces)
    if "{request}" not in prompts.caption:  # it stands where a request would
        asked = vlm.token_ids(prompts.caption, image)
        start, end = PromptPieces(pieces, vlm.image_token_id).request_span(asked)
        pieces["caption"] = [asked[start:end]]
    return pieces


@dataclass(frozen=True)
class _Spaces:
    """White space of the template that is part of a request's, or of a reply's, first token."""

    request: str
    reply: str


def _carried_spaces(vlm: VLM, image: Image.Image, image_tail: list[int]) -> _Spaces:
    reply = {"role": "assistant", "content": [{"type": "text", "text": "Fine"}]}
    turns = [user_turn("Hello", image), reply]
    asked = rendered(vlm.processor, turns[:1], add_generation_prompt=True)
    before_request = asked[: asked.index("Hello")]
    space = before_request[len(before_request.rstrip(" ")) :]
    if vlm.tokenizer.decode(image_tail).endswith(" "):
        space = ""
    try:
        answered = rendered(vlm.processor, turns)
    except TemplateError:  # some templates take one turn
        return _Spaces(space, "")
    before_reply = answered[: answered.index("Fine")]
    return _Spaces(space, before_reply.removeprefix(asked) if before_reply.startswith(asked) else "")


def _before_slot(text: str, carried: str) -> str:
    """`text` in front of a request that brings its own leading space along."""
    return carried + text.removesuffix(carried) if carried and text else text


def _piece(vlm: VLM, text: str) -> list[int]:
    """Token ids of `text` in the middle of a prompt. Raises InputError if the tokenizer cannot say."""
    if not text:
        return []
    # a tokenizer may treat the start of a text, or what follows a special token, in its own way
    for anchor in ("a\n", "a:", "\n", ""):
        alone, together = (vlm.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (anchor, anchor + text))
        expected = (vlm.tokenizer.decode(alone) + text).lower()  # some tokenizers lower-case
        if together[: len(alone)] == alone and vlm.tokenizer.decode(together).lower() == expected:
            return together[len(alone) :]
    raise InputError(f"Recipe: the tokenizer does not give back the prompt text {text!r}; choose another wording.")


def _around(render: Callable[[str], list[int]]) -> tuple[list[int], list[int]]:
    """Token ids before and after the slot that `render` fills."""
    first, *others = map(render, _TEXTS)
    start = min(_common_prefix(first, other) for other in others)
    end = min(_common_prefix(first[start:][::-1], other[start:][::-1]) for other in others)
    return first[:start], first[len(first) - end :]


def _image_block(vlm: VLM, image: Image.Image, text_head: list[int]) -> dict[str, list[int]]:
    """`image_head`, `image_instead`, `image_tail`, `image_inside`, `image_markers`: what the template and the processor add."""
    before, _ = _around(lambda t: vlm.token_ids(t, image))
    if vlm.image_token_id not in before:
        raise InputError("MODEL: its chat template puts no image token before the request; its prompts cannot be composed.")
    behind = len(before) - before[::-1].index(vlm.image_token_id)
    head = before[: before.index(vlm.image_token_id)]
    shared = _common_prefix(head, text_head)
    marks = _marks(vlm)
    inside: set[int] = set()
    markers: set[int] = set()
    for pictures in [*([image.resize(size)] for size in _SHAPES), [image, image]]:
        try:
            ids = vlm.encode_conversations([[user_turn(_TEXTS[0], *pictures)]])["input_ids"][0].tolist()
        except TemplateError:  # some templates take one image
            continue
        first, last = ids.index(vlm.image_token_id), len(ids) - ids[::-1].index(vlm.image_token_id)
        inside |= set(ids[first:last]) - {vlm.image_token_id}
        markers |= (set(ids[shared:first]) | inside) & marks
    return {
        "image_head": head[shared:],
        "image_instead": text_head[shared:],
        "image_tail": before[behind:],
        "image_inside": sorted(inside),
        "image_markers": sorted(markers),
    }


def _marks(vlm: VLM) -> set[int]:
    """Ids of special and added tokens, without those of white space."""
    ids = {*vlm.tokenizer.all_special_ids, *vlm.tokenizer.get_added_vocab().values()}
    return {t for t in ids if vlm.tokenizer.decode([t]).strip()}


def _with_readable_head(vlm: VLM, image: Image.Image, pieces: dict[str, Any]) -> dict[str, Any]:
    """`pieces` with the image head that leaves a prompt reading as the template's text prompt, without the image.

    A tokenizer may join the white space before an image to the image's own, or leave it to the request's first token; a
    template may have a space before a text and none before an image.
    """
    markers_only = [t for t in pieces["image_head"] if t in _marks(vlm)]
    space = vlm.tokenizer(" ", add_special_tokens=False)["input_ids"]
    for head, instead in ((markers_only, []), (pieces["image_head"], pieces["image_instead"]), (markers_only, space)):
        tried = {**pieces, "image_head": head, "image_instead": instead}
        composed = PromptPieces(tried, vlm.image_token_id).text_prompt(vlm.token_ids(_TEXTS[0], image))
        if vlm.tokenizer.decode(composed) == vlm.tokenizer.decode(vlm.token_ids(_TEXTS[0])):
            return tried
    raise InputError(
        "MODEL: without the image its chat template's prompt does not read as its text prompt; its text-only counterparts "
        "cannot be composed."
    )


def _turn_head(vlm: VLM) -> list[int]:
    """What stands between an assistant's reply and the user's next request; empty for templates of one turn."""

    def second_turn(answer: str, request: str) -> list[int]:
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        return vlm.encode_conversations([[user_turn("Hello"), reply, user_turn(request)]])["input_ids"][0].tolist()

    try:
        before_request, _ = _around(lambda t: second_turn("Fine", t))
        _, after_answer = _around(lambda t: second_turn(t, _TEXTS[0]))
    except TemplateError:  # some templates raise on several turns
        return []
    whole = second_turn("Fine", _TEXTS[0])
    return before_request[len(whole) - len(after_answer) :]


def _common_prefix(one: list[int], two: list[int]) -> int:
    length = 0
    for a, b in zip(one, two, strict=False):
        if a != b:
            break
        length += 1
    return length
