# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""LLaVA-OneVision with ShiftDC."""

from transformers import LlavaOnevisionForConditionalGeneration
from transformers.generation import GenerationMixin

from .configuration_shiftdc import ShiftDCLlavaOnevisionConfig
from .modeling_shiftdc import ShiftDCMixin, register_key_conversion


class ShiftDCLlavaOnevisionForConditionalGeneration(ShiftDCMixin, LlavaOnevisionForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCLlavaOnevisionConfig


register_key_conversion(
    ShiftDCLlavaOnevisionForConditionalGeneration, "LlavaOnevisionForConditionalGeneration", "llava_onevision"
)
