"""Large checkpoints: memory stated beforehand, offloading to disk, measuring on a quantised model, releasing models."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny_llava, tiny_model, tiny_processor
from transformers import LlavaForConditionalGeneration

from exporter.directions.fit import fit_directions
from exporter.errors import InputError, VerificationError
from exporter.models.footprint import LIBRARIES
from exporter.models.loading import load_vlm
from exporter.pipeline import export as pipeline
from exporter.pipeline import measure as measuring
from exporter.pipeline.export import export
from exporter.pipeline.measure import load_base
from exporter.pipeline.plan import ExportOptions, make_plan, plan_needs


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """80 MB of bfloat16."""
    folder = tmp_path_factory.mktemp("wide") / "wide-llava"
    processor = tiny_processor()
    config = tiny_model(len(processor.tokenizer)).config
    config.text_config.update({"hidden_size": 768, "intermediate_size": 3072, "head_dim": 64, "initializer_range": 0.02})
    config.vision_config.hidden_size = 64  # bitsandbytes works in blocks of 64
    LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="50MB")
    processor.save_pretrained(folder)
    return folder


PEAK = """
import sys
from pathlib import Path
from exporter.pipeline.measure import load_base
from exporter.pipeline.plan import ExportOptions, make_plan
from exporter.directions.activations import AUTO_TOKENS, last_token_activations
small, large, output, dtype = sys.argv[1:]
for model in (small, large):
    plan = make_plan(model, ExportOptions.of(output=Path(output), layers="0-3", dtype=dtype))
    with load_base(plan) as vlm:
        layers = list(vlm.decoder_layers)
        last_token_activations(vlm, layers, vlm.pad([[5] * 64] * (AUTO_TOKENS["cpu"] // 64)))
    status = dict(line.split(":") for line in open("/proc/self/status"))
    print(int(status["VmHWM"].split()[0]) * 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_the_peak_that_a_dry_run_states_is_the_one_measured(base_folder, wide, tmp_path, dtype):
    """How many pages of libraries are in memory is the system's business: it reads more or fewer of them ahead. So that is
    measured with a model of no size, in the same process.
    """
    stated = plan_needs(make_plan(str(wide), ExportOptions.of(output=tmp_path / "out", layers="0-3", dtype=dtype)))
    command = [sys.executable, "-c", PEAK, str(base_folder), str(wide), str(tmp_path / "out"), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    libraries, peak = map(int, done.stdout.split()[-2:])
    assert libraries == pytest.approx(LIBRARIES, rel=0.3)
    assert LIBRARIES + peak - libraries == pytest.approx(stated.measuring, rel=0.15)


def test_needs_follow_the_options(wide, tmp_path):
    def of(**options):
        return plan_needs(make_plan(str(wide), ExportOptions.of(output=tmp_path / "out", **options)))

    own = of()
    assert (
        own.weights == own.mapped == sum(t.numel() * 2 for t in LlavaForConditionalGeneration.from_pretrained(wide).parameters())
    )
    assert of(dtype="float32").weights == 2 * own.weights
    assert own.weights / 4 < of(load_in_4bit=True).weights < own.weights / 2 < of(load_in_8bit=True).weights < own.weights
    assert of(load_in_4bit=True).verifying == own.verifying  # what is exported is not quantised
    assert of(layers="1").statistics < own.statistics
    assert own.copied == sum(f.stat().st_size for f in wide.glob("*.safetensors"))  # the base is in no Hub cache
    assert own.copied < own.disk < own.copied + 10**6


def test_everything_on_disk_gives_the_same(base_folder, calibration_file, tmp_path):
    """Weights that `device_map` leaves on disk, in another dtype than the checkpoint's."""
    plan = make_plan(str(base_folder), ExportOptions.of(output=tmp_path / "out", layers="1-2", calibration=str(calibration_file)))
    places = {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "cpu",
        "model.language_model": "disk",
        "lm_head": "disk",
    }
    options = {"layers": plan.layers}
    arguments = (plan.calibration, plan.recipe.prompts)
    found = []
    for extra in ({}, {"device_map": places, "offload": tmp_path / "offload"}):
        vlm = load_vlm(plan.base, plan.recipe, dtype="bfloat16", **extra)
        found.append(fit_directions(vlm, *arguments, **options))
    assert any(p.is_meta for p in vlm.model.parameters())
    assert torch.equal(found[0].direction, found[1].direction)
    assert torch.equal(found[0].shift, found[1].shift)


def test_an_export_with_a_device_map_leaves_no_offload_folder(base_folder, calibration_file, tmp_path, make_export):
    settings = {"layers": "1-2", "calibration": str(calibration_file)}
    done = export(make_plan(str(base_folder), ExportOptions.of(output=tmp_path / "out", device_map="auto", **settings)))
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert done.report.parity["logits"] < 1e-3
    assert done.report.statistics == make_export().report.statistics


@pytest.mark.parametrize("bits", [4, 8])
def test_directions_of_a_quantised_model(wide, calibration_file, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    settings = {"layers": "1-2", "calibration": str(calibration_file), f"load_in_{bits}bit": True}
    plan = make_plan(str(wide), ExportOptions.of(output=tmp_path / "out", **settings))
    with load_base(plan, bits) as vlm:
        kinds = {type(m).__name__ for m in vlm.model.modules()}
    assert {4: "Linear4bit", 8: "Linear8bitLt"}[bits] in kinds
    if bits == 8:  # the whole way once is enough
        return
    done = export(plan)
    assert done.report.measured_quantised == bits
    assert "quantised to 4 bits" in (tmp_path / "out" / "README.md").read_text()
    for shard in plan.base.shards:  # what is exported are the weights as they are
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()
    with load_base(plan) as vlm:
        arguments = (plan.calibration, plan.recipe.prompts)
        plain = fit_directions(vlm, *arguments, layers=plan.layers)
        probe = load_file(tmp_path / "out" / "assets" / "shiftdc_probe.safetensors")
        inputs = {k.removeprefix("input."): v for k, v in probe.items() if k.startswith("input.")}
        with torch.no_grad():  # and the probe is theirs
            assert torch.equal(probe["logits"], vlm.model(**inputs, logits_to_keep=1).logits[0, -1].float())
    found = load_file(tmp_path / "out" / "shiftdc.safetensors")
    for layer in plan.layers:
        direction = found[f"{plan.checked.traits.decoder_layers}.{layer}.shiftdc.direction"]
        assert not torch.equal(direction, plain.of(layer)[0])
        assert torch.cosine_similarity(direction, plain.of(layer)[0], dim=0) > 0.8


@pytest.mark.skipif(torch.cuda.is_available(), reason="of bitsandbytes' CPU kernels")
def test_widths_that_the_cpu_kernels_do_not_take(base_folder, tmp_path):
    with pytest.raises(InputError, match="multiples of 64"):
        make_plan(str(base_folder), ExportOptions.of(output=tmp_path / "out", load_in_4bit=True))


def test_what_cannot_be_quantised(base_folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="exclude each other"):
        make_plan(str(base_folder), ExportOptions.of(output=tmp_path / "out", load_in_4bit=True, load_in_8bit=True))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs bitsandbytes, which is not installed"):
        make_plan(str(base_folder), ExportOptions.of(output=tmp_path / "out", load_in_4bit=True))


def test_a_base_that_is_quantised_already(tmp_path):
    base = save_tiny_llava(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(InputError, match="is stored quantised already"):
        make_plan(str(base), ExportOptions.of(output=tmp_path / "out", load_in_4bit=True))


def test_the_base_is_released_before_verifying(base_folder, calibration_file, tmp_path, monkeypatch):
    models, alive = [], []
    real_load = measuring.load_vlm

    def load(*arguments, **options):
        vlm = real_load(*arguments, **options)
        models.append(weakref.ref(vlm.model))
        return vlm

    def check(*arguments):
        alive.extend(model() for model in models)
        raise VerificationError("that is all")

    monkeypatch.setattr(measuring, "load_vlm", load)
    monkeypatch.setattr(pipeline, "verify", check)
    gc.disable()  # the pipeline has to see to it
    plan = make_plan(str(base_folder), ExportOptions.of(output=tmp_path / "out", layers="1-2", calibration=str(calibration_file)))
    try:
        with pytest.raises(VerificationError, match="that is all"):
            export(plan)
    finally:
        gc.enable()
    assert alive == [None]
