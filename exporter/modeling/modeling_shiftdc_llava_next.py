"""LLaVA-1.6 (LLaVA-NeXT) with ShiftDC; travels inside exported checkpoints."""

from transformers import LlavaNextForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc import ShiftDCMixin, register_key_conversion
from .modeling_shiftdc_config import ShiftDCLlavaNextConfig


class ShiftDCLlavaNextForConditionalGeneration(ShiftDCMixin, LlavaNextForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCLlavaNextConfig


register_key_conversion(ShiftDCLlavaNextForConditionalGeneration, "LlavaNextForConditionalGeneration", "llava_next")
