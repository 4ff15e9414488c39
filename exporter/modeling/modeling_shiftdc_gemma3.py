"""Gemma 3 with images with ShiftDC; travels inside exported checkpoints."""

from transformers import Gemma3Config, Gemma3ForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc import ShiftDCMixin, register_key_conversion
from .modeling_shiftdc_config import ShiftDCConfigMixin


class ShiftDCGemma3Config(ShiftDCConfigMixin, Gemma3Config):
    model_type = "shiftdc_gemma3"
    shiftdc_guard_field = "mm_tokens_per_image"


class ShiftDCGemma3ForConditionalGeneration(ShiftDCMixin, Gemma3ForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCGemma3Config
    #: Sliding windows, and image tokens that see one another.
    shiftdc_shares_prefix = False


register_key_conversion(ShiftDCGemma3ForConditionalGeneration, "Gemma3ForConditionalGeneration", "gemma3")
