# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""LLaVA-1.5 (and ShareGPT4V, which shares its architecture) with ShiftDC."""

from transformers import LlavaForConditionalGeneration
from transformers.generation import GenerationMixin

from .configuration_shiftdc import ShiftDCLlavaConfig
from .modeling_shiftdc import ShiftDCMixin, register_key_conversion


class ShiftDCLlavaForConditionalGeneration(ShiftDCMixin, LlavaForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCLlavaConfig


register_key_conversion(ShiftDCLlavaForConditionalGeneration, "LlavaForConditionalGeneration", "llava")
