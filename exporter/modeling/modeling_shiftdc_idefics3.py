"""Idefics3 with ShiftDC; travels inside exported checkpoints."""

from transformers import Idefics3ForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc import ShiftDCMixin
from .modeling_shiftdc_config import ShiftDCIdefics3Config


class ShiftDCIdefics3ForConditionalGeneration(ShiftDCMixin, Idefics3ForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCIdefics3Config
    #: The base class takes an image of zeros for padding.
    shiftdc_blank_pixel = 1e-6
