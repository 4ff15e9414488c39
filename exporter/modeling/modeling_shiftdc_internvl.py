"""InternVL3 with ShiftDC; travels inside exported checkpoints."""

from transformers import InternVLForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc import ShiftDCMixin, register_key_conversion
from .modeling_shiftdc_config import ShiftDCInternVLConfig


class ShiftDCInternVLForConditionalGeneration(ShiftDCMixin, InternVLForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCInternVLConfig


register_key_conversion(ShiftDCInternVLForConditionalGeneration, "InternVLForConditionalGeneration", "internvl")
