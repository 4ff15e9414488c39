"""Qwen3-VL with ShiftDC; travels inside exported checkpoints."""

from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc import ShiftDCMixin
from .modeling_shiftdc_config import ShiftDCConfigMixin


class ShiftDCQwen3VLConfig(ShiftDCConfigMixin, Qwen3VLConfig):
    model_type = "shiftdc_qwen3_vl"
    shiftdc_guard_field = "vision_start_token_id"


class ShiftDCQwen3VLForConditionalGeneration(ShiftDCMixin, Qwen3VLForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCQwen3VLConfig
    #: As Qwen2-VL.
    shiftdc_shares_prefix = False
    shiftdc_kept = ("rope_deltas",)
