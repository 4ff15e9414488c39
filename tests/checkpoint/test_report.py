"""shiftdc_report.json: what stands in it, in which order, and that reading and writing it changes nothing."""

from __future__ import annotations

import json
import re

import pytest

from exporter.models.recipe import load_recipe

LAYER = {
    "layer": 1, "norm": "float", "auroc": "float", "separation": "float", "split_half_cosine": "float", "text_safe": "float",
    "text_unsafe": "float", "image_safe": "float", "image_unsafe": "float", "shift": "float", "shift_cosine": "float",
    "blank_shift": "float", "gradient": None,
}  # fmt: skip
FILES = (
    "README.md", "assets/shiftdc_probe.safetensors", "chat_template.jinja", "config.json", "generation_config.json",
    "model-00001-of-00002.safetensors", "model.safetensors.index.json", "processor_config.json", "shiftdc.safetensors",
    "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip


def plain(value):
    """Hashes and numbers with a fraction, which a machine or a time may change, as words."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return "float"
    return "SHA-256" if re.fullmatch("[0-9a-f]{64}", str(value)) else value


def expected(plan):
    """The whole document of the tiny export, key by key."""
    recipe = load_recipe("llava").with_overrides(layers="1-2", calibration=plan.recipe.calibration)
    return {
        "base_model": {
            "id": "tiny-llava",
            "revision": None,
            "architecture": "LlavaForConditionalGeneration",
            "shards": {"model-00001-of-00002.safetensors": "SHA-256"},
            "placed": "bytes",
        },
        "recipe": plain(json.loads(json.dumps(recipe.model_dump()))),
        "calibration": {
            "name": "small", "sha256": "SHA-256", "images": False, "fit_safe": 8, "fit_unsafe": 8, "held_out_safe": 2,
            "held_out_unsafe": 2, "warnings": ["Directions rest on 8 harmful requests only."],
        },
        "prompts": {"compared": "count", "different": 0, "not_taken_by_the_template": []},
        "directions": "difference of mean safe and mean unsafe text (arXiv:2502.13095, Eq. 4)",
        "layers": {"chosen": [1, 2], "depth": 4, "criterion": "given by the caller", "left_out": {}},
        "statistics": [LAYER, {**LAYER, "layer": 2}],
        "versions": ["shiftdc-export", "torch", "transformers", "safetensors"],
        "device": "name",
        "dtype": "auto",
        "measured_quantised": None,
        "warnings": [],
        "resumed_batches": 0,
        "files": "by path",
        "parity": {
            "logits": "float", "calibrated_logits": "float", "coordinates": "float", "text_coordinates": "float",
            "uncalibrated_exact": True,
        },
        "seconds": ["load", "directions", "probe", "bake", "verify"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def exported(make_export):
    return make_export()


def test_every_key_and_their_order(exported):
    text = (exported.plan.output / "shiftdc_report.json").read_text()
    document = json.loads(text)
    assert text == json.dumps(document, indent=2) + "\n"
    found = plain(document)
    assert found["base_model"]["placed"].keys() <= {"copy", "clone"}
    assert [path for path in found["files"] if not path.endswith(".py")] == sorted(FILES)
    assert set(found["files"].values()) == {"SHA-256"} and list(found["files"]) == sorted(found["files"])
    found["base_model"]["placed"], found["files"], found["device"] = "bytes", "by path", "name"
    found["prompts"]["compared"] = "count"
    found["versions"], found["seconds"] = list(found["versions"]), list(found["seconds"])
    assert json.dumps(found, indent=2) == json.dumps(expected(exported.plan), indent=2)
