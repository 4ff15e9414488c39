"""Aya Vision with ShiftDC; travels inside exported checkpoints."""

from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc import ShiftDCMixin, register_key_conversion
from .modeling_shiftdc_config import ShiftDCConfigMixin


class ShiftDCAyaVisionConfig(ShiftDCConfigMixin, AyaVisionConfig):
    model_type = "shiftdc_aya_vision"
    shiftdc_guard_field = "vision_feature_select_strategy"


class ShiftDCAyaVisionForConditionalGeneration(ShiftDCMixin, AyaVisionForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCAyaVisionConfig


register_key_conversion(ShiftDCAyaVisionForConditionalGeneration, "AyaVisionForConditionalGeneration", "aya_vision")
