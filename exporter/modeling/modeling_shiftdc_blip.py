"""What BLIP-2 and InstructBLIP share with ShiftDC: a language model that generates by itself; travels inside checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig

from .modeling_shiftdc import ShiftDCMixin
from .modeling_shiftdc_config import ShiftDCConfigMixin
from .modeling_shiftdc_inputs import position_to_correct

if TYPE_CHECKING:  # what the mixin is mixed into
    from transformers.generation import GenerationMixin as _LanguageModel
else:
    _LanguageModel = object


class ShiftDCLanguageModelMixin(_LanguageModel):
    """A causal language model whose generate() takes ShiftDC's arguments and hands them to the decoder layers."""

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        shiftdc: bool | None = None,
        shiftdc_rows: torch.Tensor | None = None,
        shiftdc_prompt_length: int | None = None,
        shiftdc_reference: torch.Tensor | None = None,
        shiftdc_correction: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )
        if shiftdc_rows is None or shiftdc_prompt_length is None:
            return model_inputs
        position = position_to_correct(model_inputs, past_key_values, shiftdc_rows, shiftdc_prompt_length)
        if position is None:
            return model_inputs
        amounts = {"shiftdc_reference": shiftdc_reference, "shiftdc_correction": shiftdc_correction}
        return {**model_inputs, "shiftdc_position": position, **amounts}


class ShiftDCBlipConfigMixin(ShiftDCConfigMixin):
    shiftdc_guard_field = "num_query_tokens"

    @staticmethod
    def shiftdc_unsupported(config: Mapping[str, Any]) -> str | None:
        if config.get("text_config", {}).get("model_type") == "t5":
            return "its language model is an encoder-decoder (T5), and the method is for decoders; take one with a decoder"
        if config.get("image_token_index", config.get("image_token_id")) is None:
            return "its config.json names no image_token_index, so image prompts cannot be told; fetch its newest revision"
        return None


class ShiftDCBlipMixin(ShiftDCMixin):
    """The outer model embeds image and prompt once and lets its language model generate."""

    #: Only the language model has a cache, and it never sees the image's tokens.
    shiftdc_shares_prefix = False
    language_model: Any

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        stock = type(self.language_model)
        self.language_model.__class__ = type(stock.__name__, (ShiftDCLanguageModelMixin, stock), {})

    @staticmethod
    def shiftdc_backbone(model: Any, **inputs: Any) -> None:
        """Without an image the language model reads the prompt alone: the outer forward() demands one."""
        if inputs.get("pixel_values") is not None:
            stock: Any = next(c for c in type(model).__mro__ if c.__module__.startswith("transformers."))
            stock.forward(model, **inputs, use_cache=False, logits_to_keep=1)
        else:
            text = {k: v for k, v in inputs.items() if k != "pixel_values" and not k.startswith("qformer_")}
            model.language_model(**text, use_cache=False, logits_to_keep=1)

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the base class's, where `inputs` are pixel values; prompts without an image go to the language model."""
        pixel_values = kwargs.pop("pixel_values", inputs)
        if pixel_values is not None:
            return super().generate(pixel_values=pixel_values, **kwargs)
        text = {k: v for k, v in kwargs.items() if not k.startswith(("qformer_", "shiftdc"))}
        if (text["input_ids"] == self.config.image_token_id).any():
            self._shiftdc_require_pixels({})
        return self.language_model.generate(**text)
