"""InternVL3 with ShiftDC; travels inside exported checkpoints."""

from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc import ShiftDCMixin, register_key_conversion
from .modeling_shiftdc_config import ShiftDCConfigMixin


class ShiftDCInternVLConfig(ShiftDCConfigMixin, InternVLConfig):
    model_type = "shiftdc_internvl"
    shiftdc_guard_field = "image_seq_length"


class ShiftDCInternVLForConditionalGeneration(ShiftDCMixin, InternVLForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCInternVLConfig


register_key_conversion(ShiftDCInternVLForConditionalGeneration, "InternVLForConditionalGeneration", "internvl")
