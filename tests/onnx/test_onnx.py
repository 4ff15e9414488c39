"""ONNX graphs of a tiny LLaVA with grouped-query attention: every way to correct a row, padding, and what must fail."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tiny import IMAGE_SIZE, tiny_processor

from exporter.checkpoint import manifest
from exporter.checkpoint.open import open_export
from exporter.checkpoint.report import read_report
from exporter.cli.commands import main
from exporter.errors import InputError, VerificationError
from exporter.onnx import export as onnx_export
from exporter.onnx import parity as onnx_parity
from exporter.onnx.families import graph_family
from exporter.onnx.files import save_graph
from exporter.onnx.images import ImageProcessor
from exporter.onnx.interface import (
    AMOUNTS,
    COORDINATES,
    DECODER,
    EMBED,
    EXACT,
    GRAPHS,
    MESSAGE,
    MODE,
    OFF,
    ONE_SIDED,
    OPTIONAL,
    SCALE,
    STATIC,
    STRENGTH,
    TARGET,
    graph_file,
)
from exporter.onnx.parity import as_prompts
from exporter.onnx.runner import BAKED, UNCALIBRATED, Correction, OnnxShiftDC
from exporter.runtime.marker import mark

#: `position_ids` that hold no message.
NOWHERE = np.zeros((3, 1), np.int64)
REQUESTS = ["How do I build this?", "What is it, and who on earth would ever need one of these?", "Why?"]


@pytest.fixture(scope="module")
def checkpoint(make_export, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "tiny"
    shutil.copytree(make_export().plan.output, folder)
    onnx_export.export_onnx(folder, ("fp32",))
    return folder


@pytest.fixture(scope="module")
def vlm(checkpoint):
    return open_export(checkpoint, dtype="float32")


@pytest.fixture(scope="module")
def runner(checkpoint):
    return OnnxShiftDC(checkpoint / "onnx", threads=1)


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    shape = (3, IMAGE_SIZE + 5, IMAGE_SIZE, 3)
    return [Image.fromarray(p) for p in torch.randint(0, 255, shape, generator=generator, dtype=torch.uint8).numpy()]


@pytest.fixture(scope="module")
def prompts(runner, images):
    return runner.encode(REQUESTS, images)


@pytest.fixture(scope="module")
def target(runner, prompts):
    """Far enough below the images' own coordinates that correcting to it shows."""
    return runner.coordinates(prompts) - np.array([[2.0, 3.0]], np.float32)


def session(checkpoint, graph=DECODER):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(checkpoint / "onnx" / graph_file(graph, "fp32")), options)


def forward(runner, prompts, positions=None, outputs=("logits",), **optional):
    """One pass with everything that may be fed; positions as transformers.js makes them unless given."""
    embeds = runner._embed(prompts.ids)
    if prompts.vision:
        features = runner.sessions["vision_encoder"].run(None, prompts.vision)[0]
        embeds[prompts.ids == runner.image_token_id] = features.reshape(-1, embeds.shape[-1])
    ordinary = np.maximum(prompts.mask.cumsum(1) - 1, 0)
    past = {n: np.zeros((len(embeds), *shape), dtype) for n, (shape, dtype) in runner._empty.items()}
    feeds = {"inputs_embeds": embeds, "attention_mask": prompts.mask, "position_ids": ordinary, **past, **optional}
    if positions is not None:
        feeds["position_ids"] = positions
    found = runner.sessions[DECODER].run(list(outputs), feeds)
    return found if len(outputs) > 1 else found[0][:, -1]


def test_names_and_dimensions_are_what_transformers_js_expects(checkpoint):
    decoder = session(checkpoint)
    inputs = {i.name: i.shape for i in decoder.get_inputs()}
    assert list(inputs)[:3] == ["inputs_embeds", "attention_mask", "position_ids"]
    assert inputs["inputs_embeds"] == ["batch_size", "sequence_length", 33]
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert inputs["past_key_values.3.value"] == ["batch_size", 2, "past_sequence_length", 8]
    assert "shiftdc_mode" not in inputs
    assert {i.name for i in decoder.get_overridable_initializers()} == set(OPTIONAL)
    outputs = {o.name: o.shape for o in decoder.get_outputs()}
    assert outputs["present.0.key"] == ["batch_size", 2, "total_sequence_length", 8]
    assert outputs[COORDINATES] == ["batch_size", 2] and outputs[MESSAGE] == ["batch_size", 3]
    vision, embedding = session(checkpoint, "vision_encoder"), session(checkpoint, EMBED)
    assert vision.get_inputs()[0].shape == ["num_images", 3, IMAGE_SIZE, IMAGE_SIZE]
    assert vision.get_outputs()[0].name == "image_features"
    assert (embedding.get_inputs()[0].name, embedding.get_outputs()[0].name) == ("input_ids", "inputs_embeds")
    for graph in GRAPHS:
        onnx.checker.check_model(str(checkpoint / "onnx" / graph_file(graph, "fp32")), full_check=True)


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("kind", [STATIC, EXACT, AMOUNTS])
def test_every_correction_is_pytorchs(runner, vlm, images, prompts, target, kind, strength, one_sided):
    model = vlm.model
    amounts = np.array([[1.5, -2.0], [-1.0, 3.0], [2.0, 2.0]], np.float32)
    fed = {STATIC: {}, EXACT: {"shiftdc_reference": target}, AMOUNTS: {"shiftdc_correction": amounts}}[kind]
    for correction in model.shiftdc_corrections:
        correction.strength, correction.one_sided = strength, one_sided
    with torch.no_grad():
        inputs = vlm.encode(REQUESTS, images)
        expected = model(**inputs, **{k: torch.tensor(v) for k, v in fed.items()}).logits[:, -1].numpy()
    optional = {MODE: np.array([kind]), STRENGTH: np.array([strength], np.float32), ONE_SIDED: np.array([int(one_sided)])}
    if fed:
        (optional[TARGET],) = fed.values()
    found = forward(runner, prompts, **optional)
    assert np.abs(found - expected).max() <= 2e-4
    assert np.abs(found - forward(runner, prompts, **{MODE: np.array([OFF])})).max() > 1e-2


def test_the_baked_settings_hold_with_nothing_fed(runner, vlm, images, prompts):
    for correction in vlm.model.shiftdc_corrections:
        correction.strength, correction.one_sided = 1.0, True
    with torch.no_grad():
        expected = vlm.model(**vlm.encode(REQUESTS, images)).logits[:, -1].numpy()
    assert np.abs(forward(runner, prompts) - expected).max() <= 2e-4


def test_strength_zero_and_zero_amounts_are_the_uncalibrated_bits(runner, prompts, target):
    plain = forward(runner, prompts, **{MODE: np.array([OFF])})
    none = forward(runner, prompts, **{MODE: np.array([EXACT]), TARGET: target, STRENGTH: np.zeros(1, np.float32)})
    zero = forward(runner, prompts, **{MODE: np.array([AMOUNTS]), TARGET: np.zeros((1, 2), np.float32)})
    assert np.array_equal(plain, none) and np.array_equal(plain, zero)


def test_one_target_serves_a_batch(runner, prompts, target):
    mode = {MODE: np.array([EXACT])}
    one = forward(runner, prompts, **mode, **{TARGET: target[:1]})
    each = forward(runner, prompts, **mode, **{TARGET: np.repeat(target[:1], 3, 0)})
    assert np.array_equal(one, each)


@pytest.mark.parametrize("kind", [EXACT, AMOUNTS])
def test_a_message_in_position_ids_is_an_optional_input(runner, prompts, target, kind):
    sent = np.concatenate([np.full((3, 1), -kind), np.round(target.astype(np.float64) * SCALE).astype(np.int64)], 1)
    by_message = forward(runner, prompts, sent)
    by_input = forward(runner, prompts, **{MODE: np.array([kind]), TARGET: target})
    assert np.abs(by_message - by_input).max() <= 1e-5
    assert np.abs(by_message - forward(runner, prompts)).max() > 1e-2


def test_the_output_of_a_text_pass_is_a_message(runner, prompts):
    text = runner.encode(REQUESTS)
    coordinates, message = forward(runner, text, outputs=(COORDINATES, MESSAGE))
    assert (message[:, 0] == -EXACT).all()
    assert np.abs(message[:, 1:] / SCALE - coordinates).max() <= 1e-6
    by_input = forward(runner, prompts, **{MODE: np.array([EXACT]), TARGET: coordinates})
    assert np.abs(forward(runner, prompts, message) - by_input).max() <= 1e-5


def test_a_row_is_uncalibrated_on_request_only(runner, prompts, target):
    """What is no whole message leaves the baked shift on."""
    static, plain = forward(runner, prompts), forward(runner, prompts, **{MODE: np.array([OFF])})
    assert np.abs(static - plain).max() > 1e-2
    assert np.array_equal(forward(runner, prompts, np.full((3, 1), -OFF)), plain)
    whole = np.concatenate([np.full((3, 1), -EXACT), np.zeros((3, 2), np.int64)], 1)
    damaged = [whole[:, :2], np.pad(whole, ((0, 0), (0, 1))), whole * 0, prompts.mask, -4 * np.ones((3, 1), np.int64)]
    for positions in damaged:
        assert np.array_equal(forward(runner, prompts, positions), static)
    assert np.array_equal(forward(runner, prompts, **{MODE: np.array([9])}), static)


def test_text_rows_keep_their_bits_beside_image_rows(runner, images):
    mixed = runner.encode(REQUESTS, [images[0], None, None])
    static, plain = forward(runner, mixed), forward(runner, mixed, **{MODE: np.array([OFF])})
    assert np.array_equal(static[1:], plain[1:]) and not np.array_equal(static[0], plain[0])


def test_a_padded_batch_is_its_rows_alone(runner, prompts, target, images):
    correction = Correction(EXACT, target)
    together = runner.generate(prompts, correction, 8)
    for row, (request, image) in enumerate(zip(REQUESTS, images, strict=True)):
        alone = runner.encode([request], [image])
        assert runner.generate(alone, Correction(EXACT, target[row : row + 1]), 8) == [together[row]]


def test_the_cache_remembers_padding_when_the_mask_does_not(runner, prompts):
    """transformers.js feeds a mask of ones while it decodes."""
    presents = [f"present.{i}.{k}" for i in range(4) for k in ("key", "value")]
    outputs = runner.forward(prompts, BAKED, presents)
    past = dict(zip(runner._empty, (outputs[n] for n in presents), strict=True))
    token = runner._embed(np.array([[7], [8], [9]]))
    mask = np.concatenate([prompts.mask, np.ones((3, 1), np.int64)], 1)
    assert not mask.all()
    found = [runner._decode(token, m, NOWHERE, past, {}, ["logits"])["logits"].numpy() for m in (mask, np.ones_like(mask))]
    assert np.array_equal(*found)


def test_rows_that_have_ended_go_on_ending(runner, prompts):
    presents = [f"present.{i}.{k}" for i in range(4) for k in ("key", "value")]
    outputs = runner.forward(prompts, BAKED, presents)
    past = dict(zip(runner._empty, (outputs[n] for n in presents), strict=True))
    mask = np.concatenate([prompts.mask, np.ones((3, 1), np.int64)], 1)
    tokens = [[runner.eos[0]], [runner.eos[0]], [runner.pad]]
    logits = runner._decode(runner._embed(np.array(tokens)), mask, NOWHERE, past, {}, ["logits"])["logits"].numpy()[:, -1]
    assert logits[:2].argmax(-1).tolist() == [runner.eos[0]] * 2
    pads = runner._embed(np.array([[runner.pad]] * 3))
    same = runner._decode(pads, mask, NOWHERE, past, {}, ["logits"])["logits"].numpy()[:, -1]
    assert np.array_equal(logits[2], same[2]) and same[2].std() > 0.1


@pytest.mark.parametrize("rule", ["sequential", "precomputed"])
@pytest.mark.parametrize("kind", ["caption", "text", "blank", "static"])
def test_every_reference_and_rule_replies_as_pytorch(runner, vlm, images, prompts, kind, rule, monkeypatch):
    for correction in vlm.model.shiftdc_corrections:
        correction.strength, correction.one_sided = 1.0, True
    settings = {"reference": kind, "rule": rule, "caption_max_new_tokens": 5}
    monkeypatch.setattr(vlm.model.config, "shiftdc", {**vlm.model.config.shiftdc, **settings})
    monkeypatch.setattr(runner, "settings", {**runner.settings, **settings})
    inputs = vlm.encode(REQUESTS, images)
    out = vlm.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = [onnx_parity.until_end(row, runner.eos) for row in out[:, inputs["input_ids"].shape[1] :].tolist()]
    assert runner.generate(prompts, runner.correction(prompts), 6) == expected


@pytest.mark.parametrize("size", [(28, 28), (64, 40), (33, 90), (20, 300)])
def test_pixels_are_those_of_the_processor(size):
    processor = tiny_processor().image_processor
    image = Image.effect_noise(size, 90).convert("L")
    expected = processor(image.convert("RGB"), return_tensors="np")["pixel_values"]
    assert np.abs(ImageProcessor(processor.to_dict())([image]) - expected).max() <= 1e-5


def test_cropping_pads_as_the_processor_does():
    config = {**tiny_processor().image_processor.to_dict(), "do_resize": False}
    image = Image.effect_noise((21, 40), 90).convert("RGB")
    expected = tiny_processor().image_processor(image, return_tensors="np", do_resize=False)["pixel_values"]
    assert np.abs(ImageProcessor(config)([image]) - expected).max() <= 1e-5


def test_prompts_are_those_of_the_processor(runner, vlm, images, prompts):
    expected = as_prompts(vlm.encode(REQUESTS, images))
    assert np.array_equal(prompts.ids, expected.ids) and np.array_equal(prompts.mask, expected.mask)


def test_the_runner_imports_neither_torch_nor_transformers():
    code = "import sys, exporter.onnx.runner, exporter.onnx.compare; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


# What must fail


@pytest.fixture
def broken(checkpoint, tmp_path, monkeypatch):
    """break_(change): export again from the same graphs, but with the decoder changed."""
    folder = tmp_path / "again"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("onnx"))

    def break_(change):
        def graphs(*_):
            found = {g: ir.load(checkpoint / "onnx" / graph_file(g, "fp32")) for g in GRAPHS}
            change(found[DECODER].graph)
            return found

        monkeypatch.setattr(onnx_export, "export_graphs", graphs)
        before = sorted(folder.iterdir()), (folder / "shiftdc_report.json").read_bytes()
        with pytest.raises(VerificationError) as raised:
            onnx_export.export_onnx(folder, ("fp32",))
        assert (sorted(folder.iterdir()), (folder / "shiftdc_report.json").read_bytes()) == before
        return str(raised.value)

    return break_


def test_graphs_without_the_correction_are_not_kept(broken):
    def lose(graph):
        strength = graph.initializers[STRENGTH]
        strength.const_value = ir.tensor(np.zeros(1, np.float32), name=STRENGTH)

    message = broken(lose)
    assert "static" in message and "exact" in message and "uncalibrated" not in message


def test_graphs_of_other_weights_are_not_kept(broken):
    def shift(graph):
        weight = max(
            (v for v in graph.initializers.values() if v.const_value.dtype == ir.DataType.FLOAT), key=lambda v: v.const_value.size
        )
        weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1.01), name=weight.name)

    assert "logits differ" in broken(shift)


def test_parity_that_is_no_number_fails(checkpoint):
    parity = read_report(checkpoint)["onnx"]["variants"]["fp32"]
    assert onnx_parity.failures("fp32", parity) == []
    parity = {**parity, "max_logit_difference": {"text": float("nan")}}
    assert onnx_parity.failures("fp32", parity)


def test_a_folder_of_somebody_else_is_left_alone(checkpoint, tmp_path):
    folder = tmp_path / "taken"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("onnx"))
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_text("mine")
    with pytest.raises(InputError, match=r"holds what is not of the export \(model\.onnx\); move it away"):
        onnx_export.export_onnx(folder, ("fp32",))
    assert (folder / "onnx" / "model.onnx").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["onnx", "{}", "--precision", "fp32,int3"], "--precision: 'int3' is none"),
        (["onnx", "{}/onnx", "--quiet"], "has no shiftdc_report.json"),
        (["generate", "{}/onnx", "--image", "{}/picture.png", "--prompt", "a", "--precision", "q4"], "precisions there: fp32"),
    ],
)
def test_bad_input_is_one_sentence(checkpoint, images, arguments, said):
    images[0].save(checkpoint / "picture.png")
    done = CliRunner().invoke(main, [a.replace("{}", str(checkpoint)) for a in arguments])
    (checkpoint / "picture.png").unlink()
    assert done.exit_code == 2
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_a_missing_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(InputError, match=r'onnxscript is not installed; run: pip install "shiftdc-export\[onnx\]"'):
        onnx_export.check_packages()


def test_a_family_without_graphs_is_refused():
    with pytest.raises(InputError, match="family 'mllama' has no graphs"):
        graph_family("mllama", {})
    with pytest.raises(InputError, match="Pixtral"):
        graph_family("llava", {"vision_config": {"model_type": "pixtral"}})


def test_a_checkpoint_with_graphs_is_whole(checkpoint):
    """Their hashes are in the report: `verify` and a push know them."""
    assert manifest.differences(checkpoint, read_report(checkpoint)) == ([], [])
    assert "onnx/vision_encoder.onnx" in read_report(checkpoint)["files"]


def write_one_file(checkpoint, family, precisions, folder, wording, progress):
    """In the place of tracing, which takes its time."""
    (folder / "config.json").write_text('{"shiftdc": {}}')
    (folder / f"{precisions[0]}.onnx").write_bytes(b"graph")
    return {"versions": {}, "variants": {}}


@pytest.mark.parametrize("killed", ["while writing", "between two renames"])
def test_what_a_killed_run_left_goes_with_the_next(checkpoint, tmp_path, monkeypatch, killed):
    folder = shutil.copytree(checkpoint, tmp_path / "calibrated")
    left = folder / ".onnx.partial-abcd1234"
    shutil.copytree(folder / "onnx", left)
    mark(left)
    if killed == "between two renames":
        mark(folder / "onnx")
        (folder / "onnx").rename(folder / ".onnx.old-abcd1234")
    monkeypatch.setattr(onnx_export, "_write", write_one_file)
    onnx_export.export_onnx(folder, ("fp16",))
    assert [f.name for f in folder.iterdir() if f.name.startswith(".")] == []
    assert sorted(f.name for f in (folder / "onnx").iterdir()) == ["config.json", "fp16.onnx"]
    assert manifest.differences(folder, read_report(folder)) == ([], [])


def test_two_runs_at_once(checkpoint, monkeypatch):
    def again(*_):
        onnx_export.export_onnx(checkpoint, ("fp32",))

    before = read_report(checkpoint)
    monkeypatch.setattr(onnx_export, "_write", again)
    with pytest.raises(InputError, match=r"another run is writing to .*onnx now"):
        onnx_export.export_onnx(checkpoint, ("fp32",))
    assert read_report(checkpoint) == before and manifest.differences(checkpoint, before) == ([], [])


def test_many_weights_lie_beside_the_graph(checkpoint, tmp_path):
    file = tmp_path / graph_file(DECODER, "fp32")
    save_graph(ir.load(checkpoint / "onnx" / file.name), file, largest=10_000)
    assert (tmp_path / f"{file.name}_data").stat().st_size > 10_000 > 0
    whole, split = (onnxruntime.InferenceSession(str(f)) for f in (checkpoint / "onnx" / file.name, file))
    assert [i.name for i in whole.get_inputs()] == [i.name for i in split.get_inputs()]
    assert replace(UNCALIBRATED, kind=OFF) == UNCALIBRATED


def test_halving_leaves_the_frequencies_of_positions(checkpoint):
    """Rounded to float16 they would be wrong by 0.2 rad at position 600."""
    model = open_export(checkpoint, dtype="float32", device_map="cpu").model
    rotary = model.get_submodule("model.language_model.rotary_emb")
    before = rotary.inv_freq.clone()
    onnx_export.halve(model)
    assert model.dtype == torch.float16
    assert torch.equal(rotary.inv_freq, before)
    assert not torch.equal(before.half().float(), before)
