"""From the modules of graphs.py to ONNX: traced with dynamic sizes, with inputs that have a default."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel

from exporter.onnx.families import GraphFamily
from exporter.onnx.graphs import Decoder, Embedding
from exporter.onnx.interface import (
    COORDINATES,
    DECODER,
    EMBED,
    GRAPHS,
    GRID,
    MESSAGE,
    MODE,
    ONE_SIDED,
    STRENGTH,
    TARGET,
    VISION,
    past_names,
    present_names,
)
from exporter.onnx.patches import PatchVision

if TYPE_CHECKING:
    import onnx_ir as ir

    from exporter.models.vlm import VLM

OPSET = 18


def export_graphs(vlm: VLM, family: GraphFamily, end_ids: Sequence[int], graphs: Sequence[str] = GRAPHS) -> dict[str, ir.Model]:
    """onnx_ir models by graph name, of a calibrated model in its own dtype on the CPU."""
    model = vlm.model
    exports: dict[str, Callable[[], ir.Model]] = {
        VISION: lambda: _exported_vision(vlm, family.vision(model).eval(), family.grid_input),
        EMBED: lambda: _exported_embedding(Embedding(model, end_ids).eval()),
        DECODER: lambda: _exported_decoder(model, family.decoder(model, family.masks, end_ids).eval(), family.positions_free),
    }
    with torch.no_grad():
        return {graph: exports[graph]() for graph in graphs}


def _exported_vision(vlm: VLM, module: nn.Module, grid_input: str) -> ir.Model:
    grey = Image.new("RGB", (64, 48), (127, 127, 127))
    encoded = vlm.encode(["a", "b"], [grey, grey])
    inputs = {name: encoded[name] for name in inspect.signature(module.forward).parameters}
    if "pixel_attention_mask" in inputs:
        inputs["pixel_attention_mask"] = inputs["pixel_attention_mask"].bool()  # as transformers.js makes it
    images = torch.export.Dim("num_images")
    dims: tuple[Mapping[int, object], ...]
    if isinstance(module, PatchVision):
        dims, rows = ({0: module.merge**2 * torch.export.Dim("num_features")}, {0: images}), "num_features"
    elif "pixel_attention_mask" in inputs:
        dims, rows = ({0: torch.export.Dim("batch_size"), 1: images},) * 2, "num_tiles"
    else:
        dims, rows = ({0: images},), "num_images"
    names = [grid_input if name == GRID else name for name in inputs]
    exported = _exported(module, tuple(inputs.values()), dims, names, ["image_features"])
    _name_dimension(exported, "image_features", 0, rows)
    if GRID in inputs:
        _name_dimension(exported, "pixel_values", 0, "num_patches")
    return exported


def _exported_embedding(module: nn.Module) -> ir.Model:
    dims = ({0: torch.export.Dim("batch_size"), 1: torch.export.Dim("sequence_length")},)
    return _exported(module, (torch.zeros(2, 5, dtype=torch.long),), dims, ["input_ids"], ["inputs_embeds"])


def _exported_decoder(model: PreTrainedModel, module: Decoder, positions_free: bool) -> ir.Model:
    text = model.config.get_text_config()
    layers, hidden = text.num_hidden_layers, text.hidden_size
    heads = text.num_key_value_heads
    width = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
    columns = len(module.shifts)
    settings = model.config.shiftdc
    batch, time, past = 3, 5, 7
    rows, sequence, total, cached, positions = (
        torch.export.Dim(n)
        for n in ("batch_size", "sequence_length", "total_sequence_length", "past_sequence_length", "position_length")
    )
    dtype = module.head.weight.dtype
    defaults = {
        MODE: torch.tensor([0]),
        TARGET: torch.zeros(1, columns),
        STRENGTH: torch.tensor([float(settings["strength"])]),
        ONE_SIDED: torch.tensor([int(settings["gate"] == "one-sided")]),
    }
    inputs = (
        torch.randn(batch, time, hidden + 1),
        torch.ones(batch, past + time, dtype=torch.long),
        torch.zeros(batch, time + 4, dtype=torch.long) if positions_free else torch.ones(3, batch, time, dtype=torch.long),
        defaults[MODE],
        torch.zeros(batch, columns),  # traced as a row each; one row for all is the default
        defaults[STRENGTH],
        defaults[ONE_SIDED],
        *(torch.randn(batch, heads, past, width).to(dtype) for _ in range(2 * layers)),
    )
    shapes = (
        {0: rows, 1: sequence},
        {0: rows, 1: total},
        {0: rows, 1: positions} if positions_free else {1: rows, 2: sequence},
        None,
        {0: rows},
        None,
        None,
        tuple({0: rows, 2: cached} for _ in range(2 * layers)),
    )
    outputs = ["logits", COORDINATES, *([MESSAGE] if positions_free else []), *present_names(layers)]
    names = ["inputs_embeds", "attention_mask", "position_ids", MODE, TARGET, STRENGTH, ONE_SIDED, *past_names(layers)]
    try:
        exported = _exported(module, inputs, shapes, names, outputs)
    finally:
        for hook in module.hooks:
            hook.remove()
    _make_optional(exported, defaults)
    _name_dimension(exported, TARGET, 0, "shiftdc_rows")  # one row for all, or a row each
    for name in present_names(layers):
        _name_dimension(exported, name, 2, "total_sequence_length")
    return exported


def _exported(
    module: nn.Module, inputs: tuple[torch.Tensor, ...], dims: tuple[object, ...], names: list[str], outputs: list[str]
) -> ir.Model:
    program = torch.onnx.export(
        module,
        inputs,
        input_names=names,
        output_names=outputs,
        dynamic_shapes=dims,
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    return program.model


def _make_optional(exported: ir.Model, defaults: dict[str, torch.Tensor]) -> None:
    """Give graph inputs a default value, which a runtime may override."""
    import onnx_ir as ir

    for value in exported.graph.inputs:
        if value.name in defaults:
            value.const_value = ir.tensor(defaults[value.name].numpy(), name=value.name)
            exported.graph.register_initializer(value)


def _name_dimension(exported: ir.Model, name: str, dimension: int, symbol: str) -> None:
    """Name a dimension of a graph's input or output."""
    import onnx_ir as ir

    value = next(v for v in [*exported.graph.inputs, *exported.graph.outputs] if v.name == name)
    value.shape = ir.Shape([symbol if i == dimension else size for i, size in enumerate(value.shape)])
