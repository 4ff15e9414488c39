# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""Idefics3 with ShiftDC."""

from transformers import Idefics3ForConditionalGeneration
from transformers.generation import GenerationMixin

from .configuration_shiftdc import ShiftDCIdefics3Config
from .modeling_shiftdc import ShiftDCMixin


class ShiftDCIdefics3ForConditionalGeneration(ShiftDCMixin, Idefics3ForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCIdefics3Config
    #: The base class takes an image of zeros for padding.
    shiftdc_blank_pixel = 1e-6
