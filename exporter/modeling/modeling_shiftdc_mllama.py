"""Llama 3.2 Vision (Mllama) with ShiftDC; travels inside exported checkpoints."""

from itertools import pairwise
from typing import Any

import torch
from transformers import MllamaForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc import ShiftDCMixin, register_key_conversion
from .modeling_shiftdc_config import ShiftDCMllamaConfig
from .modeling_shiftdc_inputs import UNMARKED_IMAGE


class ShiftDCMllamaForConditionalGeneration(ShiftDCMixin, MllamaForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCMllamaConfig
    #: An image is no part of the prompt's tokens.
    shiftdc_shares_prefix = False
    shiftdc_row_inputs = frozenset({"pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask"})

    @staticmethod
    def shiftdc_token_inputs(ids: torch.Tensor, image_token_id: int, given: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Which image tiles each token sees: [batch, time, images, tiles], as the processor has it."""
        if (original := given.get("cross_attention_mask")) is None:
            return {}
        mask = original.new_zeros(len(ids), ids.shape[1], *original.shape[2:])
        for row, tiles in enumerate(original.amax(1)):
            positions = (ids[row] == image_token_id).nonzero().flatten().tolist()
            for image, (start, end) in enumerate(_spans(positions, ids.shape[1])):
                mask[row, start:end, image] = tiles[image]
        return {"cross_attention_mask": mask}

    def _shiftdc_require_tokens(self, rows: torch.Tensor, images: dict[str, Any]) -> None:
        """Rows see the image that is given for them, whatever their tokens are, unless the mask says that they do not."""
        super()._shiftdc_require_tokens(rows, images)
        seen = images.get("cross_attention_mask")
        if images.get("pixel_values") is None:
            return
        shown = torch.ones_like(rows) if seen is None else seen.flatten(1).ne(0).any(1).to(rows.device)
        if (shown & ~rows).any():
            raise ValueError(UNMARKED_IMAGE)

    @staticmethod
    def shiftdc_image_layers(text_config: Any) -> frozenset[int]:
        """The cross-attention layers."""
        return frozenset(text_config.cross_attention_layers)


def _spans(positions: list[int], length: int) -> list[tuple[int, int]]:
    """[start, end) of the tokens that see each image: up to the next image, which a run of neighbouring images shares."""
    ends = [end for _, end in pairwise([*positions, length])]
    for image in reversed(range(len(positions) - 1)):
        if ends[image] == positions[image] + 1:
            ends[image] = ends[image + 1]
    return list(zip(positions, ends, strict=True))


register_key_conversion(ShiftDCMllamaForConditionalGeneration, "MllamaForConditionalGeneration", "mllama")
