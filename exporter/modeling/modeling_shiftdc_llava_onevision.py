"""LLaVA-OneVision with ShiftDC; travels inside exported checkpoints."""

from transformers import LlavaOnevisionForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc import ShiftDCMixin, register_key_conversion
from .modeling_shiftdc_config import ShiftDCLlavaOnevisionConfig


class ShiftDCLlavaOnevisionForConditionalGeneration(ShiftDCMixin, LlavaOnevisionForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCLlavaOnevisionConfig


register_key_conversion(
    ShiftDCLlavaOnevisionForConditionalGeneration, "LlavaOnevisionForConditionalGeneration", "llava_onevision"
)
