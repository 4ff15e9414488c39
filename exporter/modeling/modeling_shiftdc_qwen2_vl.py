# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""Qwen2-VL with ShiftDC."""

from transformers import Qwen2VLForConditionalGeneration
from transformers.generation import GenerationMixin

from .configuration_shiftdc import ShiftDCQwen2VLConfig
from .modeling_shiftdc import ShiftDCMixin, register_key_conversion


class ShiftDCQwen2VLForConditionalGeneration(ShiftDCMixin, Qwen2VLForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCQwen2VLConfig
    #: Positions of three axes count from the image, by an offset that the first pass leaves behind.
    shiftdc_shares_prefix = False
    shiftdc_backbone_state = ("rope_deltas",)


register_key_conversion(ShiftDCQwen2VLForConditionalGeneration, "Qwen2VLForConditionalGeneration", "qwen2_vl")
