"""The token ids around the slots of a chat template, found by varying what stands in the slots.

`generate()` of an exported checkpoint has tokens and no tokenizer, so it composes caption requests and text-only counterparts
from these pieces (`PromptPieces` in modeling_shiftdc.py says how).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from exporter.errors import InputError
from exporter.recipes import Prompts
from exporter.vlm import VLM, user_turn

# texts that share no first and no last token, with and without a token of their own for " How"
_TEXTS = ("How to", "zebras? 7", "Alpha one")


def prompt_pieces(vlm: VLM, prompts: Prompts) -> dict[str, Any]:
    """`first_turn_head`, `turn_head`, `image_head`, `image_tail`, `tail`: token ids; `caption`, `text`: lists of such lists.

    Raises InputError where the template gives no prompt from which they can be read off.
    """
    image = Image.new("RGB", (64, 64), (127, 127, 127))
    text_head, tail = _around(lambda t: vlm.token_ids(t))
    head, image_ids, image_tail = _image_block(vlm, image)
    special = set(vlm.tokenizer.all_special_ids)
    image_head = head[_common_prefix(head, text_head) :]
    caption_head, caption_tail = _around(lambda t: vlm.token_ids(prompts.caption_request(t), image))
    before_request, _ = _around(lambda t: vlm.token_ids(prompts.counterpart(t, "Fine")))
    before_caption, after_caption = _around(lambda t: vlm.token_ids(prompts.counterpart("Hello", t)))
    alone = vlm.token_ids("Hello")
    ask = caption_head[len(head) + len(image_ids) + len(image_tail) :]
    before = before_request[len(text_head) :]
    between = before_caption[len(before) + len(alone) - len(tail) :]
    request_space, caption_space = _missing_spaces(vlm, image)
    return {
        "first_turn_head": text_head,
        "turn_head": _turn_head(vlm),
        "image_head": [t for t in image_head if t in special],
        "image_tail": image_tail,
        "tail": tail,
        "caption": [
            ask + (request_space if prompts.caption.split("{request}")[0].endswith(" ") else []),
            caption_tail[: len(caption_tail) - len(tail)],
        ],
        "text": [
            before + (request_space if prompts.text_counterpart.split("{request}")[0].endswith(" ") else []),
            between + (caption_space if prompts.text_counterpart.split("{caption}")[0].endswith(" ") else []),
            after_caption[: len(after_caption) - len(tail)],
        ],
    }


def _missing_spaces(vlm: VLM, image: Image.Image) -> tuple[list[int], list[int]]:
    """The token of a lone space, where requests of image prompts and generated captions do not carry their leading space."""
    vocabulary = vlm.tokenizer.get_vocab()
    space = next(([vocabulary[t]] for t in ("\u2581", "\u0120") if t in vocabulary), [])
    reply = {"role": "assistant", "content": [{"type": "text", "text": "Fine"}]}
    text = vlm.processor.apply_chat_template([user_turn("Hello", image), reply], tokenize=False)
    request_carries, reply_carries = (text[text.index(word) - 1] == " " for word in ("Hello", "Fine"))
    return [] if request_carries else space, [] if reply_carries else space


def _around(render: Callable[[str], list[int]]) -> tuple[list[int], list[int]]:
    """Token ids before and after the slot that `render` fills."""
    first, *others = map(render, _TEXTS)
    start = min(_common_prefix(first, other) for other in others)
    end = min(_common_prefix(first[start:][::-1], other[start:][::-1]) for other in others)
    return first[:start], first[len(first) - end :]


def _image_block(vlm: VLM, image: Image.Image) -> tuple[list[int], list[int], list[int]]:
    """(everything before the image tokens, the image tokens, what the template puts between them and the request)."""
    before, _ = _around(lambda t: vlm.token_ids(t, image))
    if vlm.image_token_id not in before:
        raise InputError("MODEL: its chat template puts no image token before the request; its prompts cannot be composed.")
    first = before.index(vlm.image_token_id)
    last = len(before) - 1 - before[::-1].index(vlm.image_token_id)
    return before[:first], before[first : last + 1], before[last + 1 :]


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
