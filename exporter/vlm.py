"""A loaded vision-language model with its processor: from requests and images to tensors."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText

from exporter.calibration import blank_image
from exporter.errors import InputError, refusing
from exporter.families import Family, family
from exporter.modeling.prompts_shiftdc import PromptComposer, PromptFrame, TokenizerCodec
from exporter.needs import BLOCK, is_quantised
from exporter.notices import noticed
from exporter.processors import load_with_notices
from exporter.recipes import Recipe
from exporter.source import BaseCheckpoint, BaseFiles
from exporter.templates import encoded, rendered

Inputs = dict[str, torch.Tensor]
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class VLM:
    """Model and processor. Prompts always go through the chat template, with the generation prompt at the end.

    `composed_text`: a prompt without image is one with an image, less its image tokens (the processor takes no other).
    `composer`: makes prompts without image of those with one, where the template's own differ from them by more (`PromptFrame`).
    `notices`: what transformers said while it loaded them.
    """

    model: Any
    processor: Any
    composed_text: bool = False
    composer: PromptComposer | None = None
    notices: tuple[str, ...] = ()

    def framed(self, frame: PromptFrame) -> VLM:
        """With prompts that share their frame on both sides of a difference."""
        return replace(self, composer=self.composing(frame) if frame.own else None)

    def composing(self, frame: PromptFrame) -> PromptComposer:
        return PromptComposer(frame, TokenizerCodec(self.tokenizer), self.image_token_id)

    @cached_property
    def family(self) -> Family:
        return family(self.model.config.model_type.removeprefix("shiftdc_"))

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    @property
    def image_layers(self) -> frozenset[int]:
        """Decoder layers that prompts without an image skip."""
        return self.family.model.shiftdc_image_layers(self.model.config.get_text_config())

    @property
    def device(self) -> torch.device:
        """Where inputs go: of an offloaded model, the device on which its embeddings run."""
        embeddings = self.model.get_input_embeddings()
        hook = getattr(embeddings, "_hf_hook", None)
        place = getattr(hook, "execution_device", None)
        found = embeddings.weight.device if place is None else torch.device(place)
        return torch.device("cpu") if found.type == "meta" else found  # a model without weights is never run

    def decoder_layers(self, path: str) -> nn.ModuleList:
        """The decoder layers at `path`, checked against the config. Raises InputError."""
        expected = self.model.config.get_text_config().num_hidden_layers
        try:
            layers = self.model.get_submodule(path)
        except AttributeError:
            raise InputError(
                f"Recipe: decoder_layers is {path!r}, which {type(self.model).__name__} has not; correct the path."
            ) from None
        if not isinstance(layers, nn.ModuleList) or len(layers) != expected:
            raise InputError(
                f"Recipe: decoder_layers {path!r} is no list of the config's {expected} decoder layers; correct the path."
            )
        return layers

    def encode(self, requests: Sequence[str], images: Sequence[Image.Image] | None = None) -> Inputs:
        """Left-padded prompts: input_ids and attention_mask int64 [batch, time], and the images' tensors."""
        pictures: Sequence[Image.Image | None] = images if images is not None else [None] * len(requests)
        conversations = [[user_turn(r, p)] for r, p in zip(requests, pictures, strict=True)]
        return self.encode_conversations(conversations)

    def encode_conversations(self, conversations: Sequence[list[dict[str, Any]]]) -> Inputs:
        if self.composed_text and not any(has_image(c) for c in conversations):
            return self.pad([self._without_image(c) for c in conversations])
        if self.composer is not None and not any(has_image(c) for c in conversations):
            return self.pad([self._image_taken_out(c, self.composer) for c in conversations])
        padding = {"padding": True, "padding_side": "left"}
        inputs = encoded(self.processor, conversations, return_tensors="pt", processor_kwargs=padding)
        return {k: v.to(self.device) for k, v in inputs.items() if isinstance(v, torch.Tensor) and k != "labels"}

    def _without_image(self, conversation: list[dict[str, Any]]) -> list[int]:
        ids = self.encode_conversations([with_blank_image(conversation)])["input_ids"][0].tolist()
        return [i for i in ids if i != self.image_token_id]

    def _image_taken_out(self, conversation: list[dict[str, Any]], composer: PromptComposer) -> list[int]:
        text = rendered(self.processor, with_blank_image(conversation), add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=composer.frame.bos_added)["input_ids"]
        return composer.text_prompt(ids)

    def backbone(self, inputs: Inputs) -> None:
        """One pass through the decoder layers, without cache."""
        self.family.model.shiftdc_backbone(self.model, **inputs)

    def token_ids(self, request: str, image: Image.Image | None = None) -> list[int]:
        """One prompt as a list of token ids."""
        return self.encode([request], None if image is None else [image])["input_ids"][0].tolist()

    def pad(self, prompts: Sequence[list[int]]) -> Inputs:
        """Left-padded prompts without images: input_ids and attention_mask, int64 [batch, time], and what the family adds."""
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        added = self.family.model.shiftdc_token_inputs(ids, self.image_token_id, {})
        return {k: v.to(self.device) for k, v in {"input_ids": ids, "attention_mask": mask, **added}.items()}

    def decode(self, ids: Sequence[int] | torch.Tensor) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def user_turn(request: str, *images: Image.Image | None) -> dict[str, Any]:
    """One user message in the form that chat templates take."""
    pictures = [{"type": "image", "image": image} for image in images if image is not None]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": request}]}


def has_image(conversation: list[dict[str, Any]]) -> bool:
    return any(part["type"] == "image" for turn in conversation for part in turn["content"])


def with_blank_image(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With a neutral image before the first request."""
    index = next(i for i, turn in enumerate(conversation) if turn["role"] == "user")
    first = conversation[index]
    shown = {**first, "content": [{"type": "image", "image": blank_image()}, *first["content"]]}
    return [*conversation[:index], shown, *conversation[index + 1 :]]


def load_vlm(
    base: BaseCheckpoint,
    recipe: Recipe,
    *,
    dtype: str = "auto",
    device_map: str | dict[str, str] | None = None,
    offload: Path | None = None,
    quantised: int | None = None,
    adapter: Path | None = None,
) -> VLM:
    """Load the base with transformers' own class; its repository's code is never run. Raises InputError.

    offload: folder for weights that `device_map` leaves on disk. quantised: 4 or 8 bits, by bitsandbytes. adapter: a PEFT
    adapter's folder, added and not merged.
    """
    processor, notices = load_with_notices(base.folder, recipe)
    options: dict[str, Any] = {} if device_map is None else {"device_map": device_map, "offload_folder": offload}
    if quantised is not None:
        options["quantization_config"] = _quantisation(quantised, dtype, base)
    loading = refusing(f"MODEL: {base.name} cannot be loaded as {recipe.family}", "fetch it again, or give another model")
    with noticed(f"MODEL: {base.name}", base.folder) as said, loading:
        model, report = AutoModelForImageTextToText.from_pretrained(
            base.folder, dtype=DTYPES[dtype], trust_remote_code=False, use_safetensors=True, output_loading_info=True, **options
        )
        if adapter is not None:
            model.load_adapter(str(adapter))
    for kind in ("missing_keys", "mismatched_keys"):
        if report[kind]:
            raise InputError(
                f"MODEL: {base.name} does not fill the model: {len(report[kind])} {kind.replace('_', ' ')}, "
                f"{min(map(str, report[kind]))} among them; the checkpoint is incomplete or of another architecture."
            )
    if device_map is None and quantised is None and torch.cuda.is_available():
        model = model.to("cuda")
    vlm = VLM(model.eval(), processor, recipe.chat_template is not None, notices=(*notices, *said))
    _check_answers(vlm, base.name)
    return vlm


@torch.no_grad()
def _check_answers(vlm: VLM, name: str) -> None:
    """One prompt with an image, before hours of them. Raises InputError."""
    with refusing(f"MODEL: {name} cannot read a prompt with an image", "restore its config, processor and chat template"):
        inputs = vlm.encode(["What is it?"], [Image.new("RGB", (64, 64), (127, 127, 127))])
        logits = vlm.model(**inputs, logits_to_keep=1).logits
    if not torch.isfinite(logits).all():
        raise InputError(
            f"MODEL: {name} answers with numbers that are not finite: its weights are damaged, or too large for the dtype; "
            "fetch it again, or give --dtype float32."
        )


def check_quantisation(quantised: int | None, base: BaseFiles) -> None:
    """Raise InputError where a quantised base cannot be had."""
    if quantised is None:
        return
    option = f"--load-in-{quantised}bit"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"{option}: it needs bitsandbytes, which is not installed; pip install 'shiftdc-export[quantized]'.")
    if "quantization_config" in base.config:
        raise InputError(f"{option}: {base.name} is stored quantised already; leave the option out.")


def check_widths(quantised: int | None, base: BaseCheckpoint) -> None:
    """Raise InputError where bitsandbytes does not take the widths of the base's matrices."""
    if quantised is None:
        return
    linear = [(name, t) for header in base.headers.values() for name, t in header.items() if is_quantised(name, t)]
    odd = [f"{name} {list(t.shape)}" for name, t in linear if t.shape[1] % BLOCK]
    if quantised == 4 and odd and not torch.cuda.is_available():
        raise InputError(
            f"--load-in-4bit: on a CPU bitsandbytes takes widths that are multiples of {BLOCK}, found {odd[0]}; leave it out."
        )


def _quantisation(bits: int, dtype: str, base: BaseCheckpoint) -> Any:
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    stored = base.config.get("dtype") or base.config.get("torch_dtype") or "float32"
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=stored if dtype == "auto" else dtype
    )
