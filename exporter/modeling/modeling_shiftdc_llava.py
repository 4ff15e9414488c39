"""LLaVA-1.5 (and ShareGPT4V, which shares its architecture) with ShiftDC; travels inside exported checkpoints."""

from transformers import LlavaForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc import ShiftDCMixin, register_key_conversion
from .modeling_shiftdc_config import ShiftDCLlavaConfig


class ShiftDCLlavaForConditionalGeneration(ShiftDCMixin, LlavaForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCLlavaConfig


register_key_conversion(ShiftDCLlavaForConditionalGeneration, "LlavaForConditionalGeneration", "llava")
