# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""BLIP-2 with a decoder-only language model (OPT) with ShiftDC."""

from transformers import Blip2ForConditionalGeneration
from transformers.generation import GenerationMixin

from .configuration_shiftdc import ShiftDCBlip2Config
from .modeling_shiftdc_blip import ShiftDCBlipMixin


class ShiftDCBlip2ForConditionalGeneration(ShiftDCBlipMixin, Blip2ForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCBlip2Config
