# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""Qwen2.5-VL with ShiftDC."""

from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.generation import GenerationMixin

from .configuration_shiftdc import ShiftDCQwen2_5_VLConfig
from .modeling_shiftdc import ShiftDCMixin, register_key_conversion


class ShiftDCQwen2_5_VLForConditionalGeneration(ShiftDCMixin, Qwen2_5_VLForConditionalGeneration, GenerationMixin):  # noqa: N801 (as transformers names it)
    config_class = ShiftDCQwen2_5_VLConfig
    #: As Qwen2-VL.
    shiftdc_shares_prefix = False
    shiftdc_backbone_state = ("rope_deltas",)


register_key_conversion(ShiftDCQwen2_5_VLForConditionalGeneration, "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl")
