"""What a batch of inputs says: the rows that hold an image, where prompts end; travels inside exported checkpoints."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # what the mixin is mixed into
    from transformers import PreTrainedModel as _Model
else:
    _Model = object

#: Arguments of forward() that describe text, caching or output; all others describe the image.
_NOT_IMAGE_INPUTS = {
    "self", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "cache_position", "labels",
    "use_cache", "logits_to_keep", "output_attentions", "output_hidden_states", "return_dict", "kwargs", "token_type_ids",
    "mm_token_type_ids", "rope_deltas", "shiftdc", "shiftdc_reference", "shiftdc_correction", "shiftdc_position",
}  # fmt: skip
UNMARKED_IMAGE = (
    "An image is given that no image token in input_ids stands for, so its row cannot be calibrated: let the processor write the "
    "prompt, leave the image out, or pass shiftdc=False (no calibration)."
)
#: Arguments that describe where the prompts of a packed row begin.
_OF_PACKED_ROWS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")
#: Arguments that say of each token whether it is part of an image; made anew for prompts that are composed here.
_TOKEN_TYPES = {"token_type_ids", "mm_token_type_ids"}


class ShiftDCInputsMixin(_Model):
    """The part of `ShiftDCMixin` that takes inputs apart, and lays prompts out that were composed in token space."""

    if TYPE_CHECKING:  # of ShiftDCMixin
        _shiftdc_base_forward: Any

    #: Image inputs that have an entry for every row of the batch, with an image or without.
    shiftdc_row_inputs: frozenset[str] = frozenset()

    @staticmethod
    def shiftdc_token_inputs(ids: torch.Tensor, image_token_id: int, given: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Inputs as long as the prompt, for prompts `ids` [batch, time] that were composed here; `given`: the original ones.

        By default those that mark a token of an image by 1, where the original prompt has them.
        """
        return {name: (ids == image_token_id).long() for name in given if name in _TOKEN_TYPES}

    def _shiftdc_typed(self, ids: torch.Tensor, image_inputs: dict[str, Any]) -> dict[str, Any]:
        """`image_inputs` for the composed prompts `ids`."""
        return {**image_inputs, **self.shiftdc_token_inputs(ids, self.config.image_token_id, image_inputs)}

    def _shiftdc_prompt_inputs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The image inputs, the mask and the token types among the arguments of generate()."""
        names = set(inspect.signature(type(self)._shiftdc_base_forward).parameters) - _NOT_IMAGE_INPUTS
        return {k: v for k, v in kwargs.items() if k in names | _TOKEN_TYPES | {"attention_mask"} and v is not None}

    def _shiftdc_of_rows(self, image_inputs: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
        return {k: v[rows] if k in self.shiftdc_row_inputs else v for k, v in image_inputs.items()}

    def _shiftdc_require_pixels(self, image_inputs: dict[str, Any]) -> None:
        if not any(v is not None for k, v in image_inputs.items() if k not in _TOKEN_TYPES):
            raise ValueError(
                "The prompt holds image tokens but no image was given, so no reference can be computed: pass pixel_values, "
                "shiftdc_reference= or shiftdc_captions=, or shiftdc=False (no calibration)."
            )

    def _shiftdc_require_tokens(self, rows: torch.Tensor, images: dict[str, Any]) -> None:
        """Raise ValueError where an image is shown to a row that holds no image token: it would go uncalibrated."""
        if not rows.any() and any(v is not None for k, v in images.items() if k.startswith("pixel_values")):
            raise ValueError(UNMARKED_IMAGE)

    def _shiftdc_image_rows(self, input_ids: torch.Tensor) -> torch.Tensor:
        """bool [batch]: the rows that hold an image. pixel_values may be absent at prefill, so token ids decide.

        Raises ValueError for videos with tokens of their own, which would otherwise go uncalibrated.
        """
        video_token_id = getattr(self.config, "video_token_id", None)
        if video_token_id is not None and (input_ids == video_token_id).any():
            raise ValueError(
                "The prompt holds a video, which calibration does not know; give its frames as images, or pass shiftdc=False "
                "(no calibration)."
            )
        return (input_ids == self.config.image_token_id).any(-1)

    def _shiftdc_refuse_packed(self, inputs: dict[str, Any], mask: torch.Tensor | None) -> None:
        """Raise ValueError where several prompts stand in one row: only the last of them would be calibrated."""
        positions = inputs.get("position_ids")
        packed = any(inputs.get(name) is not None for name in _OF_PACKED_ROWS)
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

    @torch.compiler.disable
    def _shiftdc_prompt_ends(
        self, ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor | None
    ) -> list[int | None]:
        """The column in which the last prompt of every row ends, -1 in rows without an image, None where it cannot be told."""
        answers = [None] * len(ids) if labels is None else _last_labelled(labels, mask)
        seen = zip(ids.tolist(), mask.ne(0).tolist(), rows.tolist(), answers, strict=True)
        return [self._shiftdc_prompt_end(*row) if row[2] else -1 for row in seen]

    def _shiftdc_prompt_end(self, ids: list[int], mask: list[bool], _: bool, answer: int | None) -> int | None:
        columns = [i for i, m in enumerate(mask) if m]
        tokens = [ids[i] for i in columns]
        end = self.shiftdc_composer.prompt_end(tokens)
        if answer in columns:  # an answer may itself hold what looks like a generation prompt
            before = columns.index(answer)
            known = self.shiftdc_composer.prompt_end(tokens[:before]) == before - 1 or not self.shiftdc_composer.has_prompt_end
            end = before - 1 if known else end
        image = len(tokens) - tokens[::-1].index(self.config.image_token_id) - 1
        return columns[end] if end is not None and end > image else None

    def _shiftdc_prompts(self, ids: torch.Tensor, mask: torch.Tensor | None, rows: torch.Tensor) -> list[list[int]]:
        """The prompts of `rows`, without padding."""
        mask = mask if mask is not None else self._shiftdc_unpadded(ids)
        return [r[m.bool()].tolist() for r, m in zip(ids[rows], mask[rows], strict=True)]

    def _shiftdc_unpadded(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What generate() assumes without an attention mask: padding is masked if it cannot be an end of text."""
        pad = self.generation_config.pad_token_id
        if pad is None or pad in self._shiftdc_eos_ids():
            return torch.ones_like(input_ids)
        return (input_ids != pad).long()

    def _shiftdc_left_padded(self, prompts: list[list[int]], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, mask), int64 [batch, longest prompt]."""
        width = max(map(len, prompts))
        ids = [[self._shiftdc_pad_id()] * (width - len(p)) + p for p in prompts]
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        return torch.tensor(ids, device=like.device), torch.tensor(mask, device=like.device)

    def _shiftdc_eos_ids(self) -> set[int]:
        eos = self.generation_config.eos_token_id
        eos = self.config.get_text_config().eos_token_id if eos is None else eos
        return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)

    def _shiftdc_pad_id(self) -> int:
        pad = self.generation_config.pad_token_id
        return pad if pad is not None else min(self._shiftdc_eos_ids(), default=0)


def position_to_correct(
    model_inputs: dict[str, Any], past_key_values: Any, rows: torch.Tensor, prompt_length: int
) -> torch.Tensor | None:
    """int64 [batch]: the last prompt token of `rows` in this forward, -1 in other rows; None if it is not in this forward.

    Chunked prefill and use_cache=False make "the last token of this forward" wrong: it is counted from the start.
    """
    past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
    fed = model_inputs.get("input_ids")
    index = prompt_length - 1 - past
    inside = 0 <= index < (fed if fed is not None else model_inputs["inputs_embeds"]).shape[1]
    return torch.where(rows, index, -1) if inside else None


def _last_labelled(labels: torch.Tensor, mask: torch.Tensor) -> list[int | None]:
    """The column in which the last run of labels begins, in every row; None without labels."""
    given = (labels != -100) & mask.bool()
    starts = given & ~torch.nn.functional.pad(given, (1, -1))
    columns = last_true(starts).tolist()
    return [c if some else None for c, some in zip(columns, given.any(1).tolist(), strict=True)]


def by_name(function: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
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


def last_true(mask: torch.Tensor) -> torch.Tensor:
    """int64 [batch]: index of the last nonzero entry of `mask` [batch, time], whatever the padding side."""
    return (mask.long() * torch.arange(mask.shape[1], device=mask.device)).amax(-1)
