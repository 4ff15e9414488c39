"""SmolVLM2 with ShiftDC; travels inside exported checkpoints."""

from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc import ShiftDCMixin
from .modeling_shiftdc_config import ShiftDCConfigMixin


class ShiftDCSmolVLMConfig(ShiftDCConfigMixin, SmolVLMConfig):
    model_type = "shiftdc_smolvlm"
    shiftdc_guard_field = "scale_factor"


class ShiftDCSmolVLMForConditionalGeneration(ShiftDCMixin, SmolVLMForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCSmolVLMConfig
    #: The base class takes an image of zeros for padding.
    shiftdc_blank_pixel = 1e-6
