"""Idefics3 with ShiftDC; travels inside exported checkpoints."""

from transformers import Idefics3Config, Idefics3ForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc import ShiftDCMixin
from .modeling_shiftdc_config import ShiftDCConfigMixin


class ShiftDCIdefics3Config(ShiftDCConfigMixin, Idefics3Config):
    model_type = "shiftdc_idefics3"
    shiftdc_guard_field = "scale_factor"


class ShiftDCIdefics3ForConditionalGeneration(ShiftDCMixin, Idefics3ForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCIdefics3Config
    #: The base class takes an image of zeros for padding.
    shiftdc_blank_pixel = 1e-6
