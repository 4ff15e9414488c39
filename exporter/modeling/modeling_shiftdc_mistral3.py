# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""Mistral Small 3.1 with ShiftDC."""

from transformers import Mistral3ForConditionalGeneration
from transformers.generation import GenerationMixin

from .configuration_shiftdc import ShiftDCMistral3Config
from .modeling_shiftdc import ShiftDCMixin, register_key_conversion


class ShiftDCMistral3ForConditionalGeneration(ShiftDCMixin, Mistral3ForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCMistral3Config


register_key_conversion(ShiftDCMistral3ForConditionalGeneration, "Mistral3ForConditionalGeneration", "mistral3")
