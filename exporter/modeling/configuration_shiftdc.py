# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""The configs of calibrated checkpoints: the `shiftdc` block of config.json, and the guard against stock classes.

It imports none of the other files: it is read first, also by versions of transformers that are too old for the others.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import transformers
from transformers import PreTrainedConfig

if TYPE_CHECKING:  # what the mixin is mixed into
    from typing import Self

    from transformers import PreTrainedConfig as _Config
else:
    _Config = object

#: The oldest version of transformers that the code in this checkpoint is for.
TRANSFORMERS = "5.20"
#: Of the `shiftdc` block and the code beside it, which is all that a checkpoint needs to be loaded.
#: 1: directions without a record of them.
#: 2: the config records the SHA-256 of every layer's buffers (`buffers_sha256`).
#: 3: the settings of 2; the code lies in other files, one for each role, and `auto_map` names these.
#: 4: the config says what was measured of the base model (`traits`), so that one file of code serves every class.
FORMAT_VERSION = 4
#: In an exported config.json this sentence stands in one field that the stock config class validates (its value is kept in the
#: `shiftdc` block). A stock class, which would run uncalibrated, then ends in an error that prints the sentence.
STOCK_CLASS_GUARD = (
    "This checkpoint is calibrated by ShiftDC and would be uncalibrated in a stock class: "
    "load it with AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True)."
)
#: What the model_type of a calibrated checkpoint starts with; the base's follows.
PREFIX = "shiftdc_"
#: config.json, parsed.
ConfigDict = dict[str, Any]


def require_transformers(found: str) -> None:
    """Raise ImportError for a version that is too old."""
    needed, given = ([int(n) for n in re.findall(r"\d+", version)[:2]] for version in (TRANSFORMERS, found))
    if given < needed:
        raise ImportError(
            f"This checkpoint is calibrated by ShiftDC and needs transformers {TRANSFORMERS} or newer, found {found}: "
            f"pip install --upgrade 'transformers>={TRANSFORMERS},<6'."
        )


require_transformers(transformers.__version__)


@dataclass(frozen=True)
class TokenInput:
    """An input as long as the prompt.

    Args:
        elsewhere (`int`):
            What stands at most tokens.
        at (`dict[str, int]`):
            What stands at others, by token id: those of images.
        in_text (`bool`):
            Whether prompts without an image have it too.
    """

    elsewhere: int
    at: Mapping[str, int]
    in_text: bool


@dataclass(frozen=True)
class ShiftDCTraits:
    """What was measured of the base model at export, by which one file of code serves every class.

    Args:
        decoder_layers (`str`):
            Path of the decoder layers in the model.
        width (`int`):
            How many numbers a decoder layer puts out for a token.
        stream_axis (`int`, *optional*):
            The axis of what a decoder layer puts out that counts residual streams, where there are several.
        guard_field (`str`):
            The field of config.json that keeps stock classes away.
        image_token_id (`int`):
            The token id that stands for a part of an image.
        video_token_id (`int`, *optional*):
            The same for videos, where they have a token of their own.
        pixel_inputs (`tuple[str, ...]`):
            The arguments of forward() that hold pictures.
        row_inputs (`tuple[str, ...]`):
            Image arguments with an entry for every row of the batch, with an image or without.
        token_inputs (`dict[str, TokenInput]`):
            Arguments as long as the prompt.
        blank_pixel (`float`):
            Every pixel of the blank reference, after normalisation: the processor's mean colour, if that is no padding.
        shares_prefix (`bool`):
            Whether a reply may go on from the KV cache of the prompt's beginning, up to the end of the image.
        needs_positions (`bool`):
            Whether forward() must be told positions where rows are padded on the left.
        backbone_state (`tuple[str, ...]`):
            Attributes in which the base class keeps something from one pass to the next, as paths in the model.
    """

    decoder_layers: str
    width: int
    guard_field: str
    image_token_id: int
    stream_axis: int | None = None
    video_token_id: int | None = None
    pixel_inputs: tuple[str, ...] = ("pixel_values",)
    row_inputs: tuple[str, ...] = ()
    token_inputs: Mapping[str, TokenInput] = field(default_factory=dict)
    blank_pixel: float = 0.0
    shares_prefix: bool = False
    needs_positions: bool = False
    backbone_state: tuple[str, ...] = ()

    def as_json(self) -> ConfigDict:
        """Plain values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ShiftDCTraits:
        """What `as_json` was made from."""
        known: ConfigDict = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        known["token_inputs"] = {k: TokenInput(**v) for k, v in values["token_inputs"].items()}
        return cls(**known)


@dataclass(frozen=True)
class ShiftDCSettings:
    """The `shiftdc` block of config.json.

    Args:
        reference (`str`):
            What the coordinate of an image prompt is corrected to: that of a text-only prompt with the image's caption
            (`"caption"`, the paper's), of the request alone (`"text"`), or of the same prompt with a neutral image (`"blank"`).
            `"static"`: by the mean shift that was measured at export.
        rule (`str`):
            `"sequential"`: a layer's coordinate is read behind the corrections of the layers before it. `"precomputed"`: in an
            uncorrected pass.
        gate (`str`):
            `"two-sided"`: the paper's. `"one-sided"`: no input is ever moved toward "safe".
        strength (`float`):
            Factor of every correction; 1 is the paper's.
        layers (`tuple[int, ...]`):
            The calibrated decoder layers.
        buffers_sha256 (`tuple[str, ...]`):
            SHA-256 of each layer's direction and shift.
        traits (`ShiftDCTraits`):
            What was measured of the base model.
        caption_max_new_tokens (`int`):
            Length of a caption.
        prompt (`dict`):
            `PromptFrame.as_json()`: what the chat template writes around requests and images.
        adapter (`str`, *optional*):
            Folder of a PEFT adapter that is part of the checkpoint.
    """

    reference: Literal["caption", "text", "blank", "static"]
    rule: Literal["sequential", "precomputed"]
    gate: Literal["one-sided", "two-sided"]
    strength: float
    layers: tuple[int, ...]
    buffers_sha256: tuple[str, ...]
    traits: ShiftDCTraits
    caption_max_new_tokens: int
    prompt: dict[str, object]
    adapter: str | None = None

    @classmethod
    def of(cls, config: _Config) -> ShiftDCSettings:
        """The settings of a model's config. Raises ValueError where it has none, or of another format."""
        block = getattr(config, "shiftdc", None)
        if not isinstance(block, dict):
            raise ValueError("config.json has no 'shiftdc' block: this checkpoint was not written by shiftdc-export.")
        if block.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"config.shiftdc.version is {block.get('version')!r}, expected {FORMAT_VERSION}: "
                "this modeling file belongs to another export; export the checkpoint again."
            )
        hashes = block.get("buffers_sha256")
        if not isinstance(hashes, (list, tuple)) or len(hashes) != len(block["layers"]):
            raise ValueError(
                "config.shiftdc.buffers_sha256 must have the SHA-256 of the buffers of each calibrated layer; fetch the "
                "checkpoint again, or export it again."
            )
        if missing := [f.name for f in fields(cls) if f.default is MISSING and f.name not in block]:
            raise ValueError(f"config.shiftdc.{missing[0]} is missing; fetch the checkpoint again, or export it again.")
        known: ConfigDict = {f.name: block[f.name] for f in fields(cls) if f.name in block}
        traits = ShiftDCTraits.from_json(block["traits"])
        return cls(**{**known, "traits": traits, "layers": tuple(block["layers"]), "buffers_sha256": tuple(hashes)})


class ShiftDCConfigMixin(_Config):
    """Adds the `shiftdc` block to a stock config and keeps stock config classes from reading the checkpoint."""

    @classmethod
    def from_dict(cls, config_dict: ConfigDict, **kwargs: object) -> Self:
        return super().from_dict(cls.shiftdc_unguarded(config_dict), **kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        config = self.shiftdc_guarded(json.loads(self.to_json_string(use_diff=use_diff)))
        with open(json_file_path, "w", encoding="utf-8") as file:  # noqa: PTH123 (as transformers, any path-like)
            file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def shiftdc_guarded(cls, config: ConfigDict) -> ConfigDict:
        """`config` as it is written to config.json."""
        if "shiftdc" not in config or "guarded" in config["shiftdc"]:
            return config
        name = config["shiftdc"]["traits"]["guard_field"]
        guarded = {"value": config[name]} if name in config else {}
        parts = {k: {**v, name: STOCK_CLASS_GUARD} for k, v in config.items() if cls._shiftdc_taken_for_whole(v)}
        return {**config, **parts, name: STOCK_CLASS_GUARD, "shiftdc": {**config["shiftdc"], "guarded": guarded}}

    @classmethod
    def _shiftdc_taken_for_whole(cls, part: object) -> bool:
        """Whether a stock config class would read this part alone: it looks for its own model_type, which Qwen's towers have."""
        return isinstance(part, dict) and part.get("model_type") == cls.model_type.removeprefix(PREFIX)

    @classmethod
    def shiftdc_unguarded(cls, config: ConfigDict) -> ConfigDict:
        """What `shiftdc_guarded` was made from."""
        block = config.get("shiftdc")
        if not isinstance(block, dict) or "guarded" not in block:
            return config
        name, guarded = block["traits"]["guard_field"], block["guarded"]
        kept = {
            k: {part: x for part, x in v.items() if x != STOCK_CLASS_GUARD} if cls._shiftdc_taken_for_whole(v) else v
            for k, v in config.items()
            if k != name
        }
        settings = {k: v for k, v in block.items() if k != "guarded"}
        return {**kept, **({name: guarded["value"]} if "value" in guarded else {}), "shiftdc": settings}


@functools.cache
def config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The calibrated counterpart of a config class of transformers. It is also an attribute of this module."""
    name = f"ShiftDC{stock.__name__}"
    return type(name, (ShiftDCConfigMixin, stock), {"model_type": PREFIX + stock.model_type, "__module__": __name__})


def __getattr__(name: str) -> type[PreTrainedConfig]:
    """`ShiftDCLlavaConfig` for transformers' `LlavaConfig`, and so on: config.json and pickles name these."""
    return config_class(stock_class(name, __name__))


def stock_class(name: str, module: str) -> Any:
    """The class of transformers that `name` is the calibrated counterpart of. Raises AttributeError."""
    found = getattr(transformers, name.removeprefix("ShiftDC"), None) if name.startswith("ShiftDC") else None
    if found is None:
        raise AttributeError(
            f"There is no {name} in {module}: transformers {transformers.__version__} has no class of that name; use the "
            "version that the checkpoint's README names."
        )
    return found
