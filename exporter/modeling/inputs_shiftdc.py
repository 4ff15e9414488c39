# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""A batch of prompts as generate() and forward() get it: which rows hold an image, where prompts end, how rows are padded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from .prompts_shiftdc import PromptComposer

#: Keyword arguments of generate() or forward().
Arguments = dict[str, Any]
#: Those of them that describe images: pixels, what the processor gives beside them, settings of the vision tower.
Images = dict[str, Any]

UNMARKED_IMAGE = (
    "An image is given that no image token in input_ids stands for, so its row cannot be calibrated: let the processor write the "
    "prompt, leave the image out, or pass shiftdc=False (no calibration)."
)
#: Arguments of forward() that describe text, caching or output; all others describe the image.
_NOT_IMAGE_INPUTS = {
    "self", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "cache_position", "labels",
    "use_cache", "logits_to_keep", "output_attentions", "output_hidden_states", "return_dict", "kwargs", "token_type_ids",
    "mm_token_type_ids", "rope_deltas", "shiftdc", "shiftdc_reference", "shiftdc_correction", "shiftdc_position",
}  # fmt: skip
#: Arguments that say of each token whether it is part of an image; made anew for prompts that are composed here.
TOKEN_TYPES = frozenset({"token_type_ids", "mm_token_type_ids"})
#: Parts of the names of arguments that hold sounds.
_OF_SOUNDS = ("audio", "input_features", "feature_attention_mask")
#: Arguments that describe where the prompts of a packed row begin.
_OF_PACKED_ROWS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts.

    Args:
        ids (`torch.LongTensor` of shape `(batch, time)`):
            Token ids.
        mask (`torch.LongTensor` of shape `(batch, time)` or `None`):
            0 at padding; None where the caller gave none.
        images (`dict`):
            The arguments of forward() that describe the images of these rows.
        rows (`torch.BoolTensor` of shape `(batch,)`):
            The rows that hold an image. Pixels may be absent, so token ids decide.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    images: Images
    rows: torch.Tensor

    @property
    def arguments(self) -> Arguments:
        """As generate() and forward() take it."""
        masked = {} if self.mask is None else {"attention_mask": self.mask}
        return {"input_ids": self.ids, **masked, **self.images}


@dataclass(frozen=True)
class ImageArguments:
    """The arguments by which a family's forward() is given images.

    names: all of them. by_row: `row_inputs` of the traits. token_inputs: `shiftdc_token_inputs` of the model class.
    """

    names: frozenset[str]
    by_row: frozenset[str]
    token_inputs: Callable[[torch.Tensor, Images], Images]
    image_token_id: int
    video_token_id: int | None

    def among(self, arguments: Arguments) -> Images:
        """Those that a call of generate() or forward() has."""
        return {k: v for k, v in arguments.items() if k in self.names and v is not None}

    def prompt(self, ids: torch.Tensor, mask: torch.Tensor | None, images: Images) -> Prompt:
        return Prompt(ids, mask, images, (ids == self.image_token_id).any(-1))

    def refuse_other_media(self, prompt: Prompt) -> None:
        """Raise ValueError for videos that no image token stands for, and for sounds beside an image.

        A video would go uncalibrated; a text-only counterpart would keep a sound's tokens without the sound.
        """
        unknown = self.video_token_id is None and any("video" in name for name in prompt.images)
        if unknown or (self.video_token_id is not None and bool((prompt.ids == self.video_token_id).any())):
            raise ValueError(
                "The prompt holds a video, which calibration does not know; give its frames as images, or pass shiftdc=False "
                "(no calibration)."
            )
        if prompt.rows.any() and any(mark in name for name in prompt.images for mark in _OF_SOUNDS):
            raise ValueError(
                "A sound is given beside an image, which calibration does not know; leave it out, or pass shiftdc=False (no "
                "calibration)."
            )

    def of_rows(self, images: Images, rows: torch.Tensor) -> Images:
        """`images`, for these rows alone; the other rows hold none, and may have no entry."""
        return {k: v[rows] if k in self.by_row and len(v) == len(rows) else v for k, v in images.items()}

    def for_tokens(self, ids: torch.Tensor, given: Images) -> Images:
        """The arguments that are as long as the prompt, for prompts `ids` that were composed here; given: the original ones."""
        return self.token_inputs(ids, given)

    def without_tokens(self, images: Images, ids: torch.Tensor) -> Images:
        """`images`, of prompts `ids`, without the arguments that are as long as the prompt."""
        made = self.for_tokens(ids[:, :1], images).keys()
        return {k: v for k, v in images.items() if k not in made and not k.endswith("token_type_ids")}


def image_arguments(forward: Callable[..., object]) -> frozenset[str]:
    """The arguments of a `forward` of transformers that describe images."""
    return frozenset(inspect.signature(forward).parameters) - _NOT_IMAGE_INPUTS | TOKEN_TYPES


def require_pixels(images: Images) -> None:
    """Raise ValueError where image tokens stand for no image."""
    if not any(v is not None for k, v in images.items() if k not in TOKEN_TYPES):
        raise ValueError(
            "The prompt holds image tokens but no image was given, so no reference can be computed: pass pixel_values, "
            "shiftdc_reference= or shiftdc_captions=, or shiftdc=False (no calibration)."
        )


def require_input_ids(ids: torch.Tensor | None, kwargs: Arguments) -> torch.Tensor:
    """`ids` of a call of generate(). Raises ValueError where they do not show which rows hold an image."""
    if ids is None:
        raise ValueError("generate() needs input_ids to see which rows hold an image; or pass shiftdc=False (no calibration).")
    refuse_embeddings(kwargs)
    if kwargs.get("assistant_model") is not None:
        raise ValueError("assistant_model is not supported with calibration; drop it, or pass shiftdc=False (no calibration).")
    return ids


def refuse_embeddings(kwargs: Arguments) -> None:
    if kwargs.get("inputs_embeds") is not None:
        raise ValueError(
            "inputs_embeds may hold an image that input_ids do not show; give input_ids and pixels, or pass shiftdc=False "
            "(no calibration)."
        )


def refuse_packed_rows(arguments: Arguments, mask: torch.Tensor | None) -> None:
    """Raise ValueError where several prompts stand in one row: only the last of them would be calibrated."""
    positions = arguments.get("position_ids")
    packed = any(arguments.get(name) is not None for name in _OF_PACKED_ROWS)
    if positions is not None and positions.shape[-1] > 1:
        positions = positions if positions.ndim == 2 else positions[0]  # of several axes the first is time
        back = positions[:, 1:] < positions[:, :-1]
        if mask is not None:
            seen = mask[:, -positions.shape[1] :].to(positions.device) != 0
            back = back & seen[:, 1:] & seen[:, :-1]
        packed = packed or bool(back.any())
    if packed:
        raise ValueError(
            "A row holds several prompts (position_ids start anew in it), of which only one would be calibrated: give a row "
            "to each prompt, or pass shiftdc=False (no calibration)."
        )


@dataclass(frozen=True)
class Padding:
    """What stands in columns that a prompt leaves empty. token: `pad_token_id`. ends: ids that end a text."""

    token: int | None
    ends: frozenset[int]

    @property
    def filler(self) -> int:
        return self.token if self.token is not None else min(self.ends, default=0)

    def mask(self, ids: torch.Tensor) -> torch.Tensor:
        """What generate() assumes without an attention mask: padding is masked if it cannot be an end of text."""
        if self.token is None or self.token in self.ends:
            return torch.ones_like(ids)
        return (ids != self.token).long()

    def token_lists(self, prompt: Prompt) -> list[list[int]]:
        """The prompts of the rows that hold an image, without padding."""
        mask = prompt.mask if prompt.mask is not None else self.mask(prompt.ids)
        return [r[m.bool()].tolist() for r, m in zip(prompt.ids[prompt.rows], mask[prompt.rows], strict=True)]


def align_prefixes(
    prefixes: Sequence[list[int]], rests: Sequence[list[int]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), int64 [batch, time], of rows laid out as [padding | prefix | padding | rest]."""
    ids, mask = [], []
    width, length = max(map(len, prefixes)), max(map(len, rests))
    for prefix, rest in zip(prefixes, rests, strict=True):
        before, between = width - len(prefix), length - len(rest)
        ids.append([pad] * before + prefix + [pad] * between + rest)
        mask.append([0] * before + [1] * len(prefix) + [0] * between + [1] * len(rest))
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def left_padded(prompts: Sequence[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), int64 [batch, longest prompt]."""
    return align_prefixes([[] for _ in prompts], prompts, pad, device)


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """int64 [batch, time]: the places of tokens in rows that may be padded on the left."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def position_to_correct(
    model_inputs: Arguments, past_key_values: Cache | None, rows: torch.Tensor, prompt_length: int
) -> torch.Tensor | None:
    """int64 [batch]: the last prompt token of `rows` in this forward, -1 in other rows; None if it is not in this forward.

    Chunked prefill and use_cache=False make "the last token of this forward" wrong: it is counted from the start.
    """
    past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
    fed = model_inputs.get("input_ids")
    index = prompt_length - 1 - past
    inside = 0 <= index < (fed if fed is not None else model_inputs["inputs_embeds"]).shape[1]
    return torch.where(rows, index, -1) if inside else None


@torch.compiler.disable
def prompt_ends(
    composer: PromptComposer, ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor | None
) -> list[int | None]:
    """The column in which the last prompt of every row ends, -1 in rows without an image, None where it cannot be told."""
    answers = [0] * len(ids) if labels is None else _last_labelled(labels, mask)
    seen = zip(ids.tolist(), mask.ne(0).tolist(), answers, rows.tolist(), strict=True)
    return [_prompt_end(composer, row, m, answer) if has_image else -1 for row, m, answer, has_image in seen]


def _prompt_end(composer: PromptComposer, ids: list[int], mask: list[bool], answer: int) -> int | None:
    columns = [i for i, m in enumerate(mask) if m]
    tokens = [ids[i] for i in columns]
    end = composer.prompt_end(tokens)
    if answer in columns:  # an answer may itself hold what looks like a generation prompt
        before = columns.index(answer)
        known = composer.prompt_end(tokens[:before]) == before - 1 or not composer.has_prompt_end
        end = before - 1 if known else end
    image = len(tokens) - tokens[::-1].index(composer.image_token_id) - 1
    return columns[end] if end is not None and end > image else None


def _last_labelled(labels: torch.Tensor, mask: torch.Tensor) -> list[int]:
    """The column in which the last run of labels begins, in every row; 0 without labels: no prompt ends before it."""
    given = (labels != -100) & mask.bool()
    starts = given & ~torch.nn.functional.pad(given, (1, -1))
    return last_true(starts).tolist()


def last_true(mask: torch.Tensor) -> torch.Tensor:
    """int64 [batch]: index of the last nonzero entry of `mask` [batch, time], whatever the padding side."""
    return (mask.long() * torch.arange(mask.shape[1], device=mask.device)).amax(-1)


def by_name(function: Callable[..., object], args: tuple[object, ...], kwargs: Arguments) -> Arguments:
    """`kwargs` with the positional arguments of a method `function` (without self) under their names."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if len(args) > len(names):
        raise TypeError(f"{function.__name__}() takes at most {len(names)} positional arguments, found {len(args)}.")
    given = {n: v for n, v in zip(names, args, strict=False) if v is not None}
    for name in given.keys() & kwargs.keys():
        if kwargs[name] is not None:
            raise TypeError(f"{function.__name__}() got multiple values for argument {name!r}.")
    return {**kwargs, **given}
