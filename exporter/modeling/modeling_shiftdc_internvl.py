# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""InternVL3 with ShiftDC."""

from transformers import InternVLForConditionalGeneration
from transformers.generation import GenerationMixin

from .configuration_shiftdc import ShiftDCInternVLConfig
from .modeling_shiftdc import ShiftDCMixin, register_key_conversion


class ShiftDCInternVLForConditionalGeneration(ShiftDCMixin, InternVLForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCInternVLConfig


register_key_conversion(ShiftDCInternVLForConditionalGeneration, "InternVLForConditionalGeneration", "internvl")
