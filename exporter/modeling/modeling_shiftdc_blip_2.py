"""BLIP-2 with a decoder-only language model (OPT) with ShiftDC; travels inside exported checkpoints."""

from transformers import Blip2Config, Blip2ForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc_blip import ShiftDCBlipConfigMixin, ShiftDCBlipMixin


class ShiftDCBlip2Config(ShiftDCBlipConfigMixin, Blip2Config):
    model_type = "shiftdc_blip-2"


class ShiftDCBlip2ForConditionalGeneration(ShiftDCBlipMixin, Blip2ForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCBlip2Config
