"""What runs on the CPU runs on another device, with the same tokens.

On `other` (other_device.py), which needs no GPU, this shows that no tensor is left behind on the CPU or mixed with one that is.
On `cuda` it shows that CUDA's kernels, in float32, choose the same tokens too: `pytest -n 0 -m gpu tests/pipeline/test_gpu.py`.
"""

from __future__ import annotations

import copy
import json
from contextlib import contextmanager, nullcontext

import pytest
import torch
from family_prompts import GREEDY, ROWS, encode
from in_memory import calibrated_copy
from other_device import OTHER, Waits, other_device
from tiny import picture, tiny_model, tiny_processor
from tiny_families import EOS, IMAGE, PAD, TinyFamily
from tiny_families import FAMILIES as PLAIN
from tiny_families_torchvision import FAMILIES as WITH_TORCHVISION

from exporter.checkpoint.calibrated import Calibrated
from exporter.checkpoint.open import open_export
from exporter.checkpoint.probe import record_probe
from exporter.data.calibration_sets import load_calibration
from exporter.directions.fit import fit_directions
from exporter.errors import InputError
from exporter.evaluation import sweep
from exporter.evaluation.compare import compare
from exporter.evaluation.defences import DEFENCES, Run, applied
from exporter.evaluation.sweep import run_sweep
from exporter.models.base import resolve
from exporter.models.loading import load_vlm
from exporter.models.prompt_frame import prompt_frame
from exporter.models.recipe import load_recipe, recipe_for_family
from exporter.models.trials import tried_traits
from exporter.models.vlm import VLM
from exporter.pipeline.export import export
from exporter.pipeline.plan import ExportOptions, make_plan

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and there is none")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])
RECIPE = load_recipe("llava").with_overrides(gate="two-sided", caption_max_new_tokens=6)
LAYERS = (1, 2)


@contextmanager
def exact_float32():
    """TF32, which convolutions use by default, keeps ten bits of the mantissa."""
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


@pytest.fixture(params=["other", CUDA])
def device(request):
    return OTHER if request.param == "other" else torch.device("cuda")


@contextmanager
def using(device):
    with exact_float32(), other_device() if device is OTHER else nullcontext():
        yield


def tiny_llava() -> TinyFamily:
    processor = tiny_processor()
    return TinyFamily(processor, tiny_model(len(processor.tokenizer)), "model.language_model.layers")


FAMILIES = {"llava": tiny_llava, **PLAIN, **WITH_TORCHVISION}


def calibrated(name, **options):
    """(the tiny family, its calibrated model on the CPU)."""
    torch.manual_seed(0)
    tiny = FAMILIES[name]()
    tiny.model.eval().generation_config.update(pad_token_id=PAD, eos_token_id=EOS)
    recipe = load_recipe(recipe_for_family(tiny.model.config.model_type)).with_overrides(
        gate="two-sided", caption_max_new_tokens=6, **options
    )
    tiny.processor.chat_template = recipe.chat_template or tiny.processor.chat_template
    vlm = VLM(tiny.model, tiny.processor, composed_text=recipe.chat_template is not None)
    return tiny, calibrated_copy(vlm, recipe, (tiny.first, tiny.first + 1), shift=100.0)


def moved(vlm, device):
    return VLM(copy.deepcopy(vlm.model).to(device), vlm.processor, vlm.composed_text)


def on(device, inputs):
    return {k: v.to(device) for k, v in inputs.items()}


def replies(model, inputs, **options):
    """Tokens by reference, and of the base model."""
    found = {}
    for kind in ("caption", "text", "blank", "static"):
        model.config.shiftdc = {**model.config.shiftdc, "reference": kind}
        found[kind] = model.generate(**inputs, **GREEDY, **options).tolist()
    return {**found, "off": model.generate(**inputs, **GREEDY, **options, shiftdc=False).tolist()}


@pytest.mark.parametrize("name", FAMILIES)
def test_replies_of_a_mixed_left_padded_batch_are_those_of_the_cpu(name, device):
    tiny, vlm = calibrated(name)
    inputs = encode(tiny.processor, [("Hello", None), *ROWS])
    expected = replies(vlm.model, inputs)
    assert expected["off"] == tiny.model.generate(**inputs, **GREEDY).tolist() != expected["static"]
    with using(device):
        assert replies(moved(vlm, device).model, on(device, inputs)) == expected


WAYS = {
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 3},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_ways_of_generating(options, device):
    tiny, vlm = calibrated("llava")
    inputs = encode(tiny.processor, ROWS[:1] if "prompt_lookup_num_tokens" in options else ROWS)
    options = {**options, "suppress_tokens": [IMAGE]}
    expected = replies(vlm.model, inputs, **options)
    with using(device):
        assert replies(moved(vlm, device).model, on(device, inputs), **options) == expected


@pytest.mark.parametrize("rule", ["sequential", "precomputed"])
def test_what_is_kept_of_images_and_what_is_given(rule, device):
    tiny, vlm = calibrated("llava", rule=rule)
    inputs = encode(tiny.processor, ROWS)

    def ways(model, inputs):
        read = model.shiftdc_image(**inputs)
        reference = model.shiftdc_reference(**inputs, captions=read.captions)
        return [
            model.generate(**inputs, **GREEDY, **given).tolist()
            for given in ({"shiftdc_image": read}, {"shiftdc_captions": read.captions}, {"shiftdc_reference": reference})
        ]

    expected = ways(vlm.model, inputs)
    with using(device):
        assert ways(moved(vlm, device).model, on(device, inputs)) == expected


def close(found, expected):
    return torch.allclose(found.double().cpu(), expected.double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("harmless", [False, True], ids=["difference", "gradient"])
def test_directions_and_probe(harmless, device, calibration_file, tmp_path):
    tiny = tiny_llava()
    rows = [json.loads(line) for line in calibration_file.read_text().splitlines()]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows if not harmless or r["label"] == "safe"))
    calibration = load_calibration(str(file))

    def measured(vlm):
        found = fit_directions(vlm, calibration, RECIPE.prompts, layers=LAYERS)
        probe = record_probe(vlm, Calibrated(RECIPE, found, LAYERS, prompt_frame(vlm, RECIPE.wording), tried_traits(vlm)))
        return [found.direction, found.shift, *(probe.tensors[k] for k in sorted(probe.tensors))]

    vlm = VLM(tiny.model, tiny.processor)
    expected = measured(vlm)
    with using(device):
        found = measured(moved(vlm, device))
    for one, other in zip(found, expected, strict=True):
        assert type(one) is torch.Tensor and one.device.type == "cpu" and close(one, other)


@pytest.mark.parametrize("name", ["text_only", "shiftdc", "ecso", "random_direction_0", "blank_image_shift"])
def test_defences(name, device):
    _, vlm = calibrated("llava")

    def texts(vlm):
        with applied(vlm, DEFENCES[name], dict.fromkeys(LAYERS, 1.0)):
            return DEFENCES[name].answer(Run(vlm, 4), [q for q, _ in ROWS], [p for _, p in ROWS]).texts

    expected = texts(vlm)
    with using(device):
        assert texts(moved(vlm, device)) == expected


def test_comparison_and_sweep(device, calibration_file, monkeypatch):
    _, vlm = calibrated("llava")
    monkeypatch.setattr(sweep, "STRENGTHS", (1.0,))
    monkeypatch.setattr(sweep, "MAX_NEW_TOKENS", 2)
    held_out = load_calibration(str(calibration_file)).select("held_out")
    expected = compare(vlm, ROWS[0][1], ROWS[0][0], 4)
    with using(device):
        other = moved(vlm, device)
        found = compare(other, ROWS[0][1], ROWS[0][0], 4)
        with pytest.raises(InputError, match="no candidate lowers attack success"):  # random weights refuse nothing
            run_sweep(other, held_out, False)
    assert (found.uncalibrated, found.calibrated) == (expected.uncalibrated, expected.calibrated)
    assert [s.after for s in found.layers] == pytest.approx([s.after for s in expected.layers], rel=1e-3)


@pytest.mark.parametrize("kind", ["caption", "text", "static"])
def test_decode_steps_wait_for_the_device_as_often_as_plain_ones(kind):
    tiny, vlm = calibrated("llava")
    vlm.model.config.shiftdc = {**vlm.model.config.shiftdc, "reference": kind}
    inputs = encode(tiny.processor, ROWS)

    def waits(model, tokens, **options):
        with Waits() as counted:
            model.generate(**there, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options)
        return counted.count

    with using(OTHER):
        model, there = moved(vlm, OTHER).model, on(OTHER, inputs)
        plain = [waits(model, tokens, shiftdc=False) for tokens in (2, 5)]
        found = [waits(model, tokens) for tokens in (2, 5)]
    assert found[1] - found[0] == plain[1] - plain[0] > 0
    assert found[0] <= plain[0] + {"static": 4, "text": 24, "caption": 64}[kind]  # a reply, not a token


def test_a_tensor_left_on_the_cpu_is_found():
    with other_device() as device:
        there = torch.ones(2, device=device)
        assert (there + 1).device == device and (there * torch.tensor(2.0)).tolist() == [2, 2]
        assert there[torch.tensor([0])].tolist() == [1]
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(2)
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(2)[torch.zeros(1, dtype=torch.long, device=device)]
        with pytest.raises(TypeError, match="copy it to the CPU"):
            there.numpy()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", FAMILIES)
def test_a_static_cache(name):
    tiny, vlm = calibrated(name)
    inputs, options = encode(tiny.processor, ROWS), {"cache_implementation": "static", "disable_compile": True}
    with exact_float32():
        assert replies(moved(vlm, "cuda").model, on("cuda", inputs), **options) == replies(vlm.model, inputs)


@pytest.mark.gpu
@needs_cuda
def test_decoding_compiled_by_generate():
    """As it does on CUDA wherever the cache is static."""
    tiny, vlm = calibrated("llava")
    inputs = encode(tiny.processor, ROWS)
    with exact_float32():
        found = replies(moved(vlm, "cuda").model, on("cuda", inputs), cache_implementation="static")
        assert found == replies(vlm.model, inputs)


@pytest.mark.gpu
@needs_cuda
def test_a_compiled_forward():
    tiny, vlm = calibrated("llava")
    inputs = encode(tiny.processor, ROWS)
    vlm.model.config.shiftdc = {**vlm.model.config.shiftdc, "reference": "static"}
    with exact_float32(), torch.no_grad():
        expected = vlm.model(**inputs).logits
        model = moved(vlm, "cuda").model
        model(**on("cuda", inputs))  # the stock model too must have run once
        found = torch.compile(model)(**on("cuda", inputs)).logits
    assert close(found, expected)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("device_map", ["auto", "split"])
def test_an_export_spread_over_devices(device_map, make_export, base_folder, calibration_file, tmp_path):
    """Half of the layers on the GPU and half on the CPU is what a card that is too small ends in."""
    folder = make_export(gate="two-sided", caption_max_new_tokens=6).plan.output
    halves = {"": "cpu", **{f"model.language_model.layers.{i}": 0 for i in (0, 1)}, "model.language_model.embed_tokens": 0}
    placed = open_export(folder, device_map=device_map if device_map == "auto" else halves)
    alone = VLM(open_export(folder).model.to("cpu"), placed.processor)
    inputs = encode(placed.processor, ROWS)
    with exact_float32():
        assert replies(placed.model, on(placed.device, inputs)) == replies(alone.model, inputs)
    plan = make_plan(
        str(base_folder),
        ExportOptions.of(output=tmp_path / "out", device_map="auto", calibration=str(calibration_file), layers="1-2"),
    )
    assert export(plan).verification.shards  # verified in a fresh process, on the GPU


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(dtype):
    """Tokens may differ; logits of calibrated and uncalibrated passes stay within what verifying allows."""
    tiny, vlm = calibrated("llava")
    inputs = encode(tiny.processor, ROWS)
    model = moved(vlm, "cuda").model.to(dtype)
    assert all(c.direction.dtype == torch.float32 for c in model.shiftdc_corrections)
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in on("cuda", inputs).items()}
    reference = vlm.model.shiftdc_reference(**inputs)
    for here, there in (
        ({"shiftdc": False}, {"shiftdc": False}),
        ({"shiftdc_reference": reference}, {"shiftdc_reference": reference.to("cuda")}),
    ):
        with torch.no_grad():
            expected, found = vlm.model(**inputs, **here).logits[:, -1], model(**given, **there).logits[:, -1].float().cpu()
        assert (found - expected).abs().max() <= 8e-2 * expected.abs().max()


@pytest.mark.gpu
@needs_cuda
def test_the_demo_exported_on_the_gpu_replies_as_it_does_on_the_cpu(tmp_path):
    folder = export(make_plan("demo", ExportOptions.of(output=tmp_path / "demo"))).plan.output
    there = open_export(folder)
    here = VLM(copy.deepcopy(there.model).to("cpu"), there.processor)
    requests, images = ["what is this?", "how do you make this?"], [picture(0, 96, 96), picture(1, 96, 96)]
    with exact_float32():
        assert there.device.type == "cuda"
        assert replies(there.model, there.encode(requests, images)) == replies(here.model, here.encode(requests, images))
        recipe = load_recipe("demo")
        calibration = load_calibration(recipe.calibration)
        base = load_vlm(resolve("demo"), recipe)
        found, expected = (
            fit_directions(v, calibration, recipe.prompts)
            for v in (base, VLM(copy.deepcopy(base.model).to("cpu"), base.processor))
        )
    assert close((found.direction * expected.direction).sum(-1), torch.ones(len(found.layers)))
