"""PaliGemma and PaliGemma 2 with ShiftDC; travels inside exported checkpoints."""

from typing import Any

import torch
from transformers import PaliGemmaForConditionalGeneration
from transformers.generation import GenerationMixin

from .modeling_shiftdc import ShiftDCMixin, register_key_conversion
from .modeling_shiftdc_config import ShiftDCPaliGemmaConfig


class ShiftDCPaliGemmaForConditionalGeneration(ShiftDCMixin, PaliGemmaForConditionalGeneration, GenerationMixin):
    config_class = ShiftDCPaliGemmaConfig
    #: Prompt tokens see one another.
    shiftdc_shares_prefix = False

    @staticmethod
    def shiftdc_token_inputs(ids: torch.Tensor, image_token_id: int, given: dict[str, Any]) -> dict[str, torch.Tensor]:
        """0 marks the prompt, whose tokens all see one another."""
        return {"token_type_ids": torch.zeros_like(ids)}


register_key_conversion(ShiftDCPaliGemmaForConditionalGeneration, "PaliGemmaForConditionalGeneration", "paligemma")
