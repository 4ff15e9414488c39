"""Gemma 3 with images with ShiftDC; travels inside exported checkpoints."""

from transformers import Gemma3ForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc import ShiftDCMixin, register_key_conversion
from .modeling_shiftdc_config import ShiftDCGemma3Config


class ShiftDCGemma3ForConditionalGeneration(ShiftDCMixin, Gemma3ForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCGemma3Config
    #: Sliding windows, and image tokens that see one another.
    shiftdc_shares_prefix = False


register_key_conversion(ShiftDCGemma3ForConditionalGeneration, "Gemma3ForConditionalGeneration", "gemma3")
