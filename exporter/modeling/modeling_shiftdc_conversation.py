"""What a KV cache holds, and conversations that go on from one; travels inside exported checkpoints.

A reply is calibrated at the last token of the last prompt and nowhere else, so that a conversation that goes on in a cache gives
the tokens of the whole conversation without one. What an earlier correction has touched is cut off the cache and read again,
without it; where a cache cannot be cut (sliding windows, static caches, positions that count from the image) all of it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicLayer

from .modeling_shiftdc_cache import RoomyLayer

if TYPE_CHECKING:  # what the mixin is mixed into
    from transformers import PreTrainedModel as _Model
else:
    _Model = object

#: The attribute of a cache that says what it holds; copies of the cache keep it.
_HELD = "_shiftdc_held"
UNKNOWN_CACHE = (
    "past_key_values holds tokens that this model does not know of, which may be an image: fill a cache by this model's own "
    "generate() or forward(), give the whole conversation and a new cache, or pass shiftdc=False (no calibration)."
)


@dataclass
class Held:
    """What a cache holds: `ids`, `mask` [batch, time], the image inputs of all turns, the columns that were corrected.

    images: None where those of several turns could not be put together. corrected: int64 [batch], -1 where nothing was.
    tail: [batch, 0 or 1], the last token of a reply, which is in no cache. last: keys of the last token, by which contents that
    somebody else has changed are noticed.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    images: dict[str, Any] | None
    corrected: torch.Tensor
    tail: torch.Tensor | None = None
    last: torch.Tensor | None = None


@dataclass
class Turn:
    """A prompt with all that came before it, as a call of generate() without a cache would have it.

    own: the ids that the caller gave. cache: the caller's. held: what it holds, None where it holds nothing.
    """

    own: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor | None
    images: dict[str, Any]
    cache: Any = None
    held: Held | None = None

    @property
    def prompt(self) -> dict[str, Any]:
        """What references are computed from."""
        return {"input_ids": self.ids, **({} if self.mask is None else {"attention_mask": self.mask}), **self.images}

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of generate() for the ids, their mask and the cache."""
        masked = {} if self.mask is None else {"attention_mask": self.mask}
        return {"input_ids": self.ids, **masked, **({} if self.cache is None else {"past_key_values": self.cache})}

    def answered(self, out: Any) -> Any:
        """`out`, of a call with `ids`, behind the caller's own ids."""
        if self.own is self.ids:
            return out
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        own = self.own.to(sequences.device).repeat_interleave(len(sequences) // len(self.own), dim=0)
        sequences = torch.cat([own, sequences[:, self.ids.shape[1] :]], dim=1)
        if isinstance(out, torch.Tensor):
            return sequences
        out.sequences = sequences
        return out

    def whole_answer(self, out: Any) -> torch.Tensor:
        """The whole conversation's ids, from `out` of a call with the caller's own."""
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        if self.own.shape[1] == self.ids.shape[1]:
            return sequences
        before = self.ids[:, : self.ids.shape[1] - self.own.shape[1]].to(sequences.device)
        return torch.cat([before.repeat_interleave(len(sequences) // len(before), dim=0), sequences], dim=1)


def length_of(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def held_by(cache: Any) -> Held | None:
    """What `cache` holds; None where that is not known."""
    held = getattr(cache, _HELD, None)
    if held is None or held.ids.shape[1] != length_of(cache):
        return None
    before, last = held.last, _last_keys(cache)
    if before is None or last is None or before.shape != last.shape:
        return None
    return held if torch.equal(before.to(last.device), last) else None


def remember(cache: Any, held: Held | None) -> None:
    """None: what the cache holds is not known."""
    if cache is None:
        return
    if held is not None:
        held.last = _last_keys(cache)
    setattr(cache, _HELD, held)


def _last_keys(cache: Any) -> torch.Tensor | None:
    """Of the last layer that keeps keys: [batch, heads, head size] of the last token, which depend on all before it."""
    length = length_of(cache)
    for layer in reversed(getattr(cache, "layers", ())):
        keys = getattr(layer, "keys", None)
        if keys is not None and keys.ndim == 4 and keys.shape[2]:
            return keys[:, :, min(length, keys.shape[2]) - 1].detach().clone()
    return None


class OwnPrompt:
    """A streamer that is shown the caller's own ids in place of the whole conversation's."""

    def __init__(self, streamer: Any, own: torch.Tensor):
        self.streamer = streamer
        self.own: torch.Tensor | None = own

    def put(self, value: torch.Tensor) -> None:
        shown, self.own = self.own, None
        self.streamer.put(value if shown is None else shown.cpu())

    def end(self) -> None:
        self.streamer.end()


def is_cuttable(cache: Any) -> bool:
    return all(type(layer) in (DynamicLayer, RoomyLayer) for layer in cache.layers)


def cut(cache: Any, length: int) -> None:
    """Leave the first `length` tokens in a cache that is cuttable."""
    cache.crop(length - length_of(cache))


def empty(cache: Any) -> None:
    """Raises ValueError where a cache cannot be filled anew."""
    if is_cuttable(cache):
        cut(cache, 0)
    else:
        cache.reset()
    if length_of(cache):
        raise ValueError(
            f"A {type(cache).__name__} cannot be filled anew, as this conversation needs it: give the whole conversation and a "
            "new cache, or pass shiftdc=False (no calibration)."
        )


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


def behind(held: Held, ids: torch.Tensor, mask: Any, as_cached: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of a conversation that goes on with `ids`; the length of `mask` says whether the reply's last token counts."""
    counts = mask.shape[1] > held.ids.shape[1] + ids.shape[1]
    before = [held.ids, held.tail] if counts and held.tail is not None and not as_cached else [held.ids]
    whole = torch.cat([*(b.to(ids.device) for b in before), ids], dim=1)
    return whole, torch.cat([held.mask.to(mask), mask[:, -ids.shape[1] :]], dim=1) if as_cached else mask


def first_difference(one: torch.Tensor, two: torch.Tensor) -> int:
    """The first column in which two tensors [batch, time] differ, in any row; the shorter one's length if there is none."""
    width = min(one.shape[1], two.shape[1])
    differs = (one[:, :width] != two[:, :width].to(one.device)).any(0).nonzero()
    return int(differs[0]) if len(differs) else width


def put_together(before: dict[str, Any] | None, new: dict[str, Any], batch: int, by_row: frozenset[str]) -> dict[str, Any] | None:
    """The image inputs of two parts of a conversation; None where their order would be a guess."""
    if before is None or not new or not before:
        return None if before is None else {**before, **new}
    tensors = all(isinstance(v, torch.Tensor) for v in (*before.values(), *new.values()))
    same = before.keys() == new.keys() and not by_row & new.keys()
    if batch != 1 or not tensors or not same or any(before[k].shape[1:] != new[k].shape[1:] for k in new):
        return None
    return {k: torch.cat([before[k], new[k].to(before[k].device)]) for k in new}


def are_equal(one: dict[str, Any], two: dict[str, Any]) -> bool:
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


class ShiftDCConversationMixin(_Model):
    """The part of `ShiftDCMixin` that follows conversations in caches."""

    if TYPE_CHECKING:  # of ShiftDCMixin
        shiftdc_row_inputs: Any
        shiftdc_shares_prefix: bool
        shiftdc_token_inputs: Any
        _shiftdc_image_rows: Any
        _shiftdc_prompt_ends: Any
        _shiftdc_prompt_inputs: Any
        _shiftdc_refuse_packed: Any
        _shiftdc_unpadded: Any

    def _shiftdc_turn(self, ids: torch.Tensor, kwargs: dict[str, Any], as_cached: bool = False) -> Turn:
        """The whole conversation that a call of generate() goes on with. Raises ValueError where that cannot be known.

        as_cached: without the last token of the reply before, if the caller gives but new tokens: as the base class has it.
        """
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        images = {k: v for k, v in self._shiftdc_prompt_inputs(kwargs).items() if k != "attention_mask"}
        if not length_of(cache):
            return Turn(ids, ids, mask, images, cache)
        if (held := held_by(cache)) is None:
            raise ValueError(UNKNOWN_CACHE)
        given = {k: v for k, v in images.items() if k not in self._shiftdc_typed_names(images)}
        if is_whole(ids, mask, held):
            whole, whole_mask = ids, torch.ones_like(ids) if mask is None else mask
            self._shiftdc_require_begun(whole, held)
            pixels = given or self._shiftdc_pixels(held.images)
        else:
            whole, whole_mask = behind(held, ids, mask, as_cached)
            pixels = put_together(self._shiftdc_pixels(held.images), given, len(ids), self.shiftdc_row_inputs)
        if pixels is None:
            raise ValueError(
                "The images of several turns cannot be put in order here: give the input_ids and the images of the whole "
                "conversation, and a new cache."
            )
        made = self.shiftdc_token_inputs(whole, self.config.image_token_id, {**images, **(held.images or {})})
        return Turn(ids, whole, whole_mask, {**pixels, **made}, cache, held)

    def _shiftdc_typed_names(self, inputs: dict[str, Any]) -> set[str]:
        """Of `inputs` those that are as long as the prompt."""
        one = torch.zeros((1, 1), dtype=torch.long)
        return {k for k in inputs if k.endswith("token_type_ids")} | (
            set(self.shiftdc_token_inputs(one, self.config.image_token_id, inputs)) & inputs.keys()
        )

    def _shiftdc_pixels(self, images: dict[str, Any] | None) -> dict[str, Any] | None:
        if images is None:
            return None
        typed = self._shiftdc_typed_names(images)
        return {k: v for k, v in images.items() if k not in typed}

    def _shiftdc_require_begun(self, whole: torch.Tensor, held: Held) -> None:
        """Raise ValueError unless the images in the cache are in `whole` too."""
        shown = (held.ids == self.config.image_token_id).any(0).nonzero()
        if len(shown) and first_difference(whole, held.ids) <= int(shown[-1]):
            raise ValueError(
                "The input_ids do not begin as the conversation in past_key_values does: give those of the whole conversation, "
                "or new tokens alone with the attention_mask of the whole conversation, or a new cache."
            )

    def _shiftdc_placed(self, turn: Turn) -> dict[str, Any]:
        """Cut the cache back to what this turn can go on from; the image inputs that are to be read (again)."""
        held, cache = turn.held, turn.cache
        if held is None:
            return turn.images
        mask = turn.mask if turn.mask is not None else torch.ones_like(turn.ids)
        touched = held.corrected[held.corrected >= 0].tolist()
        same = min(first_difference(turn.ids, held.ids), first_difference(mask, held.mask))
        length = min(same, *touched, turn.ids.shape[1] - 1)
        rest_has_images = bool((turn.ids[:, length:] == self.config.image_token_id).any())
        pixels, before = self._shiftdc_pixels(turn.images), self._shiftdc_pixels(held.images)
        known = before is not None and pixels is not None and are_equal(pixels, before)
        remember(cache, None)
        if length and known and not rest_has_images and self.shiftdc_shares_prefix and is_cuttable(cache):
            cut(cache, length)
            return {}
        empty(cache)
        return turn.images

    def _shiftdc_left_aligned(self, turn: Turn) -> Turn:
        """`turn` with all padding in front, as generate() needs it; the new tokens go behind the caller's own ids."""
        mask = turn.mask if turn.mask is not None else self._shiftdc_unpadded(turn.ids)
        order = moved_left(mask)
        if order is None:
            return turn
        if turn.held is not None:
            raise ValueError("A conversation in past_key_values goes on with padding on the left; pad on the left.")
        ids = reordered(turn.ids, order)
        made = self.shiftdc_token_inputs(ids, self.config.image_token_id, turn.images)
        return Turn(turn.own, ids, reordered(mask, order), {**turn.images, **made}, turn.cache)

    def _shiftdc_remember_reply(self, sequences: torch.Tensor, turn: Turn, cache: Any, rows: torch.Tensor | None = None) -> None:
        """Note what the cache of a call of generate() holds now; rows [batch]: those that were corrected."""
        if cache is None:
            return
        length, last = length_of(cache), _last_keys(cache)
        if last is None or not len(last) == len(sequences) == len(turn.ids) or length > sequences.shape[1]:  # beams, copies
            remember(cache, None)
            return
        mask = turn.mask if turn.mask is not None else self._shiftdc_unpadded(turn.ids)
        mask = torch.nn.functional.pad(mask, (0, sequences.shape[1] - mask.shape[1]), value=1)
        corrected = torch.full((len(sequences),), -1, device=turn.ids.device)
        if rows is not None:
            corrected[rows] = turn.ids.shape[1] - 1
        tail = sequences[:, length:] if sequences.shape[1] == length + 1 else None
        remember(cache, Held(sequences[:, :length], mask[:, :length], turn.images, corrected, tail))
