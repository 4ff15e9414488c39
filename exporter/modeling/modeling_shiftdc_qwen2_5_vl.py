"""Qwen2.5-VL with ShiftDC; travels inside exported checkpoints."""

from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc import ShiftDCMixin, register_key_conversion
from .modeling_shiftdc_config import ShiftDCQwen2_5_VLConfig


class ShiftDCQwen2_5_VLForConditionalGeneration(ShiftDCMixin, Qwen2_5_VLForConditionalGeneration, GenerationMixin):  # noqa: N801 (as transformers names it)
    config_class = ShiftDCQwen2_5_VLConfig
    #: As Qwen2-VL.
    shiftdc_shares_prefix = False
    shiftdc_kept = ("rope_deltas",)


register_key_conversion(ShiftDCQwen2_5_VLForConditionalGeneration, "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl")
