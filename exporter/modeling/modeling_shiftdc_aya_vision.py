# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""Aya Vision with ShiftDC."""

from transformers import AyaVisionForConditionalGeneration
from transformers.generation import GenerationMixin

from .configuration_shiftdc import ShiftDCAyaVisionConfig
from .modeling_shiftdc import ShiftDCMixin, register_key_conversion


class ShiftDCAyaVisionForConditionalGeneration(ShiftDCMixin, AyaVisionForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCAyaVisionConfig


register_key_conversion(ShiftDCAyaVisionForConditionalGeneration, "AyaVisionForConditionalGeneration", "aya_vision")
