"""A calibrated model that shares the weights of a stock one: no file, and no second copy of what may be large."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from exporter.checkpoint.bake import identity, shiftdc_block
from exporter.checkpoint.calibrated import Calibrated
from exporter.directions.directions import Directions
from exporter.models.families import family
from exporter.models.prompt_frame import prompt_frame
from exporter.models.recipe import Recipe
from exporter.models.trials import tried_traits
from exporter.models.vlm import VLM


def with_traits(settings: dict[str, Any], **changes: object) -> dict[str, Any]:
    """The `shiftdc` block of a config with other traits."""
    return {**settings, "traits": {**settings["traits"], **changes}}


def calibrated_copy(vlm: VLM, recipe: Recipe, layers: tuple[int, ...], shift: float = 1.0) -> VLM:
    """The model of `vlm` with random directions at `layers`."""
    stock, classes = vlm.model, family(recipe.family)
    generator = torch.Generator().manual_seed(0)
    size = stock.config.get_text_config().hidden_size
    units = torch.nn.functional.normalize(torch.randn(len(layers), size, generator=generator), dim=-1)
    directions = Directions(layers, units, torch.full((len(layers),), shift), ())
    base = SimpleNamespace(name="random", revision=None)
    block = shiftdc_block(Calibrated(recipe, directions, layers, prompt_frame(vlm, recipe.wording), tried_traits(vlm)), base)
    settings = {**stock.config.to_dict(), **identity(classes), "shiftdc": block}
    with torch.device("meta"):
        model: Any = classes.model(classes.config.from_dict(settings))
    model.load_state_dict(stock.state_dict(), strict=False, assign=True)
    model.tie_weights()
    for name, buffer in stock.named_buffers():  # those that are not in the state dict too
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module)._buffers[leaf] = buffer
    for layer, correction in zip(layers, model.shiftdc_corrections, strict=True):
        correction.direction, correction.shift = (t.to(vlm.device) for t in directions.of(layer))
    model.shiftdc_use_tokenizer(vlm.tokenizer)
    model.generation_config = stock.generation_config
    model.shiftdc_check()
    return VLM(model.eval(), vlm.processor, vlm.composed_text)
