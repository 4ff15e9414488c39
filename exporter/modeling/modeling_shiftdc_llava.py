"""LLaVA-1.5 (and ShareGPT4V, which shares its architecture) with ShiftDC; travels inside exported checkpoints."""

from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc import ShiftDCMixin, register_key_conversion
from .modeling_shiftdc_config import ShiftDCConfigMixin


class ShiftDCLlavaConfig(ShiftDCConfigMixin, LlavaConfig):
    model_type = "shiftdc_llava"
    shiftdc_guard_field = "vision_feature_select_strategy"


class ShiftDCLlavaForConditionalGeneration(ShiftDCMixin, LlavaForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCLlavaConfig


register_key_conversion(ShiftDCLlavaForConditionalGeneration, "LlavaForConditionalGeneration", "llava")
