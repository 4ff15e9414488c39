"""Aya Vision with ShiftDC; travels inside exported checkpoints."""

from transformers import AyaVisionForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc import ShiftDCMixin, register_key_conversion
from .modeling_shiftdc_config import ShiftDCAyaVisionConfig


class ShiftDCAyaVisionForConditionalGeneration(ShiftDCMixin, AyaVisionForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCAyaVisionConfig


register_key_conversion(ShiftDCAyaVisionForConditionalGeneration, "AyaVisionForConditionalGeneration", "aya_vision")
