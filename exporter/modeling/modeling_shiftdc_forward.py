"""forward() by hand: where the prompt ends, and what a cache holds before and after; travels inside exported checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .modeling_shiftdc_conversation import (
    UNKNOWN_CACHE,
    Held,
    ShiftDCConversationMixin,
    cut,
    held_by,
    is_cuttable,
    length_of,
    put_together,
    remember,
)
from .modeling_shiftdc_inputs import last_true


@dataclass
class _Pass:
    """One pass of forward() behind `past` tokens, with the whole conversation's `ids` and `mask` [batch, past + time].

    position: int64 [batch], in the columns of the pass (None: nothing to correct). shown: the same for what comes out where the
    cache must not keep the correction. corrected: as in `Held`, after the pass.
    """

    inputs: dict[str, Any]
    ids: torch.Tensor
    mask: torch.Tensor
    images: dict[str, Any] | None
    corrected: torch.Tensor
    position: torch.Tensor | None
    past: int
    shown: torch.Tensor | None = None


class ShiftDCForwardMixin(ShiftDCConversationMixin):
    """The part of `ShiftDCMixin` that prepares a pass which no generate() has prepared."""

    if TYPE_CHECKING:  # of ShiftDCMixin
        _shiftdc_pass: Any

    def _shiftdc_recorded(
        self,
        inputs: dict[str, Any],
        shiftdc: bool | None,
        position: torch.Tensor | None,
        amounts: dict[str, torch.Tensor | None],
    ) -> Any:
        """forward(), with account of what the cache holds."""
        cache, ids = inputs.get("past_key_values"), inputs.get("input_ids")
        past = length_of(cache)
        held = held_by(cache) if past else None
        if ids is None and shiftdc is not False and position is None:
            raise ValueError(
                "forward() needs input_ids to see which rows hold an image; pass shiftdc_position= with inputs_embeds, or "
                "shiftdc=False (no calibration)."
            )
        if past and held is None and shiftdc is not False and position is None:
            raise ValueError(UNKNOWN_CACHE)
        if ids is None or (past and held is None):
            remember(cache, None)
            out = self._shiftdc_pass(inputs, None if shiftdc is False else position, amounts)
            remember(getattr(out, "past_key_values", None), None)
            return out
        told = shiftdc is False or position is not None
        step = self._shiftdc_step(inputs, held)
        if not told:
            step = self._shiftdc_found(step, held)
        elif shiftdc is not False and position is not None:
            step.position = position
            step.corrected = torch.where(position.to(ids.device) < 0, step.corrected, position.to(ids.device) + past)
        remember(cache, None)
        if step.past < past:
            cut(cache, step.past)
        prompt = {"input_ids": step.ids, "attention_mask": step.mask, **(step.images or {})} if step.past else None
        out = self._shiftdc_pass(step.inputs, step.position, amounts, prompt)
        left = getattr(out, "past_key_values", None)
        if step.shown is not None:
            out = self._shiftdc_pass({**step.inputs, "past_key_values": None, "use_cache": False}, step.shown, amounts)
            out.past_key_values = left
        if left is not None and length_of(left) == step.ids.shape[1]:
            remember(left, Held(step.ids, step.mask, step.images, step.corrected))
        return _of_the_last(out, ids.shape[1]) if step.past < past else out

    def _shiftdc_step(self, inputs: dict[str, Any], held: Held | None) -> _Pass:
        """The pass as the caller wants it, with nothing to correct."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        images = self._shiftdc_prompt_inputs(inputs)
        images.pop("attention_mask", None)
        own = torch.ones_like(ids)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] >= ids.shape[1]:
            own = mask.to(ids.device)
        if held is None:
            none = torch.full((len(ids),), -1, device=ids.device)
            return _Pass(inputs, ids, own[:, -ids.shape[1] :], images, none, None, 0)
        whole = torch.cat([held.ids.to(ids.device), ids], dim=1)
        if own.shape[1] != whole.shape[1]:
            own = torch.cat([held.mask.to(own), own[:, -ids.shape[1] :]], dim=1)
        typed = self._shiftdc_typed_names({**images, **(held.images or {})})
        pixels = {k: v for k, v in images.items() if k not in typed}
        together = put_together(self._shiftdc_pixels(held.images), pixels, len(ids), self.shiftdc_row_inputs)
        if together is not None:
            together |= self.shiftdc_token_inputs(whole, self.config.image_token_id, {**images, **(held.images or {})})
        return _Pass(inputs, whole, own, together, held.corrected, None, held.ids.shape[1])

    def _shiftdc_found(self, step: _Pass, held: Held | None) -> _Pass:
        """`step` with the positions to correct. Raises ValueError where they cannot be told."""
        rows = self._shiftdc_image_rows(step.ids)
        self._shiftdc_require_tokens(rows, step.images or {})
        if not rows.any():
            return step
        mask = step.inputs.get("attention_mask")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            raise ValueError(
                "attention_mask must be [batch, time] for forward() to see where prompts end: give such a one, or pass "
                "shiftdc_position= (the column of each prompt's last token), or shiftdc=False (no calibration)."
            )
        self._shiftdc_refuse_packed(step.inputs, step.mask)
        found = self._shiftdc_ends(step, rows)
        ends = torch.tensor([-1 if end is None else end for end in found], device=step.ids.device)
        if None in found:  # the first part of a prompt, as it seems: corrected at its end, of which the cache keeps nothing
            begun = torch.tensor([end is None for end in found], device=ends.device)
            step.shown = torch.where(begun, last_true(step.mask), ends)
            rows = rows & ~begun
        before = step.corrected.to(ends.device)
        in_past = rows & (ends < step.past)
        if bool((in_past & (before != ends)).any()):
            raise ValueError(
                "The prompt in past_key_values was read without calibration: read it again, or go on with shiftdc=False (no "
                "calibration)."
            )
        new = rows & ~in_past
        moved = new & (before >= 0)
        step.corrected = torch.where(new, ends, before)
        if bool(moved.any()):
            return self._shiftdc_read_again(step, int(before[moved].min()), ends, bool(in_past.any()))
        step.position = torch.where(new, ends - step.past, -1) if bool(new.any()) else None
        return step

    def _shiftdc_ends(self, step: _Pass, rows: torch.Tensor) -> list[int | None]:
        """The column in which each prompt ends, -1 in rows without an image, None where the prompt is to go on in a cache."""
        labels = step.inputs.get("labels")
        if labels is not None and step.past:
            labels = torch.nn.functional.pad(labels, (step.past, 0), value=-100)
        ends = self._shiftdc_prompt_ends(step.ids, step.mask, rows, labels)
        goes_on = step.inputs.get("past_key_values") is not None or step.inputs.get("use_cache") is True
        if None in ends and (step.past or not goes_on or labels is not None):
            raise ValueError(
                f"Row {ends.index(None)} holds an image and no generation prompt behind it (add_generation_prompt=True), so the "
                "end of its prompt cannot be told: pass shiftdc_position= (the column of the prompt's last token; -1 for a part "
                "of a prompt), or shiftdc=False (no calibration)."
            )
        return ends

    def _shiftdc_read_again(self, step: _Pass, start: int, ends: torch.Tensor, mixed: bool) -> _Pass:
        """`step` from column `start` on, which an earlier correction has touched."""
        cache, positions = step.inputs["past_key_values"], step.inputs.get("position_ids")
        again = step.ids[:, start : step.past]
        shown = bool((again == self.config.image_token_id).any())
        places = positions is None or positions.ndim == 2
        if mixed or shown or not start or not places or not (self.shiftdc_shares_prefix and is_cuttable(cache)):
            raise ValueError(
                "This conversation cannot go on from past_key_values in forward(): an earlier correction has to be undone, which "
                "this model, cache or batch does not allow. Use generate(), or give the whole conversation and a new cache, or "
                "pass shiftdc=False (no calibration)."
            )
        inputs = {**step.inputs, "input_ids": step.ids[:, start:]}
        if inputs.get("attention_mask") is not None:
            inputs["attention_mask"] = step.mask
        if positions is not None:
            counted = (step.mask.cumsum(-1) - 1).clamp_min(0)[:, start : step.past]
            inputs["position_ids"] = torch.cat([counted.to(positions).expand(len(positions), -1), positions], dim=1)
        if inputs.get("labels") is not None:
            inputs["labels"] = torch.nn.functional.pad(inputs["labels"], (again.shape[1], 0), value=-100)
        if isinstance(keep := inputs.get("logits_to_keep"), torch.Tensor):
            inputs["logits_to_keep"] = keep + again.shape[1]
        step.inputs, step.past = inputs, start
        step.position = torch.where(ends < 0, -1, ends - start)
        return step


def _of_the_last(out: Any, tokens: int) -> Any:
    """`out` for the last tokens of a pass that read more than the caller gave."""
    out.logits = out.logits[:, -tokens:]
    if getattr(out, "hidden_states", None) is not None:
        out.hidden_states = tuple(h[:, -tokens:] for h in out.hidden_states)
    return out
