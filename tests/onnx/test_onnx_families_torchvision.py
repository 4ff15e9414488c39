"""test_onnx_families.py on families whose processors need torchvision; Qwen's positions follow from the shapes of pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from javascript import install_packages, needs_node, node_module
from PIL import Image
from test_onnx_families import *  # noqa: F403
from test_onnx_families import REQUESTS, graphs_of, shallow, test_transformers_js_gives_these_logits
from tiny_families_torchvision import FAMILIES as TINY
from tiny_families_torchvision import tiny_family

from exporter.cli.commands import main
from exporter.errors import InputError
from exporter.onnx.families import FAMILIES, graph_family
from exporter.onnx.parity import as_prompts
from exporter.onnx.positions import grid_positions
from exporter.onnx.runner import BAKED, Prompts

del test_recipes_say_which_families_have_graphs  # noqa: F821 (it is about all families)
in_node = test_transformers_js_gives_these_logits
del test_transformers_js_gives_these_logits


@pytest.fixture(scope="module", params=sorted(set(FAMILIES) & set(TINY)))
def exported(request, calibration_file, tmp_path_factory):
    """Two-sided, so that the static shift moves every row."""
    base = shallow(tiny_family(request.param)).save(tmp_path_factory.mktemp("base"))
    recipe = {"layers": "0-1", "gate": "two-sided", "calibration": str(calibration_file)}
    return graphs_of(base, tmp_path_factory.mktemp("family") / "calibrated", ("fp32", "int8"), **recipe)


QWEN_IN_NODE = """
import { RawImage } from "@huggingface/transformers";
import { ShiftDC } from "./shiftdc.mjs";
const [folder, file, request] = process.argv.slice(1);
const shiftdc = await ShiftDC.load(folder, { dtype: "fp32", session_options: { intraOpNumThreads: 1 } });
const images = [await RawImage.read(file)];
const inputs = await shiftdc.inputs([request], images);
const output = await shiftdc.model(inputs);
const refused = [];
for (const reference of ["none", "caption"]) {
  await shiftdc.replies([request], images, { reference }).catch((error) => refused.push(error.message));
}
await shiftdc.inputs([request, request], [...images, ...images]).catch((error) => refused.push(error.message));
const ids = async (inputs) => {
  const all = await shiftdc.model.generate({ ...inputs, do_sample: false, max_new_tokens: 8 });
  return all.slice(null, [inputs.input_ids.dims[1], null]).tolist()[0].map(Number);
};
console.log(JSON.stringify({
  prompt: inputs.input_ids.tolist()[0].map(Number),
  logits: output.logits.slice(null, -1, null).tolist()[0],
  reply: await ids(inputs),
  text: await ids(await shiftdc.inputs([request])),
  refused,
}));
"""


@needs_node
def test_transformers_js_gives_these_replies(exported, tmp_path):
    """A picture of one colour that need not be resized: clients resize in their own ways."""
    vlm, runner = exported
    if runner.settings["onnx"]["message"]:
        in_node(exported, tmp_path)
        return
    install_packages()
    picture = Image.new("RGB", (70, 42), (200, 30, 90))
    picture.save(tmp_path / "picture.png")
    found = json.loads(node_module(QWEN_IN_NODE, runner.folder, tmp_path / "picture.png", REQUESTS[0]))
    prompts, text = as_prompts(vlm.encode(REQUESTS[:1], [picture])), as_prompts(vlm.encode(REQUESTS[:1]))
    assert found["prompt"] == prompts.ids[0].tolist()
    assert np.abs(np.array(found["logits"]) - runner.logits(prompts, BAKED)[0]).max() <= 1e-4
    ends = [t for t in found["reply"] if t not in runner.eos], [t for t in found["text"] if t not in runner.eos]
    assert ends == (runner.generate(prompts, BAKED, 8)[0], runner.generate(text, BAKED, 8)[0])
    none, caption, two = found["refused"]
    assert "expected static, found none" in none and "expected static, found caption" in caption
    assert "takes one image, found 2" in two


def test_the_command_line_refuses_in_one_sentence(exported, images, tmp_path):
    images[0].save(tmp_path / "picture.png")
    arguments = ["generate", str(exported[1].folder), "--image", str(tmp_path / "picture.png"), "--prompt", "a"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert "depend on the size of the picture: give `shiftdc-export generate` the checkpoint itself" in done.stderr


def test_inputs_that_lack_a_part_are_refused(exported, images):
    vlm, runner = exported
    prompts = as_prompts(vlm.encode(REQUESTS, images))
    partial = Prompts(prompts.ids, prompts.mask, {"pixel_values": prompts.vision["pixel_values"]})
    with pytest.raises(InputError, match=r"lack (pixel_attention_mask|image_grid_thw); give all|grids do not belong"):
        runner.logits(partial, BAKED)


@pytest.mark.parametrize("grids", [[], [[1, 4, 4]], [[1, 2, 8]], [[1, 2, 6], [1, 2, 6]]])
def test_grids_must_be_those_of_the_images(grids):
    ids = np.array([[7, 9, 9, 9, 7]])
    found = grid_positions(ids, np.ones_like(ids), 9, np.array([[1, 2, 6]]), 2)
    assert found[:, 0].tolist() == [[0, 1, 1, 1, 4], [0, 1, 1, 1, 4], [0, 1, 2, 3, 4]]
    with pytest.raises(InputError, match="image_grid_thw"):
        grid_positions(ids, np.ones_like(ids), 9, np.array(grids, np.int64).reshape(-1, 3), 2)


def test_a_sliding_window_is_refused():
    with pytest.raises(InputError, match="use_sliding_window"):
        graph_family("qwen2_vl", {"text_config": {"use_sliding_window": True}})
