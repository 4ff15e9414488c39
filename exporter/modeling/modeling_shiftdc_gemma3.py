# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""Gemma 3 with images with ShiftDC."""

from transformers import Gemma3ForConditionalGeneration
from transformers.generation import GenerationMixin

from .configuration_shiftdc import ShiftDCGemma3Config
from .modeling_shiftdc import ShiftDCMixin, register_key_conversion


class ShiftDCGemma3ForConditionalGeneration(ShiftDCMixin, Gemma3ForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCGemma3Config
    #: Sliding windows, and image tokens that see one another.
    shiftdc_shares_prefix = False


register_key_conversion(ShiftDCGemma3ForConditionalGeneration, "Gemma3ForConditionalGeneration", "gemma3")
