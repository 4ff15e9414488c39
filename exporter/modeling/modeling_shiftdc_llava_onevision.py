"""LLaVA-OneVision with ShiftDC; travels inside exported checkpoints."""

from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc import ShiftDCMixin, register_key_conversion
from .modeling_shiftdc_config import ShiftDCConfigMixin


class ShiftDCLlavaOnevisionConfig(ShiftDCConfigMixin, LlavaOnevisionConfig):
    model_type = "shiftdc_llava_onevision"
    shiftdc_guard_field = "vision_feature_select_strategy"


class ShiftDCLlavaOnevisionForConditionalGeneration(ShiftDCMixin, LlavaOnevisionForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCLlavaOnevisionConfig


register_key_conversion(
    ShiftDCLlavaOnevisionForConditionalGeneration, "LlavaOnevisionForConditionalGeneration", "llava_onevision"
)
