"""Captions that the model writes for calibration images."""

from __future__ import annotations

import json

import pytest
import torch
from naive import Naive
from noted_batches import NotedBatches
from PIL import Image
from transformers import LlavaForConditionalGeneration

from exporter.data.calibration_sets import load_calibration
from exporter.directions.captions import captioned, captions
from exporter.models.base import resolve
from exporter.models.loading import load_vlm
from exporter.models.recipe import load_recipe
from exporter.pipeline.export import export
from exporter.pipeline.plan import ExportOptions, make_plan

RECIPE = load_recipe("llava")
COLORS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module")
def vlm(base_folder):
    return load_vlm(resolve(str(base_folder)), RECIPE)


@pytest.fixture(scope="module")
def file(calibration_file, tmp_path_factory):
    """The small set with images; every third row without a caption."""
    folder = tmp_path_factory.mktemp("captions")
    for color in COLORS:
        Image.new("RGB", (40, 30), color).save(folder / f"{color}.png")
    rows = [json.loads(line) for line in calibration_file.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["image"] = f"{COLORS[i % 4]}.png"
        if i % 3 == 0:
            del row["caption"]
    file = folder / "images.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def test_each_missing_caption_is_the_model_s_own_and_no_other_changes(vlm, base_folder, file):
    calibration = load_calibration(str(file))
    seen, runner = [], NotedBatches()
    found = captioned(vlm, calibration, RECIPE.prompts, 6, 3, lambda *progress: seen.append(progress), runner)
    assert runner.noted == [("captions", [[0, 1, 2], [3, 4, 5], [6]])]
    model = LlavaForConditionalGeneration.from_pretrained(base_folder).eval()
    naive = Naive(model, vlm.processor, "Based on the given Request, describe the image. Request: {q}", "")
    for before, after in zip(calibration.rows, found.rows, strict=True):
        if before.caption:
            assert after == before
            continue
        expected = naive.caption(before.request, before.image.load(), 6)
        assert after.caption == vlm.decode(expected)
    assert seen == [("captions", n, 7) for n in (3, 6, 7)]
    assert found.sha256 == calibration.sha256


def test_batches_come_one_at_a_time(vlm, file):
    rows = load_calibration(str(file)).rows[:5]
    passes = []
    handle = vlm.model.model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    batches = captions(vlm, rows, RECIPE.prompts, 2, batch_size=2)
    assert len(next(batches)) == 2
    assert len(passes) == 1
    assert [len(b) for b in batches] == [2, 1]
    handle.remove()


def test_an_export_counts_them_and_holds_none(base_folder, file, tmp_path):
    plan = make_plan(
        str(base_folder),
        ExportOptions.of(output=tmp_path / "out", calibration=str(file), layers="1-2", caption_max_new_tokens=5, batch_size=4),
    )
    vlm = load_vlm(plan.base, plan.recipe)
    written = {r.caption for r in captioned(vlm, plan.calibration, plan.recipe.prompts, 5).rows}
    export(plan)
    report = (tmp_path / "out" / "shiftdc_report.json").read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert json.loads(report)["calibration"]["captions_by_the_model"] == 7
    assert json.loads(report)["calibration"]["images"] is True
    assert "The model itself wrote the captions of 7 of them" in card
    assert not any(caption and (caption in report or caption in card) for caption in written)


def test_images_of_a_file_give_the_shift(vlm, file):
    from exporter.directions.activations import last_token_activations
    from exporter.directions.fit import fit_directions

    calibration = captioned(vlm, load_calibration(str(file)), RECIPE.prompts, 5)
    found = fit_directions(vlm, calibration, RECIPE.prompts)
    layers, shifts = list(vlm.model.model.language_model.layers), {"safe": [], "unsafe": []}
    for row in calibration.select("fit"):
        shown = last_token_activations(vlm, layers, vlm.encode([row.request], [row.image.load()]))[0]
        text = last_token_activations(vlm, layers, vlm.encode([RECIPE.prompts.counterpart(row.request, row.caption)]))[0]
        shifts[row.label].append(((shown - text) * found.direction).sum(-1))
    expected = torch.stack([torch.stack(s).mean(0) for s in shifts.values()]).mean(0)
    assert torch.allclose(found.shift, expected, atol=1e-3)
