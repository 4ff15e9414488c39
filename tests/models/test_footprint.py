"""What a dry run states of memory and disk, number by number."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from exporter.data.builtin import builtin
from exporter.directions import fit as directions
from exporter.directions.fit import fit_directions
from exporter.errors import InputError
from exporter.models.footprint import IMAGE_TOKENS, LIBRARIES, footprint, is_quantised
from exporter.models.recipe import load_recipe
from exporter.pipeline import plan as planning
from exporter.pipeline.plan import plan_needs
from exporter.runtime.safetensors_header import TensorHeader

LINEAR, OTHERS = 64 * 64, 2 * 100 * 64 + 64
HIDDEN, INTERMEDIATE = 64, 128
#: Bytes a token, of float32.
TOKEN = 4 * (8 * HIDDEN + 3 * INTERMEDIATE)
SHAPES = {
    "model.layers.0.q_proj.weight": (64, 64),
    "model.embed_tokens.weight": (100, 64),
    "model.norm.weight": (64,),
    "lm_head.weight": (100, 64),
}


def stated(*, config=None, text=None, **options):
    header = {name: TensorHeader("F32", shape, 4 * math.prod(shape), 0) for name, shape in SHAPES.items()}
    base = SimpleNamespace(headers={Path("a"): header}, size=4 * (LINEAR + OTHERS), config=config or {})
    settings = {"dtype": "auto", "quantised": None, "tokens": 100, "layers": 3, "rows": {"held_out": 5, "all": 50}, "copied": 7}
    return footprint(base, text or {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}, **{**settings, **options})


SIZE, BATCH, STATE = 4 * (LINEAR + OTHERS), IMAGE_TOKENS * TOKEN, 3 * HIDDEN


def test_weights_as_they_are_stored():
    found = stated()
    assert (found.weights, found.mapped, found.activations) == (SIZE, SIZE, BATCH)
    assert found.statistics == STATE * (16 * 5 + 8 * 24)
    assert found.measuring == LIBRARIES + SIZE + BATCH + found.statistics  # pages of files are the weights
    assert found.verifying == LIBRARIES + SIZE + BATCH
    assert (found.copied, found.disk, found.resume) == (7, 7 + 4 * STATE, 4 * STATE * 50)


def test_weights_in_another_dtype_stand_beside_the_files_pages():
    found = stated(dtype="bfloat16")
    assert (found.weights, found.mapped, found.activations) == (SIZE // 2, SIZE, BATCH // 2)
    assert found.measuring == LIBRARIES + SIZE // 2 + BATCH // 2 + found.statistics + SIZE
    assert found.verifying == LIBRARIES + SIZE // 2 + BATCH // 2 + SIZE


@pytest.mark.parametrize(("bits", "a_number"), [(4, 0.5 + 4 / 64), (8, 1)])
def test_linear_layers_alone_are_quantised_and_only_to_measure(bits, a_number):
    found = stated(quantised=bits)
    assert found.weights == LINEAR * a_number + 4 * OTHERS
    assert found.mapped == SIZE
    assert found.verifying == LIBRARIES + SIZE + BATCH


@pytest.mark.parametrize(
    ("name", "shape", "quantised"),
    [
        ("model.layers.0.mlp.up_proj.weight", (4, 4), True),
        ("language_model.lm_head.weight", (4, 4), False),
        ("model.embed_tokens.weight", (4, 4), False),
        ("vision_tower.pre_layernorm.weight", (4, 4), False),
        ("model.layers.0.mlp.up_proj.bias", (4,), False),
        ("vision_tower.patch_embedding.weight", (4, 3, 2, 2), False),
    ],
)
def test_what_bitsandbytes_takes(name, shape, quantised):
    assert is_quantised(name, TensorHeader("F32", shape, 0, 0)) is quantised


def test_a_batch_is_of_text_or_of_one_image():
    assert stated(tokens=5000).activations == 5000 * TOKEN
    assert stated(config={"image_seq_length": 576}).activations == 576 * TOKEN
    assert stated(config={"mm_tokens_per_image": 256}).activations == 256 * TOKEN
    vision = {"hidden_size": 32, "intermediate_size": 16, "image_size": 28, "patch_size": 14}
    assert stated(config={"vision_config": vision}).activations == BATCH + 5 * (8 * 32 + 3 * 16) * 4
    assert stated(config={"vision_config": {**vision, "image_size": [28, 28]}}).activations == BATCH
    assert stated(text={"hidden_size": HIDDEN}).activations == IMAGE_TOKENS * (8 + 3 * 4) * HIDDEN * 4


def test_statistics_grow_with_layers_and_rows():
    assert stated(layers=6).statistics == 2 * stated().statistics
    assert stated(layers=6).resume == 2 * stated().resume
    assert stated(rows={"held_out": 5, "all": 51}).resume - stated().resume == 4 * STATE
    assert stated(rows={"held_out": 6, "all": 50}).statistics - stated().statistics == 16 * STATE


@pytest.mark.parametrize("size", [None, "128", [128]])
def test_a_configuration_without_a_width_is_refused(size):
    with pytest.raises(InputError, match=r"hidden_size in config\.json is .*, expected a whole number; restore it"):
        stated(text={"hidden_size": size})


def test_it_is_said_in_gigabytes():
    found = stated(copied=1_500_000_000, dtype="float32", tokens=10**5)
    assert str(found) == (
        "0.76 GB measuring (0.00 GB weights, 0.36 GB a batch, 0.40 GB libraries; 0.00 GB of it are pages of weight files, "
        "which the system can take back), then 0.76 GB verifying"
    )
    assert found.disk_text().startswith("1.50 GB (1.50 GB of it copies of weights")
    report = found.report()
    assert (report["peak_measuring"], report["peak_verifying"]) == (found.measuring, found.verifying)
    assert (report["disk"], report["disk_for_resuming"]) == (found.disk, found.resume)


def test_the_rows_that_are_stated_are_those_that_a_run_keeps(monkeypatch):
    kept = []

    def activations(vlm, layers, inputs):
        kept.append(inputs["n"])
        return torch.randn(inputs["n"], 2, 4, generator=generator)

    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(directions, "last_token_activations", activations)
    monkeypatch.setattr(directions, "row_image", lambda row: None)
    vlm = SimpleNamespace(
        device=torch.device("cpu"), image_layers=frozenset(), decoder_layers=[None] * 2,
        token_ids=lambda request, image=None: [1, 2], pad=lambda prompts: {"n": len(prompts)},
        encode=lambda requests, images: {"n": len(requests)},
    )  # fmt: skip
    calibration = builtin()
    fit_directions(vlm, calibration, load_recipe("llava").prompts)

    monkeypatch.setattr(planning, "text_config", lambda base: {})
    monkeypatch.setattr(planning, "footprint", lambda base, text, **options: options)
    plan = SimpleNamespace(
        base=SimpleNamespace(shards=()), calibration=calibration, adapter=None, keep_adapter=False, dtype="auto", quantised=4,
        layers=range(2, 5), depth=9, output=None,
    )  # fmt: skip
    found = plan_needs(plan)
    assert found["rows"] == {"held_out": 80, "all": sum(kept)}
    assert (found["layers"], found["dtype"], found["quantised"], found["copied"]) == (3, "auto", 4, 0)
