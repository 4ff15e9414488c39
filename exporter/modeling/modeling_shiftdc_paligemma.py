# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""PaliGemma and PaliGemma 2 with ShiftDC."""

import torch
from transformers import PaliGemmaForConditionalGeneration
from transformers.generation import GenerationMixin

from .configuration_shiftdc import ShiftDCPaliGemmaConfig
from .inputs_shiftdc import Images
from .modeling_shiftdc import ShiftDCMixin, register_key_conversion


class ShiftDCPaliGemmaForConditionalGeneration(ShiftDCMixin, PaliGemmaForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCPaliGemmaConfig
    #: Prompt tokens see one another.
    shiftdc_shares_prefix = False

    @staticmethod
    def shiftdc_token_inputs(ids: torch.Tensor, image_token_id: int, given: Images) -> Images:
        """0 marks the prompt, whose tokens all see one another."""
        return {"token_type_ids": torch.zeros_like(ids)}


register_key_conversion(ShiftDCPaliGemmaForConditionalGeneration, "PaliGemmaForConditionalGeneration", "paligemma")
