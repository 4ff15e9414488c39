"""What stands in the JSON files of an ONNX folder, as far as the runner reads it. This module imports nothing of torch."""

from __future__ import annotations

from typing import TypedDict


class GraphSettings(TypedDict):
    """image: what the chat template writes for an image, and what the processor puts there. shifts: one per calibrated layer.
    message: whether `position_ids` may carry one.
    """

    image: list[str] | None
    shifts: list[float]
    blank_pixel: float
    message: bool


class ShiftDCSettings(TypedDict):
    reference: str
    rule: str
    gate: str
    strength: float
    layers: list[int]
    caption_max_new_tokens: int
    prompt: dict[str, object]
    onnx: GraphSettings


class TextSettings(TypedDict):
    num_hidden_layers: int


class VisionSettings(TypedDict):
    spatial_merge_size: int


class ModelSettings(TypedDict):
    """config.json."""

    shiftdc: ShiftDCSettings
    image_token_id: int
    text_config: TextSettings
    vision_config: VisionSettings


class GenerationSettings(TypedDict):
    """generation_config.json."""

    eos_token_id: int | list[int]
    pad_token_id: int


class ImageSettings(TypedDict, total=False):
    """preprocessor_config.json."""

    do_convert_rgb: bool
    do_resize: bool
    size: dict[str, int]
    resample: int
    do_center_crop: bool
    crop_size: dict[str, int]
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: list[float]
    image_std: list[float]
