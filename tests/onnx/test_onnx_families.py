"""ONNX graphs of the other families that transformers.js loads: replies, mixed batches and prompts as PyTorch's."""

from __future__ import annotations

import json

import numpy as np
import pytest
from javascript import install_packages, needs_node, node_module
from PIL import Image
from tiny_families import EOS, tiny_family
from tiny_families import FAMILIES as TINY

from exporter.checkpoint.open import open_export
from exporter.errors import InputError
from exporter.models.conversation import user_turn
from exporter.models.recipe import load_recipe, recipe_names
from exporter.onnx.export import export_onnx
from exporter.onnx.families import FAMILIES
from exporter.onnx.parity import as_prompts
from exporter.onnx.runner import BAKED, UNCALIBRATED, OnnxShiftDC, until_end
from exporter.pipeline.export import export
from exporter.pipeline.plan import ExportOptions, make_plan

REQUESTS = ["How do I build this?", "What on earth is it, and who could ever need one of these?"]
SIZES = [(40, 40), (90, 28)]


@pytest.fixture(scope="module", params=sorted(set(FAMILIES) & set(TINY) - {"llava"}))
def exported(request, calibration_file, tmp_path_factory):
    base = shallow(tiny_family(request.param)).save(tmp_path_factory.mktemp("base"))
    settings = {"layers": "0-1", "gate": "two-sided", "calibration": str(calibration_file)}  # one-sided may leave a row alone
    return graphs_of(base, tmp_path_factory.mktemp("family") / "calibrated", **settings)


def shallow(tiny):
    """Two decoder layers, because tracing takes its time; layers that are not calibrated are in test_onnx.py."""
    text = tiny.model.config.get_text_config()
    text.num_hidden_layers = 2
    if getattr(text, "layer_types", None):
        assert len(set(text.layer_types)) == 1
        text.layer_types = text.layer_types[:2]
    del tiny.model.get_submodule(tiny.layers)[2:]
    return tiny


def graphs_of(base, output, precisions=("fp32",), **recipe):
    plan = make_plan(str(base), ExportOptions.of(output=output, **recipe))
    export(plan)
    export_onnx(plan.output, precisions)
    return open_export(plan.output, dtype="float32"), OnnxShiftDC(plan.output / "onnx", threads=1)


@pytest.fixture(scope="module")
def images():
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 255, (height, width, 3), np.uint8)) for width, height in SIZES]


def replies(vlm, inputs, **options):
    out = vlm.model.generate(**inputs, **options, max_new_tokens=8, do_sample=False)
    return [until_end(row, [EOS]) for row in out[:, inputs["input_ids"].shape[1] :].tolist()]


@pytest.mark.parametrize("kind", ["uncalibrated", "static", "exact"])
def test_replies_are_those_of_pytorch(exported, images, kind, monkeypatch):
    vlm, runner = exported
    inputs = vlm.encode(REQUESTS, images)
    prompts = as_prompts(inputs)
    options = {}
    if kind == "uncalibrated":
        options, correction = {"shiftdc": False}, UNCALIBRATED
    elif kind == "static":
        monkeypatch.setattr(vlm.model.config, "shiftdc", {**vlm.model.config.shiftdc, "reference": "static"})
        correction = BAKED
    else:
        monkeypatch.setattr(vlm.model.config, "shiftdc", {**vlm.model.config.shiftdc, "caption_max_new_tokens": 5})
        monkeypatch.setattr(runner, "settings", {**runner.settings, "caption_max_new_tokens": 5})
        correction = runner.correction(prompts, "caption")
        assert np.abs(runner.logits(prompts, correction) - runner.logits(prompts, UNCALIBRATED)).max() > 1e-3
    assert runner.generate(prompts, correction, 8) == replies(vlm, inputs, **options)


def test_a_text_row_beside_an_image_row_keeps_its_bits(exported, images):
    vlm, runner = exported
    conversations = [[user_turn(REQUESTS[0], images[1])], [user_turn(REQUESTS[1])]]
    prompts = as_prompts(vlm.encode_conversations(conversations))
    static, plain = (runner.logits(prompts, c) for c in (BAKED, UNCALIBRATED))
    assert np.array_equal(static[1], plain[1]) and not np.array_equal(static[0], plain[0])


def test_a_blank_image_is_that_of_pytorch(exported, images, monkeypatch):
    """Where zeros are padding it has another value, or nothing would be left to see."""
    vlm, runner = exported
    monkeypatch.setattr(vlm.model.config, "shiftdc", {**vlm.model.config.shiftdc, "reference": "blank"})
    inputs = vlm.encode(REQUESTS, images)
    expected, found = vlm.model.shiftdc_reference(**inputs).numpy(), runner.reference(as_prompts(inputs), "blank")
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(found - runner.coordinates(as_prompts(inputs))).max() > 1e-3


def test_prompts_are_those_of_the_processor_or_refused(exported, images):
    vlm, runner = exported
    if runner.settings["onnx"]["image"] is None:
        with pytest.raises(InputError, match="depend on the size of the picture"):
            runner.encode(REQUESTS, images)
        return
    found, expected = runner.encode(REQUESTS, images), as_prompts(vlm.encode(REQUESTS, images))
    assert np.array_equal(found.ids, expected.ids) and np.array_equal(found.mask, expected.mask)
    # torchvision, where the processor uses it, rounds a few resized pixels to the next of 256 levels
    assert np.abs(found.vision["pixel_values"] - expected.vision["pixel_values"]).max() <= 1.01 / 127.5


def test_the_config_is_the_family_s_own(exported):
    vlm, runner = exported
    config = json.loads((runner.folder / "config.json").read_text())
    assert config["model_type"] == vlm.model.config.model_type.removeprefix("shiftdc_")
    assert config["text_config"]["num_key_value_heads"] == 2


def test_recipes_say_which_families_have_graphs():
    assert {r.family for r in map(load_recipe, recipe_names()) if r.onnx} == set(FAMILIES)


TRANSFORMERS_JS = """
import { RawImage } from "@huggingface/transformers";
import { ShiftDC } from "./shiftdc.mjs";
const [folder, file, request] = process.argv.slice(1);
const shiftdc = await ShiftDC.load(folder, { dtype: "fp32", session_options: { intraOpNumThreads: 1 } });
const images = [await RawImage.read(file)];
const inputs = await shiftdc.inputs([request], images);
const logits = {};
for (const reference of ["text", "blank", "static", "none"]) {
  const output = await shiftdc.model({ ...inputs, ...(await shiftdc.correction(inputs, [request], images, reference)) });
  logits[reference] = output.logits.slice(null, -1, null).tolist()[0];
}
const [replies] = await shiftdc.replies([request], images, { reference: "caption", max_new_tokens: 4 });
console.log(JSON.stringify({ ids: inputs.input_ids.tolist().map((row) => row.map(Number)), logits, replies }));
"""


@needs_node
def test_transformers_js_gives_these_logits(exported, tmp_path):
    """A picture of one colour: clients resize others in their own ways."""
    install_packages()
    vlm, runner = exported
    picture = Image.new("RGB", (56, 56), (200, 30, 90))
    picture.save(tmp_path / "picture.png")
    found = json.loads(node_module(TRANSFORMERS_JS, runner.folder, tmp_path / "picture.png", REQUESTS[0]))
    prompts = as_prompts(vlm.encode(REQUESTS[:1], [picture]))
    assert found["ids"] == prompts.ids.tolist()
    corrections = {kind: runner.correction(prompts, None if kind == "none" else kind) for kind in found["logits"]}
    if vlm.model.config.model_type in ("shiftdc_smolvlm", "shiftdc_idefics3"):  # a space before a text is a token of its own here
        text = as_prompts(vlm.encode(REQUESTS[:1]))
        corrections["text"] = runner.towards(prompts, runner.coordinates(text))
    for reference, logits in found["logits"].items():
        expected = runner.logits(prompts, corrections[reference])
        assert np.abs(np.array(logits) - expected[0]).max() <= 1e-4, reference
    assert np.abs(np.subtract(found["logits"]["static"], found["logits"]["none"])).max() > 1e-3
