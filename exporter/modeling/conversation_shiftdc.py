# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""What a KV cache holds, and conversations that go on from one.

A reply is calibrated at the last token of the last prompt and nowhere else, so that a conversation that goes on in a cache gives
the tokens of the whole conversation without one. What an earlier correction has touched is cut off the cache and read again,
without it; where a cache cannot be cut (sliding windows, static caches, positions that count from the image) all of it is.

It stands apart from modeling_shiftdc.py because a first reading can do without it: of a call without `past_key_values` a `Turn`
is the prompt as it was given.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import ModelOutput

from .inputs_shiftdc import Arguments, ImageArguments, Images, Padding, Prompt, last_true

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

#: The attribute of a cache that says what it holds; copies of the cache keep it.
_HELD = "_shiftdc_held"
UNKNOWN_CACHE = (
    "past_key_values holds tokens that this model does not know of, which may be an image: fill a cache by this model's own "
    "generate() or forward(), give the whole conversation and a new cache, or pass shiftdc=False (no calibration)."
)


# What a cache holds


@dataclass(frozen=True)
class Held:
    """What a cache holds: `ids`, `mask` [batch, time], the image inputs of all turns, the columns that were corrected.

    images: None where those of several turns could not be put together. corrected: int64 [batch], -1 where nothing was.
    tail: [batch, 0 or 1], the last token of a reply, which is in no cache. last: keys of the last token, by which contents that
    somebody else has changed are noticed.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    images: Images | None
    corrected: torch.Tensor
    tail: torch.Tensor | None = None
    last: torch.Tensor | None = None


def length_of(cache: Cache | None) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def held_by(cache: Cache | None) -> Held | None:
    """What `cache` holds; None where it holds nothing, or that is not known."""
    held = getattr(cache, _HELD, None)
    if held is None or held.ids.shape[1] != length_of(cache):
        return None
    before, last = held.last, _last_keys(cache)
    if before is None or last is None:
        return None
    return held if torch.equal(before.to(last.device), last) else None


def remember(cache: Cache | None, held: Held | None) -> None:
    """None: what the cache holds is not known."""
    if cache is not None:
        setattr(cache, _HELD, None if held is None else replace(held, last=_last_keys(cache)))


def _last_keys(cache: Cache | None) -> torch.Tensor | None:
    """Of the last layer that keeps keys: [batch, heads, head size] of the last token, which depend on all before it."""
    length = length_of(cache)
    for layer in reversed(getattr(cache, "layers", ())):
        keys = getattr(layer, "keys", None)
        if keys is not None and keys.ndim == 4 and keys.shape[2]:
            return keys[:, :, min(length, keys.shape[2]) - 1].detach().clone()
    return None


def is_cuttable(cache: Cache) -> bool:
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def cut(cache: Cache, length: int) -> None:
    """Leave the first `length` tokens in a cache that is cuttable."""
    cache.crop(length - length_of(cache))


def empty(cache: Cache) -> None:
    """Raises ValueError where a cache cannot be filled anew."""
    if is_cuttable(cache):
        cut(cache, 0)
        for layer in cache.layers:
            layer.is_initialized = False  # masks of PaliGemma are those of a first pass only in a cache that was never filled
    else:
        cache.reset()
    if length_of(cache):
        raise ValueError(
            f"A {type(cache).__name__} cannot be filled anew, as this conversation needs it: give the whole conversation and a "
            "new cache, or pass shiftdc=False (no calibration)."
        )


# A call of generate()


@dataclass(frozen=True)
class Turn:
    """A prompt with all that came before it, as a call of generate() without a cache would have it.

    own: the ids that the caller gave. cache: the caller's. held: what it holds, None where it holds nothing.
    """

    own: torch.Tensor
    prompt: Prompt
    cache: Cache | None = None
    held: Held | None = None

    def answered(self, out: torch.Tensor | ModelOutput) -> torch.Tensor | ModelOutput:
        """`out`, of a call with the whole conversation's ids, behind the caller's own ids."""
        if self.own is self.prompt.ids:
            return out
        sequences = sequences_of(out)
        own = self.own.to(sequences.device).repeat_interleave(len(sequences) // len(self.own), dim=0)
        sequences = torch.cat([own, sequences[:, self.prompt.ids.shape[1] :]], dim=1)
        if isinstance(out, torch.Tensor):
            return sequences
        out.sequences = sequences
        return out

    def whole_answer(self, out: torch.Tensor | ModelOutput) -> torch.Tensor:
        """The whole conversation's ids, from `out` of a call with the caller's own."""
        sequences, ids = sequences_of(out), self.prompt.ids
        if self.own.shape[1] == ids.shape[1]:
            return sequences
        before = ids[:, : ids.shape[1] - self.own.shape[1]].to(sequences.device)
        return torch.cat([before.repeat_interleave(len(sequences) // len(before), dim=0), sequences], dim=1)


def sequences_of(out: torch.Tensor | ModelOutput) -> torch.Tensor:
    """The ids that generate() gives back."""
    return out if isinstance(out, torch.Tensor) else out.sequences


def cache_of(out: torch.Tensor | ModelOutput, given: Cache | None) -> Cache | None:
    """The cache that a call of generate() was given, else the one that it gives back."""
    return given if given is not None else getattr(out, "past_key_values", None)


def turn_of(ids: torch.Tensor, kwargs: Arguments, images: ImageArguments, as_cached: bool = False) -> Turn:
    """The whole conversation that a call of generate() goes on with. Raises ValueError where that cannot be known.

    as_cached: without the last token of the reply before, if the caller gives but new tokens: as the base class has it.
    """
    cache, mask, given = kwargs.get("past_key_values"), kwargs.get("attention_mask"), images.among(kwargs)
    if not length_of(cache):
        return Turn(ids, images.prompt(ids, mask, given), cache)
    if (held := held_by(cache)) is None:
        raise ValueError(UNKNOWN_CACHE)
    before, new = _pixels_of(held, images), images.without_tokens(given, ids)
    pixels: Images | None
    if is_whole(ids, mask, held):
        whole, whole_mask = ids, torch.ones_like(ids) if mask is None else mask
        _require_beginning(whole, held, images.image_token_id)
        pixels = new or before
    else:
        assert mask is not None
        whole, whole_mask = behind(held, ids, mask, as_cached)
        pixels = put_together(before, new, len(ids), images.by_row)
    if pixels is None:
        raise ValueError(
            "The images of several turns cannot be put in order here: give the input_ids and the images of the whole "
            "conversation, and a new cache."
        )
    made = images.for_tokens(whole, {**given, **(held.images or {})})
    return Turn(ids, images.prompt(whole, whole_mask, {**pixels, **made}), cache, held)


def _pixels_of(held: Held, images: ImageArguments) -> Images | None:
    return None if held.images is None else images.without_tokens(held.images, held.ids)


def is_whole(ids: torch.Tensor, mask: torch.Tensor | None, held: Held) -> bool:
    """Whether `ids` are a whole conversation, or else what is new in it. Raises ValueError where neither can be."""
    past, tail = held.ids.shape[1], 0 if held.tail is None else held.tail.shape[1]
    if len(ids) != len(held.ids):
        raise ValueError(f"past_key_values holds {len(held.ids)} rows, found {len(ids)} in input_ids: give a new cache.")
    if mask is not None and mask.shape[1] in (past + ids.shape[1], past + tail + ids.shape[1]):
        return False
    if (mask is not None and mask.shape[1] != ids.shape[1]) or (mask is None and first_difference(ids, held.ids) < past):
        raise ValueError(
            f"attention_mask must be as long as the whole conversation, that is the {past} tokens in past_key_values and the "
            f"{ids.shape[1]} in input_ids, found {'none' if mask is None else mask.shape[1]}; or give the ids of the whole "
            "conversation."
        )
    return True


def behind(held: Held, ids: torch.Tensor, mask: torch.Tensor, as_cached: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of a conversation that goes on with `ids`; the length of `mask` says whether the reply's last token counts."""
    counts = mask.shape[1] > held.ids.shape[1] + ids.shape[1]
    before = [held.ids, held.tail] if counts and held.tail is not None and not as_cached else [held.ids]
    whole = torch.cat([*(b.to(ids.device) for b in before), ids], dim=1)
    return whole, torch.cat([held.mask.to(mask), mask[:, -ids.shape[1] :]], dim=1) if as_cached else mask


def _require_beginning(whole: torch.Tensor, held: Held, image_token_id: int) -> None:
    """Raise ValueError unless the images in the cache are in `whole` too."""
    shown = (held.ids == image_token_id).any(0).nonzero()
    if len(shown) and first_difference(whole, held.ids) <= int(shown[-1]):
        raise ValueError(
            "The input_ids do not begin as the conversation in past_key_values does: give those of the whole conversation, "
            "or new tokens alone with the attention_mask of the whole conversation, or a new cache."
        )


def left_aligned(turn: Turn, images: ImageArguments, padding: Padding) -> Turn:
    """`turn` with all padding in front, as generate() needs it; the new tokens go behind the caller's own ids."""
    prompt = turn.prompt
    mask = prompt.mask if prompt.mask is not None else padding.mask(prompt.ids)
    order = moved_left(mask)
    if order is None:
        return turn
    if turn.held is not None:
        raise ValueError("A conversation in past_key_values goes on with padding on the left; pad on the left.")
    ids = reordered(prompt.ids, order)
    made = images.for_tokens(ids, prompt.images)
    return replace(turn, prompt=images.prompt(ids, reordered(mask, order), {**prompt.images, **made}))


def other_arguments(turn: Turn, kwargs: Arguments) -> Arguments:
    """The arguments of a call of generate() beside the prompt and the cache, which `turn` has."""
    rest = {k: v for k, v in kwargs.items() if k not in {*turn.prompt.arguments, "past_key_values", "attention_mask"}}
    if turn.prompt.ids is turn.own:
        return rest
    if rest.get("position_ids") is not None:
        raise ValueError(
            "position_ids cannot be given with a conversation in past_key_values or with padding on the right: leave them "
            "out, they follow from attention_mask."
        )
    if rest.get("streamer") is not None:
        rest["streamer"] = OwnPrompt(rest["streamer"], turn.own)
    return rest


class OwnPrompt:
    """A streamer that is shown the caller's own ids in place of the whole conversation's."""

    def __init__(self, streamer: BaseStreamer, own: torch.Tensor):
        self.streamer = streamer
        self.own: torch.Tensor | None = own

    def put(self, value: torch.Tensor) -> None:
        shown, self.own = self.own, None
        self.streamer.put(value if shown is None else shown.cpu())

    def end(self) -> None:
        self.streamer.end()


def cut_back(turn: Turn, images: ImageArguments, shares_prefix: bool) -> Images:
    """Cut the cache back to what this turn can go on from; the image inputs that are to be read (again).

    shares_prefix: as in the traits of the model.
    """
    held, cache, prompt = turn.held, turn.cache, turn.prompt
    if held is None or cache is None:
        return prompt.images
    mask = prompt.mask if prompt.mask is not None else torch.ones_like(prompt.ids)
    touched = held.corrected[held.corrected >= 0].tolist()
    same = min(first_difference(prompt.ids, held.ids), first_difference(mask, held.mask))
    length = min(same, *touched, prompt.ids.shape[1] - 1)
    rest_has_images = bool((prompt.ids[:, length:] == images.image_token_id).any())
    before = _pixels_of(held, images)
    known = before is not None and are_equal(images.without_tokens(prompt.images, prompt.ids), before)
    remember(cache, None)
    if length and known and not rest_has_images and shares_prefix and is_cuttable(cache):
        cut(cache, length)
        return {}
    empty(cache)
    return prompt.images


def remember_reply(
    cache: Cache | None, sequences: torch.Tensor, turn: Turn, padding: Padding, rows: torch.Tensor | None = None
) -> None:
    """Note what the cache of a call of generate() holds now; rows [batch]: those that were corrected."""
    if cache is None:
        return
    ids, length, last = turn.prompt.ids, length_of(cache), _last_keys(cache)
    if last is None or not len(last) == len(sequences) == len(ids) or length > sequences.shape[1]:  # beams, copies
        remember(cache, None)
        return
    mask = turn.prompt.mask if turn.prompt.mask is not None else padding.mask(ids)
    mask = torch.nn.functional.pad(mask, (0, sequences.shape[1] - mask.shape[1]), value=1)
    corrected = torch.full((len(sequences),), -1, device=ids.device)
    if rows is not None:
        corrected[rows] = ids.shape[1] - 1
    tail = sequences[:, length:] if sequences.shape[1] == length + 1 else None
    remember(cache, Held(sequences[:, :length], mask[:, :length], turn.prompt.images, corrected, tail))


# A call of forward()


@dataclass(frozen=True)
class Pass:
    """One pass of forward() behind `past` tokens, with the whole conversation as `prompt`.

    knows_images: False where the images of several turns could not be put together. position: int64 [batch], in the columns of
    the pass (None: nothing to correct). shown: the same for what comes out where the cache must not keep the correction.
    corrected: as in `Held`, after the pass.
    """

    inputs: Arguments
    prompt: Prompt
    past: int
    corrected: torch.Tensor
    knows_images: bool = True
    position: torch.Tensor | None = None
    shown: torch.Tensor | None = None

    @property
    def held(self) -> Held:
        """What the cache holds after the pass."""
        prompt = self.prompt
        assert prompt.mask is not None
        return Held(prompt.ids, prompt.mask, prompt.images if self.knows_images else None, self.corrected)

    def corrected_at(self, position: torch.Tensor) -> Pass:
        """The pass with the caller's own `position` [batch]."""
        given = position.to(self.prompt.ids.device)
        return replace(self, position=position, corrected=torch.where(given < 0, self.corrected, given + self.past))


def pass_behind(held: Held | None, inputs: Arguments, images: ImageArguments) -> Pass:
    """The pass as the caller wants it, with nothing to correct."""
    ids, mask, given = inputs["input_ids"], inputs.get("attention_mask"), images.among(inputs)
    own = torch.ones_like(ids)
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] >= ids.shape[1]:
        own = mask.to(ids.device)
    if held is None:
        nowhere = torch.full((len(ids),), -1, device=ids.device)
        return Pass(inputs, images.prompt(ids, own[:, -ids.shape[1] :], given), 0, nowhere)
    whole = torch.cat([held.ids.to(ids.device), ids], dim=1)
    if own.shape[1] != whole.shape[1]:
        own = torch.cat([held.mask.to(own), own[:, -ids.shape[1] :]], dim=1)
    together = put_together(_pixels_of(held, images), images.without_tokens(given, ids), len(ids), images.by_row)
    made = {} if together is None else images.for_tokens(whole, {**given, **(held.images or {})})
    prompt = images.prompt(whole, own, {**(together or {}), **made})
    return Pass(inputs, prompt, held.ids.shape[1], held.corrected, knows_images=together is not None)


def require_row_mask(mask: torch.Tensor | None) -> None:
    """Raise ValueError for masks that do not show padding."""
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        raise ValueError(
            "attention_mask must be [batch, time] for forward() to see where prompts end: give such a one, or pass "
            "shiftdc_position= (the column of each prompt's last token), or shiftdc=False (no calibration)."
        )


def labels_of(step: Pass) -> torch.Tensor | None:
    """The labels of the whole conversation, int64 [batch, time]."""
    labels = step.inputs.get("labels")
    return labels if labels is None or not step.past else torch.nn.functional.pad(labels, (step.past, 0), value=-100)


def ending_at(step: Pass, found: list[int | None], image_token_id: int, shares_prefix: bool) -> Pass:
    """`step` with the positions to correct. found: as `prompt_ends` gives it. Raises ValueError where they cannot be told."""
    assert step.prompt.mask is not None
    goes_on = step.inputs.get("past_key_values") is not None or step.inputs.get("use_cache") is True
    if None in found and (step.past or not goes_on or step.inputs.get("labels") is not None):
        raise ValueError(
            f"Row {found.index(None)} holds an image and no generation prompt behind it (add_generation_prompt=True), so the "
            "end of its prompt cannot be told: pass shiftdc_position= (the column of the prompt's last token; -1 for a part "
            "of a prompt), or shiftdc=False (no calibration)."
        )
    rows, shown = step.prompt.rows, None
    ends = torch.tensor([-1 if end is None else end for end in found], device=rows.device)
    if None in found:  # the first part of a prompt, as it seems: corrected at its end, of which the cache keeps nothing
        shown = torch.where(rows & (ends < 0), last_true(step.prompt.mask), ends)
    before = step.corrected.to(ends.device)
    in_past = rows & (ends < step.past)
    if bool((in_past & (before != ends)).any()):
        raise ValueError(
            "The prompt in past_key_values was read without calibration: read it again, or go on with shiftdc=False (no "
            "calibration)."
        )
    new = rows & ~in_past
    moved = new & (before >= 0)
    step = replace(step, corrected=torch.where(new, ends, before), shown=shown)
    if bool(moved.any()):
        if bool(in_past.any()) or not shares_prefix:
            raise ValueError(_CANNOT_GO_ON)
        return _read_again(step, int(before[moved].min()), ends, image_token_id)
    return replace(step, position=torch.where(new, ends - step.past, -1)) if bool(new.any()) else step


_CANNOT_GO_ON = (
    "This conversation cannot go on from past_key_values in forward(): an earlier correction has to be undone, which "
    "this model, cache or batch does not allow. Use generate(), or give the whole conversation and a new cache, or "
    "pass shiftdc=False (no calibration)."
)


def _read_again(step: Pass, start: int, ends: torch.Tensor, image_token_id: int) -> Pass:
    """`step` from column `start` on, which an earlier correction has touched. Raises ValueError."""
    cache, positions, mask = step.inputs["past_key_values"], step.inputs.get("position_ids"), step.prompt.mask
    again = step.prompt.ids[:, start : step.past]
    shown = bool((again == image_token_id).any())
    places = positions is None or positions.ndim == 2
    if mask is None or shown or not start or not places or not is_cuttable(cache):
        raise ValueError(_CANNOT_GO_ON)
    inputs = {**step.inputs, "input_ids": step.prompt.ids[:, start:]}
    if inputs.get("attention_mask") is not None:
        inputs["attention_mask"] = mask
    if positions is not None:
        counted = (mask.cumsum(-1) - 1).clamp_min(0)[:, start : step.past]
        inputs["position_ids"] = torch.cat([counted.to(positions), positions.expand(len(counted), -1)], dim=1)
    if inputs.get("labels") is not None:
        inputs["labels"] = torch.nn.functional.pad(inputs["labels"], (again.shape[1], 0), value=-100)
    if isinstance(keep := inputs.get("logits_to_keep"), torch.Tensor):
        inputs["logits_to_keep"] = keep + again.shape[1]
    return replace(step, inputs=inputs, past=start, position=torch.where(ends < 0, -1, ends - start))


def of_the_last(out: ModelOutput, tokens: int) -> ModelOutput:
    """`out` for the last tokens of a pass that read more than the caller gave."""
    out.logits = out.logits[:, -tokens:]
    if getattr(out, "hidden_states", None) is not None:
        out.hidden_states = tuple(h[:, -tokens:] for h in out.hidden_states)
    return out


# Tensors


def first_difference(one: torch.Tensor, two: torch.Tensor) -> int:
    """The first column in which two tensors [batch, time] differ, in any row; the shorter one's length if there is none."""
    width = min(one.shape[1], two.shape[1])
    differs = (one[:, :width] != two[:, :width].to(one.device)).any(0).nonzero()
    return int(differs[0]) if len(differs) else width


def put_together(before: Images | None, new: Images, batch: int, by_row: frozenset[str]) -> Images | None:
    """The image inputs of two parts of a conversation; None where their order would be a guess."""
    if before is None or not new or not before:
        return None if before is None else {**before, **new}
    tensors = all(isinstance(v, torch.Tensor) for v in (*before.values(), *new.values()))
    same = before.keys() == new.keys() and not by_row & new.keys()
    if batch != 1 or not tensors or not same or any(before[k].shape[1:] != new[k].shape[1:] for k in new):
        return None
    return {k: torch.cat([before[k], new[k].to(before[k].device)]) for k in new}


def are_equal(one: Images, two: Images) -> bool:
    """Whether two sets of image inputs are the same."""
    if one.keys() != two.keys():
        return False
    pairs = ((one[k], two[k]) for k in one)
    return all(
        torch.equal(a, b.to(a.device)) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a is b
        for a, b in pairs
    )


def moved_left(mask: torch.Tensor) -> torch.Tensor | None:
    """int64 [batch, time]: columns in the order that puts all padding first; None where it is in front already."""
    if bool((mask[:, -1] != 0).all()):
        return None
    return torch.sort(mask.ne(0).int(), dim=1, stable=True).indices


def reordered(value: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """`value` [batch, time, ...] by `order` [batch, time]."""
    index = order.to(value.device).reshape(*order.shape, *[1] * (value.ndim - 2))
    return value.gather(1, index.expand(*order.shape, *value.shape[2:]))
