"""test_families.py on the families whose processors need torchvision, and what only they have: grids, videos, rope deltas."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from family_prompts import GREEDY, ROWS, encode
from interpreters import python
from test_families import *  # noqa: F403
from test_families import CAPTION_TOKENS, new_tokens
from tiny import picture
from tiny_families_torchvision import FAMILIES, qwen2_vl, smolvlm, tiny_family
from transformers import AutoModelForImageTextToText

from exporter.pipeline.export import export
from exporter.pipeline.plan import ExportOptions, make_plan

# of families in test_families.py
del test_blip_checkpoints_that_cannot_be_calibrated_are_refused, test_pan_and_scan_is_refused  # noqa: F821
del test_cross_attention_layers_are_left_out  # noqa: F821


@pytest.fixture(scope="module", params=list(FAMILIES))
def tiny(request):
    return tiny_family(request.param)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}], ids=["beams", "no-cache"]
)
def test_beams_and_no_cache_equal_the_naive_implementation(model, naive, directions, options):
    """Qwen's pixels are patches in a row, not images: nothing may multiply them as if they were rows."""
    inputs = naive.ids(*ROWS[1])
    reference = torch.full((len(directions),), -300.0)  # far off, so that tokens change
    options = {**GREEDY, **options, "suppress_tokens": [model.config.image_token_id]}
    with naive.calibrated(list(directions), directions, inputs["input_ids"].shape[1], reference=reference):
        expected = naive.model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, shiftdc_reference=reference[None]), expected)
    assert not torch.equal(expected, model.generate(**inputs, **options, shiftdc=False))


def test_a_reference_leaves_a_reply_in_progress_as_it_is(model, processor):
    """Qwen's backbone keeps the rope deltas of its last prompt, and decoding goes on with them."""
    inputs, other = encode(processor, ROWS[:1]), encode(processor, [("What is it?", picture(3, 56, 56))])

    def next_logits(between):
        with torch.no_grad():
            begun = model(**inputs, use_cache=True, shiftdc=False)
            between()
            token = begun.logits[:, -1:].argmax(-1)
            return model(input_ids=token, past_key_values=begun.past_key_values, shiftdc=False).logits

    expected = next_logits(lambda: None)
    for kind in ("caption", "blank"):
        model.config.shiftdc = {**model.config.shiftdc, "reference": kind}
        assert torch.equal(next_logits(lambda: model.shiftdc_reference(**other)), expected)
    assert torch.equal(next_logits(lambda: model.shiftdc_coordinates(**other)), expected)


def test_replies_one_after_another_are_those_of_fresh_models(model, processor, folder):
    replies = [model.generate(**encode(processor, [row]), **GREEDY) for row in (*ROWS, ("Hello", None), ROWS[0])]
    assert torch.equal(replies[0], replies[3])
    fresh = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    assert torch.equal(fresh.generate(**encode(processor, ROWS[1:]), **GREEDY), replies[1])


def test_no_video_goes_uncalibrated(model, base, processor):
    """Videos with tokens of their own are refused; where a video is a row of images it is calibrated as they are."""
    if not hasattr(processor, "video_processor"):
        assert not hasattr(model.config, "video_token_id")
        return
    video = np.random.default_rng(0).integers(0, 255, (4, 28, 28, 3), dtype=np.uint8)
    turn = {"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": "What happens?"}]}
    inputs = processor.apply_chat_template(
        [[turn]], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"do_sample_frames": False},
    )  # fmt: skip
    inputs = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    plain = base.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, shiftdc=False), plain)
    if hasattr(model.config, "video_token_id"):
        for run in (model.generate, model.forward, model.shiftdc_reference):
            with pytest.raises(ValueError, match=r"holds a video.*shiftdc=False"):
                run(**inputs)
    else:
        with torch.no_grad():
            found, stock = model(**inputs).logits, base(**inputs).logits
        assert torch.equal(found[:, :-1], stock[:, :-1]) and not torch.equal(found[:, -1], stock[:, -1])
        assert new_tokens(model.generate(**inputs, **GREEDY), inputs)


def test_qwen2_vl_as_it_is_published(calibration_file, tmp_path):
    """Its config.json has the text model's fields at the top, and its tensors the names of before transformers 4.52."""
    torch.manual_seed(0)
    folder = qwen2_vl().save(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": text.pop("rope_parameters")["mrope_section"]}
    config = {**{k: v for k, v in text.items() if k not in ("model_type", "layer_types")}, **config}
    config["vision_config"]["model_type"] = "qwen2_vl"
    (folder / "config.json").write_text(json.dumps(config))
    options = {"layers": "1-2", "calibration": str(calibration_file), "caption_max_new_tokens": CAPTION_TOKENS}
    done = export(make_plan(str(folder), ExportOptions.of(output=tmp_path / "calibrated", **options)))
    names = json.loads((done.plan.output / "model.safetensors.index.json").read_text())["weight_map"]
    assert {"model.layers.0.mlp.up_proj.weight", "visual.patch_embed.proj.weight"} <= names.keys()
    base = AutoModelForImageTextToText.from_pretrained(folder).eval()
    model = AutoModelForImageTextToText.from_pretrained(done.plan.output, trust_remote_code=True).eval()
    inputs = encode(qwen2_vl().processor, ROWS)
    with torch.no_grad():
        assert torch.equal(model(**inputs, shiftdc=False).logits, base(**inputs).logits)


def run_cli(prelude, *arguments, path):
    """The command in a process of its own, after the statements of `prelude`; (exit code, stderr)."""
    code = f"import sys; {prelude}; from exporter.cli.commands import main; main()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])}
    command = [*python(""), "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "build, prelude, remedy",
    [
        (qwen2_vl, "sys.modules['torchvision'] = None", "pip install torchvision"),
        (smolvlm, "import with_torchvision; sys.modules['num2words'] = None", "pip install num2words"),
    ],
    ids=["torchvision", "num2words"],
)
def test_a_missing_package_is_one_sentence(build, prelude, remedy, calibration_file, tmp_path):
    folder, output = build().save(tmp_path / "base"), tmp_path / "calibrated"
    arguments = (folder, "--output", output, "--calibration", calibration_file, "--quiet")
    code, error = run_cli(prelude, *arguments, path=Path(__file__).parents[1] / "support")
    assert code == 2 and error.startswith("Error: MODEL:") and remedy in error and error.count("\n") == 1
    assert not output.exists()


def test_a_torchvision_of_another_build_is_one_sentence(tmp_path):
    """transformers cannot be imported beside it, whatever the family."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    code, error = run_cli("pass", "demo", "--output", tmp_path / "out", path=tmp_path)
    assert code == 2 and "different builds (operator torchvision::nms does not exist)" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
