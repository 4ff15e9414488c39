"""Mistral Small 3.1 with ShiftDC; travels inside exported checkpoints."""

from transformers import Mistral3ForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc import ShiftDCMixin, register_key_conversion
from .modeling_shiftdc_config import ShiftDCMistral3Config


class ShiftDCMistral3ForConditionalGeneration(ShiftDCMixin, Mistral3ForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCMistral3Config


register_key_conversion(ShiftDCMistral3ForConditionalGeneration, "Mistral3ForConditionalGeneration", "mistral3")
