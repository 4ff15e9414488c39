"""InstructBLIP with a decoder-only language model (Vicuna) with ShiftDC; travels inside exported checkpoints."""

from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc_blip import ShiftDCBlipConfigMixin, ShiftDCBlipMixin


class ShiftDCInstructBlipConfig(ShiftDCBlipConfigMixin, InstructBlipConfig):
    model_type = "shiftdc_instructblip"


class ShiftDCInstructBlipForConditionalGeneration(ShiftDCBlipMixin, InstructBlipForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCInstructBlipConfig
