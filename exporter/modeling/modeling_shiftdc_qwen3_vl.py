"""Qwen3-VL with ShiftDC; travels inside exported checkpoints."""

from transformers import Qwen3VLForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc import ShiftDCMixin
from .modeling_shiftdc_config import ShiftDCQwen3VLConfig


class ShiftDCQwen3VLForConditionalGeneration(ShiftDCMixin, Qwen3VLForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCQwen3VLConfig
    #: As Qwen2-VL.
    shiftdc_shares_prefix = False
    shiftdc_kept = ("rope_deltas",)
