# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""Qwen3-VL with ShiftDC."""

from transformers import Qwen3VLForConditionalGeneration
from transformers.generation import GenerationMixin

from .configuration_shiftdc import ShiftDCQwen3VLConfig
from .modeling_shiftdc import ShiftDCMixin


class ShiftDCQwen3VLForConditionalGeneration(ShiftDCMixin, Qwen3VLForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCQwen3VLConfig
    #: As Qwen2-VL.
    shiftdc_shares_prefix = False
    shiftdc_backbone_state = ("rope_deltas",)
