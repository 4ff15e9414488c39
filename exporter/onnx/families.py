"""Which families have ONNX graphs, and what differs between them: those that transformers.js loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from exporter.errors import InputError
from exporter.onnx.attention import causal_mask, gemma3_masks
from exporter.onnx.graphs import Decoder, Gemma3Vision, GridDecoder, Idefics3Vision, LlavaVision, Masks
from exporter.onnx.interface import GRID
from exporter.onnx.patches import PatchVision
from exporter.runtime.reading import Json, member


@dataclass(frozen=True)
class GraphFamily:
    """What differs between families.

    js_type: model_type under which transformers.js loads it. masks: attention masks of the decoder, as `causal_mask`.
    image_text: from a processor and the number of features of an image, what the chat template writes for an image, and what
    the processor puts there; None where that depends on the picture. grid_input: what the vision encoder's input
    `image_grid_thw` is called there.
    """

    js_type: str
    vision: Callable[[PreTrainedModel], nn.Module]
    masks: Masks
    image_text: Callable[[ProcessorMixin, int], tuple[str, str]] | None
    decoder: type[Decoder] = Decoder
    grid_input: str = GRID

    @property
    def positions_free(self) -> bool:
        """Whether `position_ids` can carry a message."""
        return not issubclass(self.decoder, GridDecoder)


FAMILIES = {
    "llava": GraphFamily("llava", LlavaVision, causal_mask, lambda p, n: (p.image_token, p.image_token * n)),
    "idefics3": GraphFamily("idefics3", Idefics3Vision, causal_mask, None),
    "smolvlm": GraphFamily("smolvlm", Idefics3Vision, causal_mask, None),
    "gemma3": GraphFamily("gemma3", Gemma3Vision, gemma3_masks, lambda p, n: (p.boi_token, p.full_image_sequence)),
    "qwen2_vl": GraphFamily("qwen2_vl", PatchVision, causal_mask, None, GridDecoder, "grid_thw"),
    "qwen2_5_vl": GraphFamily("qwen2_5_vl", PatchVision, causal_mask, None, GridDecoder),
}


def graph_family(name: str, config: Mapping[str, Json]) -> GraphFamily:
    """The graphs of a family, for a checkpoint with this config.json. Raises InputError."""
    if name not in FAMILIES:
        raise InputError(f"ONNX: family {name!r} has no graphs yet, expected one of {', '.join(FAMILIES)}; leave --onnx out.")
    if member(config, "vision_config").get("model_type") == "pixtral":
        raise InputError("ONNX: Pixtral, whose pictures keep their own shape, has no graphs yet; leave --onnx out.")
    if any(part.get("use_sliding_window") for part in (config, member(config, "text_config"))):
        raise InputError("ONNX: use_sliding_window is true in config.json, and the graphs have no window; leave --onnx out.")
    return FAMILIES[name]
