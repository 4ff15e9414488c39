# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""LLaVA-1.6 (LLaVA-NeXT) with ShiftDC."""

from transformers import LlavaNextForConditionalGeneration
from transformers.generation import GenerationMixin

from .configuration_shiftdc import ShiftDCLlavaNextConfig
from .modeling_shiftdc import ShiftDCMixin, register_key_conversion


class ShiftDCLlavaNextForConditionalGeneration(ShiftDCMixin, LlavaNextForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCLlavaNextConfig


register_key_conversion(ShiftDCLlavaNextForConditionalGeneration, "LlavaNextForConditionalGeneration", "llava_next")
