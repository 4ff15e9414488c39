"""LLaVA-1.6 (LLaVA-NeXT) with ShiftDC; travels inside exported checkpoints."""

from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc import ShiftDCMixin, register_key_conversion
from .modeling_shiftdc_config import ShiftDCConfigMixin


class ShiftDCLlavaNextConfig(ShiftDCConfigMixin, LlavaNextConfig):
    model_type = "shiftdc_llava_next"
    shiftdc_guard_field = "vision_feature_select_strategy"


class ShiftDCLlavaNextForConditionalGeneration(ShiftDCMixin, LlavaNextForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCLlavaNextConfig


register_key_conversion(ShiftDCLlavaNextForConditionalGeneration, "LlavaNextForConditionalGeneration", "llava_next")
