"""BLIP-2 with a decoder-only language model (OPT) with ShiftDC; travels inside exported checkpoints."""

from transformers import Blip2ForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc_blip import ShiftDCBlipMixin
from .modeling_shiftdc_config import ShiftDCBlip2Config


class ShiftDCBlip2ForConditionalGeneration(ShiftDCBlipMixin, Blip2ForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCBlip2Config
