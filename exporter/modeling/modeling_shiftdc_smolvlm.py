# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""SmolVLM2 with ShiftDC."""

from transformers import SmolVLMForConditionalGeneration
from transformers.generation import GenerationMixin

from .configuration_shiftdc import ShiftDCSmolVLMConfig
from .modeling_shiftdc import ShiftDCMixin


class ShiftDCSmolVLMForConditionalGeneration(ShiftDCMixin, SmolVLMForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCSmolVLMConfig
    #: The base class takes an image of zeros for padding.
    shiftdc_blank_pixel = 1e-6
