# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""InstructBLIP with a decoder-only language model (Vicuna) with ShiftDC."""

from transformers import InstructBlipForConditionalGeneration
from transformers.generation import GenerationMixin

from .configuration_shiftdc import ShiftDCInstructBlipConfig
from .modeling_shiftdc_blip import ShiftDCBlipMixin


class ShiftDCInstructBlipForConditionalGeneration(ShiftDCBlipMixin, InstructBlipForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCInstructBlipConfig
