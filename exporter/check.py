"""Whether a checkpoint can be calibrated, before anything large is loaded: its config, tokenizer, processor and template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from exporter.errors import InputError, refusing
from exporter.modeling.modeling_shiftdc_prompts import PromptFrame
from exporter.prompt_check import PromptCheck, check_prompts
from exporter.prompt_frame import prompt_frame
from exporter.recipes import Recipe
from exporter.source import BaseCheckpoint
from exporter.vlm import VLM, load_processor


@dataclass(frozen=True)
class Check:
    """The frame of a checkpoint's prompts, and how prompts composed with it compare with the chat template's own."""

    frame: PromptFrame
    prompts: PromptCheck


def check(base: BaseCheckpoint, recipe: Recipe, *, allow_inexact: bool = False) -> Check:
    """Raises InputError where the checkpoint cannot be calibrated; loads no weights.

    allow_inexact: composed prompts may differ from the template's; what differs is in the result.
    """
    vlm = skeleton(base, recipe)
    vlm.decoder_layers(recipe.decoder_layers)
    with refusing(f"MODEL: prompts of {base.name} cannot be composed", "restore its chat template and tokenizer"):
        frame = prompt_frame(vlm, recipe.wording)
        found = check_prompts(vlm.framed(frame), frame)
    if not found.exact and not allow_inexact:
        raise InputError(
            f"MODEL: {found}; the method would compare prompts that the model was not trained on. Restore the tokenizer and the "
            "chat template, or give --allow-inexact-prompts."
        )
    return Check(frame, found)


def skeleton(base: BaseCheckpoint, recipe: Recipe) -> VLM:
    """The model without weights, for its class and its layers, and the processor. Raises InputError."""
    with refusing(f"MODEL: {base.name} cannot be set up as {recipe.family}", "restore its config.json"):
        config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
        with torch.device("meta"):
            model: Any = AutoModelForImageTextToText.from_config(config)
    return VLM(model, load_processor(base.folder, recipe), composed_text=recipe.chat_template is not None)
