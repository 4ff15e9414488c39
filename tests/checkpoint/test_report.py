"""shiftdc_report.json: what stands in it, in which order, and that reading and writing it changes nothing."""

from __future__ import annotations

import json
import re

import pytest
from pydantic import ValidationError

from exporter.checkpoint.report import AdapterRecord, OnnxRecord, Report, read_report, write_report
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


def test_reading_and_writing_changes_nothing(exported, tmp_path):
    """Also what another version has added, at any depth, and the order in which ONNX graphs and figures were added."""
    document = json.loads((exported.plan.output / "shiftdc_report.json").read_text())
    document = {"newer": {"list": [1, 2.0, None]}, **document, "onnx": {"versions": {}, "variants": {}}, "evaluation": {"n": 1}}
    warnings = document["calibration"].pop("warnings")
    sources = [{"dataset": "a/b", "revision": "c", "licence": "MIT", "newer": 1}]
    document["calibration"] |= {"sources": sources, "warnings": warnings, "seen_questions": ["ab"]}
    for part in (document["base_model"], document["layers"], document["calibration"], *document["statistics"]):
        part["newer"] = {"deep": [True]}
    text = json.dumps(document, indent=2) + "\n"
    (tmp_path / "shiftdc_report.json").write_text(text)
    report = read_report(tmp_path)
    write_report(tmp_path, report)
    assert (tmp_path / "shiftdc_report.json").read_text() == text
    changed = report.model_copy(update={"evaluation": {"n": 2}}).document()
    assert list(changed) == list(document) and changed["evaluation"] == {"n": 2}


def test_what_is_added_stands_at_the_end(exported):
    report = read_report(exported.plan.output)
    graphs = report.model_copy(update={"onnx": OnnxRecord(versions={}, variants={})})
    assert list(graphs.document()) == [*report.document(), "onnx"]
    both = Report.parse(graphs.document()).model_copy(update={"evaluation": {}})
    assert list(both.document())[-2:] == ["onnx", "evaluation"]


def test_an_adapter_and_a_sweep_have_their_places(exported):
    adapter = AdapterRecord(id="x", revision=None, sha256="ab" * 32, merged=True)
    made = exported.report.model_copy(update={"adapter": adapter, "sweep": {"chosen": {}}})
    keys = list(made.document())
    assert keys[:2] == ["base_model", "adapter"]
    assert keys[keys.index("statistics") + 1] == "sweep"


def test_it_is_frozen(exported):
    with pytest.raises(ValidationError, match="frozen"):
        exported.report.dtype = "float16"
