"""Stock config classes are stopped in every part that they would read alone."""

from __future__ import annotations

import json

import pytest
from transformers import Qwen3VLConfig

from exporter.modeling.configuration_shiftdc import STOCK_CLASS_GUARD
from exporter.models.families import family

SETTINGS = {"version": 4, "traits": {"guard_field": "vision_start_token_id"}}


def test_a_tower_with_the_models_own_type_is_guarded_too(tmp_path):
    """As published: Qwen's vision_config has the model_type of the whole, and transformers would take it for the whole."""
    ours = family("qwen3_vl").config
    whole = {"model_type": "shiftdc_qwen3_vl", "vision_config": {"model_type": "qwen3_vl", "depth": 2}, "shiftdc": SETTINGS}
    guarded = ours.shiftdc_guarded(whole)
    assert guarded["vision_config"]["vision_start_token_id"] == STOCK_CLASS_GUARD
    assert ours.shiftdc_unguarded(guarded) == whole
    (tmp_path / "config.json").write_text(json.dumps(guarded))
    with pytest.raises(Exception, match="calibrated by ShiftDC"):
        Qwen3VLConfig.from_pretrained(tmp_path)
