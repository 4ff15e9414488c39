"""The config of a calibrated checkpoint, which stock classes refuse; travels inside exported checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what the mixin is mixed into
    from transformers import PretrainedConfig as _Config
else:
    _Config = object

FORMAT_VERSION = 2
#: In an exported config.json this sentence stands in one field that the stock config class validates (its value is kept in the
#: `shiftdc` block). A stock class, which would run uncalibrated, then ends in an error that prints the sentence.
STOCK_CLASS_GUARD = (
    "This checkpoint is calibrated by ShiftDC and would be uncalibrated in a stock class: "
    "load it with AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True)."
)


class ShiftDCConfigMixin(_Config):
    """Adds the `shiftdc` block to a family's config and keeps stock config classes from reading the checkpoint."""

    #: A field whose values the family's stock config class checks.
    shiftdc_guard_field = "tie_word_embeddings"

    @staticmethod
    def shiftdc_unsupported(config: Mapping[str, Any]) -> str | None:
        """Why a base checkpoint with this config.json cannot be calibrated, with what to do; None where it can."""
        return None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return super().from_dict(cls.shiftdc_unguarded(config_dict), **kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        config = self.shiftdc_guarded(json.loads(self.to_json_string(use_diff=use_diff)))
        with open(json_file_path, "w", encoding="utf-8") as file:  # noqa: PTH123 (as transformers, any path-like)
            file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def shiftdc_guarded(cls, config: dict[str, Any]) -> dict[str, Any]:
        """`config` as it is written to config.json."""
        field = cls.shiftdc_guard_field
        if "shiftdc" not in config or config.get(field) == STOCK_CLASS_GUARD:
            return config
        guarded = {"field": field, "value": config[field]} if field in config else {"field": field}
        parts = {k: {**v, field: STOCK_CLASS_GUARD} for k, v in config.items() if cls._shiftdc_taken_for_whole(v)}
        return {**config, **parts, field: STOCK_CLASS_GUARD, "shiftdc": {**config["shiftdc"], "guarded": guarded}}

    @classmethod
    def _shiftdc_taken_for_whole(cls, part: Any) -> bool:
        """Whether a stock config class would read this part alone: it looks for its own model_type, which Qwen's towers have."""
        return isinstance(part, dict) and part.get("model_type") == cls.model_type.removeprefix("shiftdc_")

    @classmethod
    def shiftdc_unguarded(cls, config: dict[str, Any]) -> dict[str, Any]:
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
