"""A loaded vision-language model with its processor: from requests and images to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import nn

from exporter.data.images import blank_image
from exporter.modeling.configuration_shiftdc import PREFIX, ShiftDCSettings, ShiftDCTraits
from exporter.modeling.inputs_shiftdc import positions_of
from exporter.modeling.prompts_shiftdc import PromptComposer, PromptFrame, TokenizerCodec
from exporter.models.chat_template import composing, encoded, rendered
from exporter.models.conversation import Conversation, has_image, user_turn, with_blank_image
from exporter.models.families import Family, family
from exporter.models.recipe import Recipe
from exporter.models.traits import structural_traits, takes_text
from exporter.models.trials import skipped_layers
from exporter.runtime.padding import left_padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

Inputs = dict[str, torch.Tensor]


class CheckedCodec(TokenizerCodec):
    """What a damaged tokenizer raises becomes an InputError."""

    def encode(self, text: str, *, plain: bool = False) -> list[int]:
        with composing("MODEL"):
            return super().encode(text, plain=plain)

    def decode(self, ids: Sequence[int]) -> str:
        with composing("MODEL"):
            return super().decode(ids)

    def text(self, ids: Sequence[int]) -> str:
        with composing("MODEL"):
            return super().text(ids)

    def written(self, token: int) -> str:
        with composing("MODEL"):
            return super().written(token)


def composes_text(processor: ProcessorMixin, recipe: Recipe) -> bool:
    """Whether prompts without an image are made of those with one.

    Because the processor takes no other, or puts an image's tokens where the template writes nothing.
    """
    if recipe.chat_template is None:
        return False
    turns = ([user_turn("What is it?", image)] for image in (None, blank_image()))
    alone, shown = (rendered(processor, turn, add_generation_prompt=True) for turn in turns)
    return alone == shown or not takes_text(processor)


@dataclass(frozen=True)
class VLM:
    """Model and processor. Prompts always go through the chat template, with the generation prompt at the end.

    `composed_text`: a prompt without image is one with an image, less its image tokens (the processor takes no other).
    `composer`: makes prompts without image of those with one, where the template's own differ from them by more (`PromptFrame`).
    `notices`: what transformers said while it loaded them. `tried`: what was found by running the model (`trials.py`).
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    composed_text: bool = False
    composer: PromptComposer | None = None
    notices: tuple[str, ...] = ()
    tried: ShiftDCTraits | None = None

    def framed(self, frame: PromptFrame) -> VLM:
        """With prompts that share their frame on both sides of a difference."""
        return replace(self, composer=self.composing(frame) if frame.own else None)

    def composing(self, frame: PromptFrame) -> PromptComposer:
        return PromptComposer(frame, CheckedCodec(self.tokenizer), self.image_token_id)

    @cached_property
    def family(self) -> Family:
        return family(self.model.config.model_type.removeprefix(PREFIX))

    @cached_property
    def traits(self) -> ShiftDCTraits:
        """Of an export those that its config records; of a base model those found so far. Raises InputError."""
        if hasattr(self.model.config, "shiftdc"):
            return ShiftDCSettings.of(self.model.config).traits
        return self.tried or structural_traits(self.model, self.processor)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.processor.tokenizer

    @property
    def image_token_id(self) -> int:
        return self.traits.image_token_id

    @cached_property
    def image_layers(self) -> frozenset[int]:
        """Decoder layers that prompts without an image skip."""
        return skipped_layers(self)

    @property
    def device(self) -> torch.device:
        """Where inputs go: of an offloaded model, the device on which its embeddings run."""
        embeddings = self.model.get_input_embeddings()
        hook = getattr(embeddings, "_hf_hook", None)
        execution = getattr(hook, "execution_device", None)
        device = embeddings.weight.device if execution is None else torch.device(execution)
        return torch.device("cpu") if device.type == "meta" else device  # a model without weights is never run

    @property
    def decoder_layers(self) -> nn.ModuleList:
        found = self.model.get_submodule(self.traits.decoder_layers)
        assert isinstance(found, nn.ModuleList)
        return found

    def encode(self, requests: Sequence[str], images: Sequence[Image.Image] | None = None) -> Inputs:
        """Left-padded prompts: input_ids and attention_mask int64 [batch, time], and the images' tensors."""
        pictures: Sequence[Image.Image | None] = images if images is not None else [None] * len(requests)
        conversations = [[user_turn(r, p)] for r, p in zip(requests, pictures, strict=True)]
        return self.encode_conversations(conversations)

    def encode_conversations(self, conversations: Sequence[Conversation]) -> Inputs:
        if self.composed_text and not any(has_image(c) for c in conversations):
            return self.pad([self._without_image(c) for c in conversations])
        if self.composer is not None and not any(has_image(c) for c in conversations):
            return self.pad([self._image_taken_out(c, self.composer) for c in conversations])
        padding = {"padding": True, "padding_side": "left"}
        inputs = encoded(self.processor, conversations, return_tensors="pt", processor_kwargs=padding)
        return {k: self._placed(v) for k, v in inputs.items() if isinstance(v, torch.Tensor) and k != "labels"}

    def _placed(self, value: torch.Tensor) -> torch.Tensor:
        """On the model's device. Pixels of 16 bits, as Llama 4's processor gives them, in the model's dtype."""
        short = value.is_floating_point() and value.dtype != torch.float32
        return value.to(self.device, self.model.dtype if short else None)

    def _without_image(self, conversation: Conversation) -> list[int]:
        ids = self.encode_conversations([with_blank_image(conversation)])["input_ids"][0].tolist()
        return [i for i in ids if i != self.image_token_id]

    def _image_taken_out(self, conversation: Conversation, composer: PromptComposer) -> list[int]:
        text = rendered(self.processor, with_blank_image(conversation), add_generation_prompt=True)
        return composer.text_prompt(self.tokenized(text, composer.frame))

    def tokenized(self, text: str, frame: PromptFrame) -> list[int]:
        """Token ids of what the chat template gives. Raises InputError."""
        with composing("MODEL"):
            return self.tokenizer(text, add_special_tokens=frame.bos_added)["input_ids"]

    def backbone(self, inputs: Inputs) -> None:
        """One pass through the decoder layers, without cache."""
        given = {"position_ids": positions_of(inputs["attention_mask"])} if self.traits.needs_positions else {}
        self.family.model.shiftdc_backbone(self.model, **inputs, **given)

    def token_ids(self, request: str, image: Image.Image | None = None) -> list[int]:
        """One prompt as a list of token ids."""
        return self.encode([request], None if image is None else [image])["input_ids"][0].tolist()

    def pad(self, prompts: Sequence[list[int]]) -> Inputs:
        """Left-padded prompts without images: input_ids and attention_mask, int64 [batch, time], and what the family adds."""
        ids, mask = map(torch.tensor, left_padded(prompts, self.tokenizer.pad_token_id or 0))
        added = self.family.model.shiftdc_token_inputs(self.traits, ids, {})
        return {k: v.to(self.device) for k, v in {"input_ids": ids, "attention_mask": mask, **added}.items()}

    def decode(self, ids: Sequence[int] | torch.Tensor) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
