# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""Llama 3.2 Vision (Mllama) with ShiftDC."""

from itertools import pairwise

import torch
from transformers import MllamaForConditionalGeneration

from .configuration_shiftdc import ShiftDCTraits
from .inputs_shiftdc import Images
from .modeling_shiftdc import ShiftDCMixin, calibrated_class


class ShiftDCMllamaMixin(ShiftDCMixin):
    """An image is no part of the prompt's tokens: cross-attention layers read it."""

    @staticmethod
    def shiftdc_token_inputs(traits: ShiftDCTraits, ids: torch.Tensor, given: Images) -> Images:
        """Which image tiles each token sees: [batch, time, images, tiles], as the processor has it."""
        if (original := given.get("cross_attention_mask")) is None:
            return {}
        mask = original.new_zeros(len(ids), ids.shape[1], *original.shape[2:])
        for row, tiles in enumerate(original.amax(1)):
            positions = (ids[row] == traits.image_token_id).nonzero().flatten().tolist()
            for image, (start, end) in enumerate(_spans(positions, ids.shape[1])):
                mask[row, start:end, image] = tiles[image]
        return {"cross_attention_mask": mask}

    @staticmethod
    def shiftdc_unmarked_image(traits: ShiftDCTraits, rows: torch.Tensor, images: Images) -> bool:
        """Rows see the image that is given for them, whatever their tokens are, unless the mask says that they do not."""
        if images.get("pixel_values") is None:
            return ShiftDCMixin.shiftdc_unmarked_image(traits, rows, images)
        seen = images.get("cross_attention_mask")
        shown = torch.ones_like(rows) if seen is None else seen.flatten(1).ne(0).any(1).to(rows.device)
        return ShiftDCMixin.shiftdc_unmarked_image(traits, rows, images) or bool((shown & ~rows).any())


def _spans(positions: list[int], length: int) -> list[tuple[int, int]]:
    """[start, end) of the tokens that see each image: up to the next image, which a run of neighbouring images shares."""
    ends = [end for _, end in pairwise([*positions, length])]
    for image in reversed(range(len(positions) - 1)):
        if ends[image] == positions[image] + 1:
            ends[image] = ends[image + 1]
    return list(zip(positions, ends, strict=True))


ShiftDCMllamaForConditionalGeneration = calibrated_class(MllamaForConditionalGeneration, ShiftDCMllamaMixin, __name__)
