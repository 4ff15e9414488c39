"""InstructBLIP with a decoder-only language model (Vicuna) with ShiftDC; travels inside exported checkpoints."""

from transformers import InstructBlipForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc_blip import ShiftDCBlipMixin
from .modeling_shiftdc_config import ShiftDCInstructBlipConfig


class ShiftDCInstructBlipForConditionalGeneration(ShiftDCBlipMixin, InstructBlipForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCInstructBlipConfig
