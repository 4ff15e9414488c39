"""Qwen2-VL with ShiftDC; travels inside exported checkpoints."""

from transformers import Qwen2VLForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc import ShiftDCMixin, register_key_conversion
from .modeling_shiftdc_config import ShiftDCQwen2VLConfig


class ShiftDCQwen2VLForConditionalGeneration(ShiftDCMixin, Qwen2VLForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCQwen2VLConfig
    #: Positions of three axes count from the image, by an offset that the first pass leaves behind.
    shiftdc_shares_prefix = False
    shiftdc_kept = ("rope_deltas",)


register_key_conversion(ShiftDCQwen2VLForConditionalGeneration, "Qwen2VLForConditionalGeneration", "qwen2_vl")
