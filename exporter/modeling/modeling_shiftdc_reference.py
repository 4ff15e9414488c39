"""Coordinates along the directions, and the references to correct to; travels inside exported checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from .modeling_shiftdc_correction import ShiftDCReadError, ShiftDCReadout
from .modeling_shiftdc_inputs import ShiftDCInputsMixin, last_true
from .modeling_shiftdc_prefix import ShiftDCPrefixMixin


class ShiftDCReferenceMixin(ShiftDCInputsMixin, ShiftDCPrefixMixin):
    """The part of `ShiftDCMixin` that measures `x.d`, of the prompts themselves and of their counterparts."""

    #: Every pixel of the blank reference, after normalisation: the processor's mean colour.
    shiftdc_blank_pixel = 0.0
    #: Attributes of the backbone in which the base class keeps something from one pass to the next.
    shiftdc_kept: tuple[str, ...] = ()

    @staticmethod
    def shiftdc_backbone(model: Any, **inputs: Any) -> None:
        """One pass of `model` (this class, or the transformers class) through its decoder layers, without cache."""
        model.model(**inputs, use_cache=False)

    @torch.no_grad()
    def shiftdc_reference(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        captions: Sequence[Sequence[int] | torch.Tensor] | None = None,
        **image_inputs: Any,
    ) -> torch.Tensor:
        """Target coordinates of a batch of prompts, float32 [batch, calibrated layers]; 0 in rows without an image.

        The kind is config.shiftdc["reference"]: `caption` (the paper; the model captions the image unless `captions` are
        given), `text` (the request alone) or `blank` (the same prompt with a neutral image).
        """
        settings = self.config.shiftdc
        kind = "caption" if captions is not None else settings["reference"]
        if kind == "static":
            raise ValueError("A checkpoint with 'reference: static' has no reference pass: its shift is baked in.")
        if captions is not None and len(captions) != len(input_ids):
            raise ValueError(f"shiftdc_captions needs one caption per row: expected {len(input_ids)}, found {len(captions)}.")
        rows = self._shiftdc_image_rows(input_ids)
        if captions is None and kind == "caption" and rows.any():
            captions = self.shiftdc_captions(input_ids, attention_mask, **image_inputs)
        prompts = self._shiftdc_prompts(input_ids, attention_mask, rows)
        image_inputs = self._shiftdc_of_rows(image_inputs, rows)
        if kind == "blank":
            pixels = {k: self._shiftdc_blank(v) if k == "pixel_values" else v for k, v in image_inputs.items()}
            self._shiftdc_require_pixels(pixels)
            ids, mask = self._shiftdc_left_padded(prompts, input_ids)
            coordinates = self._shiftdc_last_coordinates(ids, mask, pixels)
        else:
            texts: Sequence[list[int] | None] = [None] * len(prompts)
            if captions is not None:
                texts = [list(map(int, c)) for c, r in zip(captions, rows.tolist(), strict=True) if r]
            composer = self.shiftdc_composer
            counterparts = [composer.text_prompt(p, c) for p, c in zip(prompts, texts, strict=True)]
            coordinates = self._shiftdc_last_coordinates(*self._shiftdc_left_padded(counterparts, input_ids), {})
        reference = coordinates.new_zeros(len(input_ids), coordinates.shape[1])
        reference[rows.to(reference.device)] = coordinates
        return reference

    @torch.no_grad()
    def shiftdc_coordinates(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **image_inputs: Any
    ) -> torch.Tensor:
        """Uncorrected coordinates `x.d` of the last token of every row, float32 [batch, calibrated layers]."""
        mask = attention_mask if attention_mask is not None else self._shiftdc_unpadded(input_ids)
        return self._shiftdc_coordinates(
            {"input_ids": input_ids, "attention_mask": attention_mask, **image_inputs}, last_true(mask)
        )

    def _shiftdc_last_coordinates(self, ids: torch.Tensor, mask: torch.Tensor, image_inputs: dict[str, Any]) -> torch.Tensor:
        last = torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
        typed = self._shiftdc_typed(ids, image_inputs)
        return self._shiftdc_coordinates({"input_ids": ids, "attention_mask": mask, **typed}, last)

    def _shiftdc_coordinates(self, inputs: dict[str, Any], position: torch.Tensor) -> torch.Tensor:
        """`x.d` at `position` [batch] after every calibrated layer of an uncorrected pass through the backbone."""
        dispatched = hasattr(self, "hf_device_map")  # accelerate's hooks must see the whole pass
        readout = ShiftDCReadout(len(self.config.shiftdc["layers"]), ends_pass=not dispatched)
        dropped = {"labels", "logits_to_keep", "past_key_values", "use_cache"}
        inputs = {k: v for k, v in inputs.items() if k not in dropped and v is not None}
        with torch.no_grad(), self._shiftdc_aside(), suppress(ShiftDCReadError):
            self.shiftdc_backbone(self, **inputs, shiftdc_position=position, shiftdc_readout=readout)
        return readout.stacked(position.device)

    @contextmanager
    def _shiftdc_aside(self) -> Iterator[None]:
        """Passes in here leave no trace: a reply that is being decoded goes on as if they had not been."""
        kept = {name: getattr(self.model, name) for name in self.shiftdc_kept}
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(self.model, name, value)

    def _shiftdc_blank(self, pixels: torch.Tensor) -> torch.Tensor:
        """A neutral image for every image; what is only padding (all zeros) stays padding."""
        if self.shiftdc_blank_pixel == 0:
            return torch.zeros_like(pixels)
        images = pixels.flatten(-3).ne(0).any(-1)[..., None, None, None]
        return images.to(pixels.dtype).expand_as(pixels) * self.shiftdc_blank_pixel

    def _shiftdc_validated(self, reference: torch.Tensor, batch: int) -> torch.Tensor:
        expected = (batch, len(self.config.shiftdc["layers"]))
        if tuple(reference.shape) != expected or not torch.isfinite(reference).all():
            raise ValueError(
                f"shiftdc_reference must be finite and of shape [batch, calibrated layers] = {list(expected)}, "
                f"found {list(reference.shape)}."
            )
        return reference.float()
