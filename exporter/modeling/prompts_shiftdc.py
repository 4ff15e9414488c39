# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""Caption requests and text-only counterparts of prompts, token for token as the chat template would give them.

It imports neither torch nor transformers, so that runtimes without them can use it too.

`generate()` is given token ids. What it derives from them differs from the prompt by text (a caption request around the
user's request, a caption in place of the image), and tokens join across such seams. So a prompt is turned back into text,
changed there, and tokenised again with the checkpoint's own tokenizer. Special tokens are never part of that text: each is one
private character, which no text can hold, and the tokenizer sees only what stands between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Text around special tokens, as JSON: strings, and the ids of special tokens between them.
Parts = tuple[str | int, ...]
#: What stands before and behind the image tokens of an image, and whether such an image ends its turn.
Around = tuple[Parts, Parts, bool]
#: Special tokens are lone surrogates, which valid text does not have.
_FIRST_MARK, _LAST_MARK = 0xD800, 0xDFFF
_MARK = re.compile("[\ud800-\udfff]")


class Codec(Protocol):
    """What is needed of a tokenizer."""

    #: Ids of special tokens, at which tokenizers cut a text before anything else.
    special: frozenset[int]
    #: Id that stands before the text of a prompt without being written in it; None where there is none.
    bos: int | None

    def encode(self, text: str, *, plain: bool = False) -> list[int]:
        """Without a first token of its own; plain: also what reads as a special token is text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens included, nothing cleaned up."""

    def text(self, ids: Sequence[int]) -> str:
        """What generated ids say, without special tokens and without white space around it."""

    def written(self, token: int) -> str:
        """How a special token is written."""


@dataclass(frozen=True)
class PromptFrame:
    """What a chat template and a processor write around requests and images; found by the exporter, kept in config.json.

    heads: what a user's turn starts with; several where the first turn and later ones have nothing in common.
    tail: the generation prompt. reply: what stands before an earlier reply.
    opening, gap: what a turn that starts with an image has before and behind it.
    around, between: what stands around and between the image tokens of one image, in every form (digits stand for any digits).
    instead: what a text-only prompt has in place of images, at the start of a turn and elsewhere.
    caption, text: wording of the caption request and of the text-only counterpart.
    bos_added: the tokenizer adds the first token; the template does not write it.
    own: text-only prompts are what is left of prompts with an image, because without one the template writes more.
    trims: the template takes white space at the beginning and at the end of a turn away.
    """

    heads: tuple[Parts, ...]
    tail: Parts
    reply: Parts
    opening: Parts
    gap: Parts
    around: tuple[Around, ...]
    between: tuple[Parts, ...]
    instead: tuple[str, str]
    caption: str
    text: str
    bos_added: bool
    own: bool = False
    trims: bool = False

    def as_json(self) -> dict[str, object]:
        """Plain lists, strings and numbers."""
        return {k: _listed(v) for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> PromptFrame:
        """What `as_json` was made from."""
        return cls(**{k: _tupled(v) for k, v in values.items()})


@dataclass(frozen=True)
class Flat:
    """A prompt as text with one character for each special token; `ids` of these, and of the runs of text between them."""

    text: str
    marks: dict[int, str]
    runs: dict[tuple[int | None, str], list[int]]


class PromptComposer:
    """Derives prompts from a prompt with an image. All prompts are lists of token ids, without padding.

    frame: of the checkpoint. codec: its tokenizer. image_token_id: the id that stands for a part of an image.
    """

    def __init__(self, frame: PromptFrame, codec: Codec, image_token_id: int):
        self.frame, self.codec, self.image_token_id = frame, codec, image_token_id
        self.special = codec.special | {image_token_id}
        edges = (frame.tail, frame.reply, frame.opening, frame.gap)
        beside = [parts for before, after, _ in frame.around for parts in (before, after)]
        used = [*frame.heads, *edges, *beside, *frame.between]
        self._marks: dict[int, str] = {}
        for token in (image_token_id, *(p for parts in used for p in parts if isinstance(p, int))):
            self._marks.setdefault(token, chr(_FIRST_MARK + len(self._marks)))
        self._heads = [self._text(head) for head in frame.heads]
        self._tail, self._reply, self._opening, self._gap = map(self._text, edges)
        self._turn_ends = tuple(end for end in (self._tail, self._reply) if end) or ("",)
        self._around = [(self._text(before), self._text(after), ends_turn) for before, after, ends_turn in frame.around]
        self._images = self._images_pattern()
        self._ways: dict[int, bool] = {}

    def caption_prompt(self, ids: Sequence[int]) -> list[int]:
        """The prompt that asks the model for a caption, in view of the request where the wording has a slot; the image stays."""
        flat = self.flat(ids)
        start, end = self._request(flat.text)
        before, request, behind = flat.text[:start], flat.text[start:end], flat.text[end:]
        asked = self._trimmed(before, filled(self.frame.caption, request=request), behind)
        return self._encoded(flat, before + asked + behind)

    def text_prompt(self, ids: Sequence[int], caption: Sequence[int] | str | None = None) -> list[int]:
        """The text-only counterpart: no image, and the caption in its place (None: the request alone)."""
        flat = self.flat(ids)
        start, end = self._request(flat.text)
        before, request, behind = flat.text[:start], flat.text[start:end], flat.text[end:]
        if caption is not None:
            shown = caption.strip() if isinstance(caption, str) else self.codec.text(caption)
            request = filled(self.frame.text, request=request, caption=_MARK.sub("\ufffd", shown))
        request = self._trimmed(self._without_images(before), request, self._without_images(behind))
        return self._encoded(flat, self._without_images(before + request + behind))

    def image_prefix(self, ids: Sequence[int]) -> list[int]:
        """The beginning that a prompt has in common with its caption prompt, up to its last image token.

        Empty where there is none: the request stands before the image, or nothing stands behind it.
        """
        ids, asked = list(ids), self.caption_prompt(ids)
        end = max((i + 1 for i, t in enumerate(ids) if t == self.image_token_id), default=0)
        return ids[:end] if asked[:end] == ids[:end] and end < min(len(ids), len(asked)) else []

    def request(self, ids: Sequence[int]) -> str:
        """The text of the request of the last user turn."""
        flat = self.flat(ids)
        start, end = self._request(flat.text)
        return self._written(flat, flat.text[start:end])

    @property
    def has_prompt_end(self) -> bool:
        """Whether the template ends its prompts with something of its own."""
        return bool(self._tail)

    def prompt_end(self, ids: Sequence[int]) -> int | None:
        """Index of the last token of the last generation prompt; None without one, or where another turn begins after it."""
        text = self.flat(ids).text
        at = text.rfind(self._tail) if self._tail else -1
        behind = at + len(self._tail)
        if at < 0 or any(head and head in text[behind:] for head in self._heads):
            return None
        return self._tokens_up_to(list(ids), behind) - 1

    def flat(self, ids: Sequence[int]) -> Flat:
        """`ids` as text."""
        marks, runs, text = dict(self._marks), {}, []
        before: int | None = None
        for token, run in _runs(ids, self.special):
            if run:
                words = self._decoded(before, run)
                runs[before, words] = run
                text.append(words)
            if token is not None:
                text.append(marks.setdefault(token, chr(_FIRST_MARK + len(marks))))
                before = self._context(token, first=not runs)
        if _FIRST_MARK + len(marks) - 1 > _LAST_MARK:
            raise ValueError(f"The prompt holds {len(marks)} different special tokens, more than can be told apart.")
        return Flat("".join(text), marks, runs)

    def _request(self, text: str) -> tuple[int, int]:
        """Where the request of the last user turn stands in a flat text: [start, end)."""
        end = text.rfind(self._tail)
        end = len(text) if end < 0 else end
        reply = text[:end].rfind(self._reply) if self._reply else -1
        turn = reply + len(self._reply) if reply >= 0 else 0
        head = self._head(text, turn, end)
        start = head[1] if head else turn
        images = [found.span() for found in self._images.finditer(text, turn) if found.end() <= end]
        if not images:
            return start, end
        if head is None or images[0][0] < head[0]:  # the turn opens with an image
            start = images[0][0]
        last_start, last_end = images[-1]
        if text[start:last_start].strip() and not text[last_end:end].strip():  # the request stands before the image
            return max([start, *(stop for _, stop in images[:-1])]), last_start
        start = max(start, last_end)
        return min(start + len(self._gap) if text.startswith(self._gap, start) else start, end), end

    def _head(self, text: str, start: int, end: int) -> tuple[int, int] | None:
        """Where the first head in text[start:end] stands."""
        found = [(text.find(head, start, end), head) for head in self._heads]
        return min(((at, at + len(head)) for at, head in found if at >= 0), default=None)

    def _trimmed(self, before: str, request: str, behind: str) -> str:
        """Some templates take white space at the beginning and at the end of a turn away."""
        if self.frame.trims and before.endswith(tuple(self._heads)):
            request = request.lstrip()
        return request.rstrip() if self.frame.trims and behind.startswith(self._turn_ends) else request

    def _without_images(self, text: str) -> str:
        def instead(found: re.Match[str]) -> str:
            return self.frame.instead[0 if text[: found.start()].endswith(self._opening) else 1]

        return self._images.sub(instead, text)

    def _images_pattern(self) -> re.Pattern[str]:
        """One or more images that stand side by side."""
        mark = self._marks[self.image_token_id]
        tokens = f"{mark}+(?:{_either(map(self._text, self.frame.between))}{mark}+)*"
        images = [
            f"{_digits(before)}{tokens}{self._behind_images(before)}"
            for before in _longest(before for before, *_ in self._around)
        ]
        return re.compile(f"(?:{'|'.join(images)})+")

    def _behind_images(self, before: str) -> str:
        """A pattern of what stands behind images that have `before` before them."""
        turn_end = f"(?={_either(self._turn_ends)})"
        here = sorted((a for a in self._around if a[0] == before), key=lambda a: (len(a[1]), a[2]), reverse=True)
        return f"(?:{'|'.join(_digits(after) + (turn_end if ends_turn else '') for _, after, ends_turn in here)})"

    def _text(self, parts: Iterable[str | int]) -> str:
        return "".join(self._marks[p] if isinstance(p, int) else p for p in parts)

    def _written(self, flat: Flat, text: str) -> str:
        tokens = {mark: token for token, mark in flat.marks.items()}
        return _MARK.sub(lambda mark: self.codec.written(tokens[mark[0]]), text)

    def _encoded(self, flat: Flat, text: str) -> list[int]:
        """Token ids of a flat text. Runs that stood in the original keep its tokens."""
        tokens = {mark: token for token, mark in flat.marks.items()}
        ids: list[int] = []
        before: int | None = None
        read_any = False
        for run, mark in re.findall("([^\ud800-\udfff]*)([\ud800-\udfff]?)", text):
            if run:
                ids += flat.runs.get((before, run)) or self._in_context(before, run)
            if mark:
                read_any = read_any or bool(run)
                before = self._context(tokens[mark], first=not read_any)
                ids.append(tokens[mark])
        return ids

    def _context(self, token: int, *, first: bool) -> int | None:
        """What text behind `token` is tokenised after: None where the tokenizer that adds this token sees its first text."""
        return None if first and self.frame.bos_added and token == self.codec.bos else token

    def _in_context(self, before: int | None, run: str) -> list[int]:
        """Token ids of text behind the special token `before`; no special token comes of it, whatever it reads like."""
        ids = self._tokens(before, run)
        return self.codec.encode(run, plain=True) if self.special.intersection(ids) else ids

    def _tokens(self, before: int | None, run: str) -> list[int]:
        if before is None:
            return self.codec.encode(run)
        ids = self.codec.encode(self.codec.written(before) + run)
        return ids[1:] if ids[:1] == [before] else self.codec.encode(run)

    def _decoded(self, before: int | None, run: list[int]) -> str:
        """The text of a run. Some tokenizers drop a space at the beginning of what they decode, which others wrote."""
        if before is None or not self._keeps_space(before):
            return _MARK.sub("\ufffd", self.codec.decode(run))
        anchor = self.codec.decode([before])
        return _MARK.sub("\ufffd", self.codec.decode([before, *run]).removeprefix(anchor))

    def _keeps_space(self, before: int) -> bool:
        """Whether a run must be decoded together with the special token before it, lest it lose a space."""
        if before not in self._ways:
            anchor = self.codec.decode([before])
            self._ways[before] = all(
                self.codec.decode([before, *self._tokens(before, text)]) == anchor + text for text in ("a b", " a b")
            )
        return self._ways[before]

    def _tokens_up_to(self, ids: list[int], length: int) -> int:
        """How many tokens at the beginning of `ids` give the first `length` characters of its flat text."""
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(self.flat(ids[:middle]).text) >= length else (middle + 1, high)
        return low


class TokenizerCodec:
    """A tokenizer of transformers as a `Codec`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        unknown = {tokenizer.unk_token_id} - named  # it stands for text
        self.special = frozenset({*(i for i, t in added.items() if t.special), *tokenizer.all_special_ids}) - unknown
        self.bos: int | None = tokenizer.bos_token_id

    def encode(self, text: str, *, plain: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain, verbose=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    def written(self, token: int) -> str:
        return self.tokenizer.convert_ids_to_tokens(token)


def filled(wording: str, **slots: str) -> str:
    """`wording` with its slots `{name}` filled; what is filled in is taken as it is."""
    return re.sub(r"\{(\w+)\}", lambda slot: slots.get(slot[1], slot[0]), wording)


def _runs(ids: Iterable[int], special: frozenset[int]) -> Iterable[tuple[int | None, list[int]]]:
    """(special token or None at the end, tokens before it that are not special)."""
    run: list[int] = []
    for token in map(int, ids):
        if token in special:
            yield token, run
            run = []
        else:
            run.append(token)
    yield None, run


def _either(texts: Iterable[str]) -> str:
    """A pattern of one of `texts`, the longest that fits."""
    return f"(?:{'|'.join(map(_digits, _longest(texts)))})"


def _longest(texts: Iterable[str]) -> list[str]:
    """The longest first."""
    return sorted(set(texts), key=len, reverse=True)


def _digits(text: str) -> str:
    """A pattern of `text`, in which digits stand for any digits."""
    return re.sub("[0-9]+", "[0-9]+", re.escape(text))


def _listed(value: object) -> object:
    return [_listed(v) for v in value] if isinstance(value, (tuple, list)) else value


def _tupled(value: object) -> Any:
    return tuple(_tupled(v) for v in value) if isinstance(value, list) else value
