# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""What BLIP-2 and InstructBLIP share with ShiftDC: a language model that generates by itself."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput

from .configuration_shiftdc import stock_class
from .inputs_shiftdc import Arguments, by_name, position_to_correct, refuse_embeddings, require_pixels
from .modeling_shiftdc import ShiftDCMixin, calibrated_class

if TYPE_CHECKING:  # what the mixin is mixed into
    from transformers.generation import GenerationMixin as _LanguageModel
else:
    _LanguageModel = object


class ShiftDCLanguageModelMixin(_LanguageModel):
    """A causal language model whose generate() takes ShiftDC's arguments and hands them to the decoder layers."""

    shiftdc_stock: type

    def __reduce_ex__(self, protocol: object) -> tuple:
        return _new_language_model, (self.shiftdc_stock,), self.__dict__

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        shiftdc: bool | None = None,
        shiftdc_rows: torch.Tensor | None = None,
        shiftdc_prompt_length: int | None = None,
        shiftdc_reference: torch.Tensor | None = None,
        shiftdc_correction: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Arguments:
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )
        if shiftdc is False:
            return {**model_inputs, "shiftdc": False}
        if shiftdc_rows is None or shiftdc_prompt_length is None:
            return model_inputs
        position = position_to_correct(model_inputs, past_key_values, shiftdc_rows, shiftdc_prompt_length)
        if position is None:
            return {**model_inputs, "shiftdc": False}
        amounts = {"shiftdc_reference": shiftdc_reference, "shiftdc_correction": shiftdc_correction}
        return {**model_inputs, "shiftdc_position": position, **amounts}


@functools.cache
def _language_model_class(stock: type) -> type:
    return type(stock.__name__, (ShiftDCLanguageModelMixin, stock), {"shiftdc_stock": stock})


def _new_language_model(stock: type) -> PreTrainedModel:
    """An empty one, for pickle, which does not find a class that was made here."""
    return object.__new__(_language_model_class(stock))


class ShiftDCBlipMixin(ShiftDCMixin):
    """The outer model embeds image and prompt once and lets its language model generate."""

    #: Only the language model has a cache, and it never sees the image's tokens.
    shiftdc_continues_caches = False
    language_model: PreTrainedModel

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        stock: type = type(self.language_model)
        self.language_model.__class__ = _language_model_class(stock)

    @staticmethod
    def shiftdc_backbone(model: PreTrainedModel, **inputs: object) -> None:
        """Without an image the language model reads the prompt alone: the outer forward() demands one."""
        if inputs.get("pixel_values") is not None:
            stock: Any = next(c for c in type(model).__mro__ if c.__module__.startswith("transformers."))
            stock.forward(model, **inputs, use_cache=False, logits_to_keep=1)
        else:
            text = {k: v for k, v in inputs.items() if k != "pixel_values" and not k.startswith("qformer_")}
            model.language_model(**text, use_cache=False, logits_to_keep=1)

    def generate(self, inputs: torch.Tensor | None = None, *args: object, **kwargs: Any) -> torch.Tensor | ModelOutput:
        """As the base class's, where `inputs` are pixel values; prompts without an image go to the language model.

        A generation config is taken where other models take it, too: as the second argument.

        Args:
            inputs (`torch.FloatTensor` of shape `(batch, channels, height, width)`, *optional*):
                The images, also as `pixel_values=`.
            args, kwargs:
                As of `ShiftDCMixin.generate`.
        """
        if args and isinstance(args[0], GenerationConfig):
            kwargs, args = by_name(GenerationMixin.generate, (None, *args), kwargs), ()
        kwargs = by_name(type(self)._shiftdc_base_generate, (inputs, *args), kwargs)
        if kwargs.get("pixel_values") is not None:
            return super().generate(**kwargs)
        text = {k: v for k, v in kwargs.items() if not k.startswith(("qformer_", "shiftdc")) and k != "pixel_values"}
        if kwargs.get("shiftdc") is not False:
            refuse_embeddings(text)
        if text.get("input_ids") is not None and (text["input_ids"] == self._shiftdc_traits.image_token_id).any():
            require_pixels({})
        if kwargs.get("shiftdc") is not False:
            self._shiftdc_refuse_cache(kwargs.get("past_key_values"))
        return self.language_model.generate(**text, shiftdc=False)


def __getattr__(name: str) -> type[ShiftDCMixin]:
    """`ShiftDCBlip2ForConditionalGeneration` and `ShiftDCInstructBlipForConditionalGeneration`."""
    return calibrated_class(stock_class(name, __name__), ShiftDCBlipMixin, __name__)
