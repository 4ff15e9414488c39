"""SmolVLM2 with ShiftDC; travels inside exported checkpoints."""

from transformers import SmolVLMForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc import ShiftDCMixin
from .modeling_shiftdc_config import ShiftDCSmolVLMConfig


class ShiftDCSmolVLMForConditionalGeneration(ShiftDCMixin, SmolVLMForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCSmolVLMConfig
    #: The base class takes an image of zeros for padding.
    shiftdc_blank_pixel = 1e-6
