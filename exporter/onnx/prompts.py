"""Requests to token ids with a tokenizer.json and a chat template alone; reads the files of an ONNX export."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2.exceptions import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from exporter.errors import InputError


class PromptWriter:
    """Chat template and tokenizer; a `Codec` of prompts_shiftdc.py too.

    image: what the template writes for an image, and what a model reads in its place; None where that depends on the picture.
    """

    def __init__(self, folder: Path, image: Sequence[str] | None):
        config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.image = image
        self.named = {k: _text(v) for k, v in config.items() if k.endswith("_token") and v is not None}
        ids = {name: self.tokenizer.token_to_id(token) for name, token in self.named.items()}
        self.bos = ids.get("bos_token")
        special = {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        self.special = frozenset(special - ({ids.get("unk_token")} - {ids.get(f"{n}_token") for n in ("bos", "eos", "pad")}))
        self.template = _environment().from_string(config["chat_template"])

    def __call__(self, request: str, images: int) -> list[int]:
        """Token ids of one user turn with the generation prompt behind it. Raises InputError."""
        if images and self.image is None:
            raise InputError(
                "This family's prompts depend on the size of the picture: give `shiftdc-export generate` the checkpoint itself "
                "and not its onnx folder; in Python make input_ids and pixels with its processor for OnnxShiftDC.generate()."
            )
        pictures = [{"type": "image"}] * images
        turns = [{"role": "user", "content": [*pictures, {"type": "text", "text": request}]}]
        try:
            prompt = self.template.render(messages=turns, add_generation_prompt=True, **self.named)
        except TemplateError as error:
            raise InputError(f"The chat template does not take this prompt ({error}); ask another way.") from error
        starts = prompt.startswith(self.named.get("bos_token") or "\0")
        if self.image is not None:
            placeholder, written = self.image
            if prompt.count(placeholder) != images:
                raise InputError(f"The request holds {placeholder!r}, which stands for an image; leave it out.")
            prompt = prompt.replace(placeholder, written)
        return self.tokenizer.encode(prompt, add_special_tokens=not starts).ids

    def encode(self, text: str, *, plain: bool = False) -> list[int]:
        """Token ids without a first token of their own; plain: also what reads as a special token is text."""
        self.tokenizer.encode_special_tokens = plain
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            self.tokenizer.encode_special_tokens = False

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def written(self, token: int) -> str:
        """How a special token is written."""
        return str(self.tokenizer.id_to_token(token))

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def _text(token: str | Mapping[str, str]) -> str:
    return token if isinstance(token, str) else token["content"]


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = _raise
    return environment


def _raise(message: str) -> None:
    raise TemplateError(message)
