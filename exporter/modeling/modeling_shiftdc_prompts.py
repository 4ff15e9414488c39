"""Caption requests and text-only counterparts of prompts, composed in token space; travels inside exported checkpoints."""

from __future__ import annotations

from typing import Any


class PromptPieces:
    """Builds caption requests and text-only counterparts of prompts, in token space.

    The pieces are token ids around the slots of the chat template (config.shiftdc["prompt"], found by the exporter):
    `first_turn_head` opens the first user turn and `turn_head` every other, `image_head`/`image_tail` enclose an image (a text
    prompt has `image_instead` in their place), `image_inside` are all the ids that may stand between image tokens of one image
    and `image_markers` those that may stand before the first, `tail` ends the prompt; `caption` = [before, after] the request, or
    [what stands in its place]; `text` = [before the request, between request and caption, after].
    """

    def __init__(self, pieces: dict[str, Any], image_token_id: int):
        self.first_turn_head: list[int] = pieces["first_turn_head"]
        self.turn_head: list[int] = pieces["turn_head"]
        self.image_head: list[int] = pieces["image_head"]
        self.image_tail: list[int] = pieces["image_tail"]
        self.image_instead: list[int] = pieces.get("image_instead", [])
        self.image_inside: set[int] = set(pieces.get("image_inside", ()))
        self.image_markers: set[int] = set(pieces.get("image_markers", ()))
        self.tail: list[int] = pieces["tail"]
        self.caption: list[list[int]] = pieces["caption"]
        self.text: list[list[int]] = pieces["text"]
        self.image_token_id = image_token_id

    def request_span(self, ids: list[int]) -> tuple[int, int]:
        """Where the request of the last user turn stands: [start, end) in `ids`."""
        end = _last_occurrence(ids, self.tail, len(ids))
        end = len(ids) if end is None else end
        turn = _last_occurrence(ids, self.turn_head, end)
        if turn is None:
            turn = _common_prefix(ids, self.first_turn_head)
        else:
            turn += len(self.turn_head)
        start = max(turn, self._after_images(ids[:end]))
        return (start, end) if start < end else (turn, end)  # the image may also stand behind the request

    @property
    def has_prompt_end(self) -> bool:
        """Whether the template ends its prompts with something of its own."""
        return bool(self.tail)

    def prompt_end(self, ids: list[int]) -> int | None:
        """Index of the last token of the last generation prompt; None without one, or where another turn begins after it."""
        start = _last_occurrence(ids, self.tail, len(ids))
        if start is None:
            return None
        behind = start + len(self.tail)
        goes_on = _last_occurrence(ids[behind:], self.turn_head, len(ids) - behind) is not None
        return None if goes_on else behind - 1

    def caption_prompt(self, ids: list[int]) -> list[int]:
        """The prompt that asks the model for a caption, in view of the request if the wording has a slot; the image stays."""
        start, end = self.request_span(ids)
        if len(self.caption) == 1:  # no slot; an image behind the request stays
            kept = ids[start:end] if self.image_token_id in ids[start:end] else []
            return ids[:start] + self.caption[0] + kept + ids[end:]
        before, after = self.caption
        return ids[:start] + before + ids[start:end] + after + ids[end:]

    def image_prefix(self, ids: list[int]) -> list[int]:
        """The beginning that a prompt has in common with its caption prompt, up to the end of the last image.

        Empty where there is none: the image stands behind the request, or nothing behind the image.
        """
        end, asked = self._after_images(ids), self.caption_prompt(ids)
        shared = asked[:end] == ids[:end] and self.image_token_id not in asked[end:]
        return ids[:end] if shared and end < min(len(ids), len(asked)) else []

    def text_prompt(self, ids: list[int], caption: list[int] | None = None) -> list[int]:
        """The text-only counterpart: no image, and the caption in its place (None: the request alone)."""
        start, end = self.request_span(ids)
        request = self.without_images(ids[start:end])
        if caption is not None:
            before, between, after = self.text
            request = before + request + between + caption + after
        return self.without_images(ids[:start]) + request + ids[end:]

    def without_images(self, ids: list[int]) -> list[int]:
        kept: list[int] = []
        i = 0
        while i < len(ids):
            if ids[i] != self.image_token_id:
                kept.append(ids[i])
                i += 1
                continue
            if kept[len(kept) - len(self.image_head) :] == self.image_head:
                kept[len(kept) - len(self.image_head) :] = self.image_instead
            elif kept and kept[-1] in self.image_markers:  # the opening differs with the number of tiles
                while kept and kept[-1] in self.image_markers:
                    del kept[-1]
                kept += self.image_instead if self.image_markers.issuperset(self.image_head) else []
            i = self._image_end(ids, i)
            if ids[i : i + len(self.image_tail)] == self.image_tail:
                i += len(self.image_tail)
        return kept

    def _after_images(self, ids: list[int]) -> int:
        """Behind the last image and its tail; 0 without an image."""
        end = max((i + 1 for i, t in enumerate(ids) if t == self.image_token_id), default=0)
        has_tail = end and ids[end : end + len(self.image_tail)] == self.image_tail
        return end + len(self.image_tail) if has_tail else end

    def _image_end(self, ids: list[int], start: int) -> int:
        """Behind the last image token of the image whose first is at `start`, over its tile and row markers."""
        end = start
        for i in range(start, len(ids)):
            if ids[i] == self.image_token_id:
                end = i + 1
            elif ids[i] not in self.image_inside:
                break
        return end


def _common_prefix(ids: list[int], piece: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(ids, piece, strict=False)) if a != b), min(len(ids), len(piece)))


def _last_occurrence(ids: list[int], piece: list[int], end: int) -> int | None:
    """Start of the last occurrence of `piece` that ends at or before `end`; None for none or an empty piece."""
    if not piece:
        return None
    starts = range(end - len(piece), -1, -1)
    return next((i for i in starts if ids[i : i + len(piece)] == piece), None)
