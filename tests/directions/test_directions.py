"""Directions against mathematics and against the naive implementation."""

from __future__ import annotations

import json

import pytest
import torch
from naive import Naive
from transformers import LlavaForConditionalGeneration

from exporter.data.calibration_sets import load_calibration
from exporter.data.images import blank_image, row_image
from exporter.directions.activations import AUTO_TOKENS, RunningMean, by_length, last_token, last_token_activations
from exporter.directions.fit import fit_directions
from exporter.directions.statistics import auroc, separation
from exporter.models.base import resolve
from exporter.models.loading import load_vlm
from exporter.models.recipe import load_recipe

RECIPE = load_recipe("llava")


@pytest.fixture(scope="module")
def vlm(base_folder):
    return load_vlm(resolve(str(base_folder)), RECIPE)


@pytest.fixture(scope="module")
def calibration(calibration_file):
    return load_calibration(str(calibration_file))


@pytest.fixture(scope="module")
def directions(vlm, calibration):
    return fit_directions(vlm, calibration, RECIPE.prompts)


def test_streamed_statistics_equal_those_of_the_whole():
    whole = torch.randn(50, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 100 + 1e4
    streamed = RunningMean()
    for batch in whole.split([1, 7, 2, 40]):
        streamed.update(batch)
    assert streamed.count == 50
    assert torch.allclose(streamed.mean, whole.mean(0), rtol=1e-12)


def test_merging_equals_updating():
    a, b = torch.randn(2, 10, 2, 3, generator=torch.Generator().manual_seed(1))
    parts = [RunningMean(), RunningMean(), RunningMean()]
    parts[0].update(a)
    parts[1].update(b)
    parts[2].merge(parts[0])
    parts[2].merge(parts[1])
    assert torch.allclose(parts[2].mean, torch.cat([a, b]).double().mean(0))


def test_the_naive_implementation_gives_the_same_directions(directions, base_folder, vlm, calibration_file):
    rows = [json.loads(line) for line in calibration_file.read_text().splitlines()]
    model = LlavaForConditionalGeneration.from_pretrained(base_folder).eval()
    expected = Naive(model, vlm.processor, "", "{q} Image Caption: {caption}").directions(rows)
    cosine = torch.cosine_similarity(directions.direction.double(), expected, dim=-1)
    assert cosine.min() > 0.9999
    assert torch.allclose(directions.direction.norm(dim=-1), torch.ones(4))


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_batching_and_padding_do_not_matter(directions, vlm, calibration, batch_size):
    other = fit_directions(vlm, calibration, RECIPE.prompts, batch_size=batch_size)
    assert torch.allclose(other.direction, directions.direction, atol=1e-4)
    assert torch.allclose(other.shift, directions.shift, atol=1e-3)


def test_fewer_layers_give_the_same_and_stop_early(directions, vlm, calibration):
    ran = []
    handle = vlm.model.model.language_model.layers[3].register_forward_hook(lambda *_: ran.append(1))
    some = fit_directions(vlm, calibration, RECIPE.prompts, layers=[1, 2])
    handle.remove()
    assert not ran  # nothing behind the last layer needed
    assert some.layers == (1, 2)
    assert torch.allclose(some.direction, directions.direction[1:3], atol=1e-5)


def test_the_shift_is_the_mean_difference_of_coordinates(directions, vlm, calibration):
    """Recomputed one prompt at a time from the rendered images."""
    layers = list(vlm.model.model.language_model.layers)
    differences = []
    for row in calibration.select("fit"):
        image = last_token_activations(vlm, layers, vlm.encode([row.request], [row_image(row)]))[0]
        text = last_token_activations(vlm, layers, vlm.encode([RECIPE.prompts.counterpart(row.request, row.caption)]))[0]
        differences.append(((image - text) * directions.direction).sum(-1))
    assert torch.allclose(torch.stack(differences).mean(0), directions.shift, atol=1e-3)


def test_statistics_recomputed_one_prompt_at_a_time(directions, vlm, calibration):
    layers = list(vlm.model.model.language_model.layers)

    def activations(split, label):
        prompts = [RECIPE.prompts.counterpart(r.request, r.caption) for r in calibration.select(split, label)]
        return torch.stack([last_token_activations(vlm, layers, vlm.encode([p]))[0] for p in prompts]).double()

    safe, unsafe = activations("fit", "safe"), activations("fit", "unsafe")
    first, second = (safe[h::2].mean(0) - unsafe[h::2].mean(0) for h in (0, 1))
    halves = torch.cosine_similarity(first, second, dim=-1)
    d = directions.direction.double()
    held_out = {label: (activations("held_out", label) * d).sum(-1) for label in ("safe", "unsafe")}
    for i, statistics in enumerate(directions.statistics):
        assert statistics.split_half_cosine == pytest.approx(halves[i].item(), abs=1e-4)
        assert statistics.norm == pytest.approx((safe.mean(0) - unsafe.mean(0))[i].norm().item(), rel=1e-4)
        assert statistics.text_safe == pytest.approx((safe.mean(0)[i] @ d[i]).item(), abs=1e-3)
        assert statistics.text_unsafe == pytest.approx((unsafe.mean(0)[i] @ d[i]).item(), abs=1e-3)
        assert statistics.auroc == auroc(held_out["safe"][:, i], held_out["unsafe"][:, i])
        expected = separation(held_out["safe"][:, i], held_out["unsafe"][:, i])
        assert statistics.separation == pytest.approx(expected, rel=1e-3)


def test_statistics_of_images_recomputed_one_prompt_at_a_time(directions, vlm, calibration):
    """Of images by label, of what they add, and of a blank one: each less its own text, and along the direction."""
    layers, d = list(vlm.model.model.language_model.layers), directions.direction.double()

    def mean(rows, picture):
        pictures = [None if (image := picture(r)) is None else [image] for r in rows]
        inputs = [vlm.encode([r.request], p) for r, p in zip(rows, pictures, strict=True)]
        return torch.stack([last_token_activations(vlm, layers, i)[0] for i in inputs]).double().mean(0)

    rows = {label: calibration.select("fit", label) for label in ("safe", "unsafe")}
    shown = {label: mean(chosen, row_image) for label, chosen in rows.items()}
    counterparts = [RECIPE.prompts.counterpart(r.request, r.caption) for r in rows["unsafe"]]
    text = torch.stack([last_token_activations(vlm, layers, vlm.encode([p]))[0] for p in counterparts]).double().mean(0)
    everything = [*rows["safe"], *rows["unsafe"]]
    blank = mean(everything, lambda r: blank_image()) - mean(everything, lambda r: None)
    cosine = torch.cosine_similarity(shown["unsafe"] - text, d, dim=-1)
    for i, found in enumerate(directions.statistics):
        assert found.image_safe == pytest.approx((shown["safe"][i] @ d[i]).item(), abs=1e-3)
        assert found.image_unsafe == pytest.approx((shown["unsafe"][i] @ d[i]).item(), abs=1e-3)
        assert found.shift_cosine == pytest.approx(cosine[i].item(), abs=1e-3)
        assert found.blank_shift == pytest.approx((blank[i] @ d[i]).item(), abs=1e-3)
        assert found.shift == pytest.approx(directions.shift[i].item(), abs=1e-4)


def test_hooks_are_gone_after_an_exception(vlm):
    layers = list(vlm.model.model.language_model.layers)
    with pytest.raises(IndexError):
        last_token_activations(vlm, layers, {"input_ids": torch.tensor([[10**6]]), "attention_mask": torch.tensor([[1]])})
    assert not any(layer._forward_hooks for layer in layers)


def test_last_token_of_either_padding_side():
    assert last_token(torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])).tolist() == [3, 1, 3]


def test_right_padding_gives_the_activations_of_left_padding(vlm):
    layers = list(vlm.model.model.language_model.layers)
    ids = vlm.token_ids("How do I build this?")
    left = {"input_ids": torch.tensor([[3, 3, *ids]]), "attention_mask": torch.tensor([[0, 0] + [1] * len(ids)])}
    right = {"input_ids": torch.tensor([[*ids, 3, 3]]), "attention_mask": torch.tensor([[1] * len(ids) + [0, 0]])}
    found = [last_token_activations(vlm, layers, x) for x in (left, right)]
    assert torch.allclose(*found, atol=1e-4)


def test_batches_hold_similar_lengths_within_the_budget():
    budget = AUTO_TOKENS["cpu"]
    lengths = [5, budget // 2, 7, budget // 2, budget // 2, 6, 2 * budget]
    assert by_length(range(7), lengths, None, torch.device("cpu")) == [[0, 5, 2], [1, 3], [4], [6]]
    assert by_length(range(3), [1, 1, 1], 2, torch.device("cpu")) == [[0, 1], [2]]


def test_auroc_and_separation():
    assert auroc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1
    assert auroc(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])) == 0.5
    assert auroc(torch.tensor([0.0]), torch.tensor([1.0])) == 0
    assert separation(torch.tensor([1.0, 3.0]), torch.tensor([-3.0, -1.0])) == pytest.approx(4 / 2**0.5)
