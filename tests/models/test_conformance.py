"""test_families.py on every image-text-to-text type of transformers, or on some that stand for the others.

`make families` runs all of them and writes docs/families.md; SHIFTDC_FAMILIES=qwen3_5,gemma4 runs these.
"""

from __future__ import annotations

import os

import pytest
from test_families import *  # noqa: F403
from zoo import families, tiny_family

# of families in test_families.py
del test_blip_checkpoints_that_cannot_be_calibrated_are_refused, test_pan_and_scan_is_refused  # noqa: F821
del test_cross_attention_layers_are_left_out  # noqa: F821

#: Experts, linear attention, windows with shared keys, several residual streams, a vision tower in the text model, patches.
REPRESENTATIVES = ("qwen3_5_moe", "gemma4", "gemma3n", "llama4", "ovis2", "nemotron_h_omni")


def chosen() -> list[str]:
    named = os.environ.get("SHIFTDC_FAMILIES", ",".join(REPRESENTATIVES))
    return list(families()) if named == "all" else named.split(",")


@pytest.fixture(scope="module", params=chosen())
def tiny(request):
    return tiny_family(request.param)
