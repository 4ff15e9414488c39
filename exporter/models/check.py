"""Whether a checkpoint can be calibrated, before anything large is loaded: its config, tokenizer, processor and template."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from exporter.errors import InputError, refusing
from exporter.modeling.configuration_shiftdc import ShiftDCTraits
from exporter.modeling.prompts_shiftdc import PromptFrame
from exporter.models.base import DEMO, BaseFiles
from exporter.models.families import family
from exporter.models.family_table import image_text_types
from exporter.models.processors import load_processor
from exporter.models.prompt_check import PromptCheck, check_prompts
from exporter.models.prompt_frame import prompt_frame
from exporter.models.recipe import Recipe, load_recipe, recipe_for_family
from exporter.models.refused import REFUSED
from exporter.models.vlm import VLM, composes_text

UNTRIED = "No recipe is written for this family: --experimental-family tries it with defaults, and what it needs is measured."


@dataclass(frozen=True)
class Check:
    """The frame of a checkpoint's prompts, and how prompts composed with it compare with the chat template's own."""

    frame: PromptFrame
    prompts: PromptCheck
    depth: int
    traits: ShiftDCTraits


def check(base: BaseFiles, recipe: Recipe, *, allow_inexact: bool = False) -> Check:
    """Raises InputError where the checkpoint cannot be calibrated; loads no weights.

    allow_inexact: composed prompts may differ from the template's; what differs is in the result.
    """
    vlm = skeleton(base, recipe)
    depth = len(vlm.decoder_layers)
    frame = prompt_frame(vlm, recipe.wording)
    found = check_prompts(vlm.framed(frame), frame)
    if not found.exact and not allow_inexact:
        raise InputError(
            f"MODEL: {found}; the method would compare prompts that the model was not trained on. Restore the tokenizer and the "
            "chat template, or give --allow-inexact-prompts."
        )
    return Check(frame, found, depth, vlm.traits)


def recipe_of(base: BaseFiles, named: str | None = None, *, experimental: bool = False) -> Recipe:
    """The recipe that is named, or the one of the checkpoint's family. Raises InputError where it does not fit the checkpoint.

    experimental: a family that is new in transformers gets a recipe of defaults.
    """
    if (reason := REFUSED.get(base.model_type)) is not None:
        raise InputError(f"MODEL: {base.name} (model_type {base.model_type}) cannot be calibrated: {reason}.")
    recipe = load_recipe(named) if named else family_recipe(base, experimental=experimental)
    if recipe.family != base.model_type:
        raise InputError(f"Recipe: it is for family {recipe.family!r}, and {base.name} is a {base.model_type!r}; choose another.")
    check_supported(base, recipe)
    return recipe


def family_recipe(base: BaseFiles, *, experimental: bool) -> Recipe:
    """The recipe that fits a checkpoint. Raises InputError."""
    name = DEMO if base.name == DEMO else recipe_for_family(base.model_type)
    if name is not None:
        return load_recipe(name)
    if base.model_type not in image_text_types():
        raise InputError(
            f"MODEL: {base.name} is of family {base.model_type!r}, for which there is no recipe; "
            "'shiftdc-export recipes' lists the families supported."
        )
    if not experimental:
        raise InputError(
            f"MODEL: {base.name} is of family {base.model_type!r}, which transformers {transformers.__version__} has and this "
            "version of shiftdc-export was never tried on; --experimental-family tries it, by measurement."
        )
    return Recipe.model_validate({"family": base.model_type, "models": (), "notes": (UNTRIED,)})


def check_supported(base: BaseFiles, recipe: Recipe) -> None:
    """Raise InputError where the family, or this checkpoint of it, cannot be calibrated."""
    family(recipe.family)
    if not base.has_chat_template and recipe.chat_template is None:
        raise InputError(
            f"MODEL: {base.name} has no chat template (looked for chat_template.jinja, chat_template.json and "
            "tokenizer_config.json); the method compares prompts as the model was trained to see them, so add one to the "
            "checkpoint."
        )
    if not isinstance(base.config.get("text_config", {}), dict):
        raise InputError(f"MODEL: the config.json of {base.name} cannot be used (its text_config is no object); restore it.")


def skeleton(base: BaseFiles, recipe: Recipe) -> VLM:
    """The model without weights, for its class and its layers, and the processor. Raises InputError."""
    with refusing(f"MODEL: {base.name} cannot be set up as {recipe.family}", "restore its config.json"):
        config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
        if config.get_text_config(decoder=True).is_encoder_decoder or config.is_encoder_decoder:
            raise InputError(
                f"MODEL: {base.name} cannot be calibrated: its language model is an encoder-decoder, and the method is for "
                "decoders; take one with a decoder."
            )
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
    processor = load_processor(base.folder, recipe)
    return VLM(model, processor, composed_text=composes_text(processor, recipe))
