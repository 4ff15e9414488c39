# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""The configs of calibrated checkpoints: the `shiftdc` block of config.json, and the guard against stock classes.

It imports none of the other files: it is read first, also by versions of transformers that are too old for the others.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import transformers

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
FORMAT_VERSION = 3
#: In an exported config.json this sentence stands in one field that the stock config class validates (its value is kept in the
#: `shiftdc` block). A stock class, which would run uncalibrated, then ends in an error that prints the sentence.
STOCK_CLASS_GUARD = (
    "This checkpoint is calibrated by ShiftDC and would be uncalibrated in a stock class: "
    "load it with AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True)."
)
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
        decoder_layers (`str`):
            Path of the decoder layers in the model.
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
    decoder_layers: str
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
        return cls(**{**known, "layers": tuple(block["layers"]), "buffers_sha256": tuple(hashes)})


class ShiftDCConfigMixin(_Config):
    """Adds the `shiftdc` block to a family's config and keeps stock config classes from reading the checkpoint."""

    #: A field whose values the family's stock config class checks.
    shiftdc_guard_field = "tie_word_embeddings"

    @staticmethod
    def shiftdc_unsupported(config: Mapping[str, Any]) -> str | None:
        """Why a base checkpoint with this config.json cannot be calibrated, with what to do; None where it can."""
        return None

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
        field = cls.shiftdc_guard_field
        if "shiftdc" not in config or config.get(field) == STOCK_CLASS_GUARD:
            return config
        guarded = {"field": field, "value": config[field]} if field in config else {"field": field}
        parts = {k: {**v, field: STOCK_CLASS_GUARD} for k, v in config.items() if cls._shiftdc_taken_for_whole(v)}
        return {**config, **parts, field: STOCK_CLASS_GUARD, "shiftdc": {**config["shiftdc"], "guarded": guarded}}

    @classmethod
    def _shiftdc_taken_for_whole(cls, part: object) -> bool:
        """Whether a stock config class would read this part alone: it looks for its own model_type, which Qwen's towers have."""
        return isinstance(part, dict) and part.get("model_type") == cls.model_type.removeprefix("shiftdc_")

    @classmethod
    def shiftdc_unguarded(cls, config: ConfigDict) -> ConfigDict:
        """What `shiftdc_guarded` was made from."""
        field = cls.shiftdc_guard_field
        if config.get(field) != STOCK_CLASS_GUARD:
            return config
        settings = {k: v for k, v in config["shiftdc"].items() if k != "guarded"}
        guarded = config["shiftdc"]["guarded"]
        kept = {
            k: {name: x for name, x in v.items() if x != STOCK_CLASS_GUARD} if cls._shiftdc_taken_for_whole(v) else v
            for k, v in config.items()
            if k != field
        }
        return {**kept, **({field: guarded["value"]} if "value" in guarded else {}), "shiftdc": settings}


class ShiftDCBlipConfigMixin(ShiftDCConfigMixin):
    shiftdc_guard_field = "num_query_tokens"

    @staticmethod
    def shiftdc_unsupported(config: Mapping[str, Any]) -> str | None:
        if config.get("text_config", {}).get("model_type") == "t5":
            return "its language model is an encoder-decoder (T5), and the method is for decoders; take one with a decoder"
        if config.get("image_token_index", config.get("image_token_id")) is None:
            return "its config.json names no image_token_index, so image prompts cannot be told; fetch its newest revision"
        return None


class ShiftDCAyaVisionConfig(ShiftDCConfigMixin, transformers.AyaVisionConfig):
    model_type = "shiftdc_aya_vision"
    shiftdc_guard_field = "vision_feature_select_strategy"


class ShiftDCBlip2Config(ShiftDCBlipConfigMixin, transformers.Blip2Config):
    model_type = "shiftdc_blip-2"


class ShiftDCGemma3Config(ShiftDCConfigMixin, transformers.Gemma3Config):
    model_type = "shiftdc_gemma3"
    shiftdc_guard_field = "mm_tokens_per_image"


class ShiftDCIdefics3Config(ShiftDCConfigMixin, transformers.Idefics3Config):
    model_type = "shiftdc_idefics3"
    shiftdc_guard_field = "scale_factor"


class ShiftDCInstructBlipConfig(ShiftDCBlipConfigMixin, transformers.InstructBlipConfig):
    model_type = "shiftdc_instructblip"


class ShiftDCInternVLConfig(ShiftDCConfigMixin, transformers.InternVLConfig):
    model_type = "shiftdc_internvl"
    shiftdc_guard_field = "image_seq_length"


class ShiftDCLlavaConfig(ShiftDCConfigMixin, transformers.LlavaConfig):
    model_type = "shiftdc_llava"
    shiftdc_guard_field = "vision_feature_select_strategy"


class ShiftDCLlavaNextConfig(ShiftDCConfigMixin, transformers.LlavaNextConfig):
    model_type = "shiftdc_llava_next"
    shiftdc_guard_field = "vision_feature_select_strategy"


class ShiftDCLlavaOnevisionConfig(ShiftDCConfigMixin, transformers.LlavaOnevisionConfig):
    model_type = "shiftdc_llava_onevision"
    shiftdc_guard_field = "vision_feature_select_strategy"


class ShiftDCMistral3Config(ShiftDCConfigMixin, transformers.Mistral3Config):
    model_type = "shiftdc_mistral3"
    shiftdc_guard_field = "spatial_merge_size"


class ShiftDCMllamaConfig(ShiftDCConfigMixin, transformers.MllamaConfig):
    model_type = "shiftdc_mllama"
    shiftdc_guard_field = "image_token_index"


class ShiftDCPaliGemmaConfig(ShiftDCConfigMixin, transformers.PaliGemmaConfig):
    model_type = "shiftdc_paligemma"
    shiftdc_guard_field = "projection_dim"


class ShiftDCQwen2_5_VLConfig(ShiftDCConfigMixin, transformers.Qwen2_5_VLConfig):  # noqa: N801 (as transformers names it)
    model_type = "shiftdc_qwen2_5_vl"
    shiftdc_guard_field = "vision_start_token_id"


class ShiftDCQwen2VLConfig(ShiftDCConfigMixin, transformers.Qwen2VLConfig):
    model_type = "shiftdc_qwen2_vl"
    shiftdc_guard_field = "vision_start_token_id"


class ShiftDCQwen3VLConfig(ShiftDCConfigMixin, transformers.Qwen3VLConfig):
    model_type = "shiftdc_qwen3_vl"
    shiftdc_guard_field = "vision_start_token_id"


class ShiftDCSmolVLMConfig(ShiftDCConfigMixin, transformers.SmolVLMConfig):
    model_type = "shiftdc_smolvlm"
    shiftdc_guard_field = "scale_factor"
