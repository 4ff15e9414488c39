"""Directions without harmful data: against finite differences, and on the demo model against the normal ones."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_families import FAMILIES, tiny_family
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from exporter.data.calibration_sets import load_calibration
from exporter.data.images import row_image
from exporter.directions import refusal_gradient
from exporter.directions.activations import last_token_activations
from exporter.directions.fit import fit_directions
from exporter.directions.frozen_norms import frozen_norms
from exporter.directions.refusal_gradient import find_openers, refusal_gradients
from exporter.errors import InputError
from exporter.models.base import resolve
from exporter.models.loading import load_vlm
from exporter.models.recipe import load_recipe
from exporter.pipeline.export import export
from exporter.pipeline.plan import ExportOptions, make_plan

RECIPE, DEMO = load_recipe("llava"), load_recipe("demo")


@pytest.fixture(scope="module")
def vlm(base_folder):
    return load_vlm(resolve(str(base_folder)), RECIPE)


@pytest.fixture(scope="module")
def demo():
    return load_vlm(resolve("demo"), DEMO)


@pytest.fixture(scope="module")
def harmless_file(calibration_file, tmp_path_factory):
    file = tmp_path_factory.mktemp("harmless") / "harmless.jsonl"
    file.write_text("".join(line + "\n" for line in calibration_file.read_text().splitlines() if '"safe"' in line))
    return file


# The gradient.


def pinned_score(model, ids, openers, own, layer, offset, statistics):
    """The score of a prompt whose activation after `layer` is moved, with each norm's scale as recorded; records it if empty."""
    recording, calls = not statistics, []

    def norm(module, args, output):
        (x,) = args
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + module.variance_epsilon)
        if recording:
            statistics.append(scale)
        scale = statistics[len(calls)]
        calls.append(module)
        return module.weight * x * scale

    def move(module, args, output):
        output = output.clone()
        output[0, -1] += offset
        return output

    norms = [m for m in model.model.language_model.modules() if isinstance(m, LlamaRMSNorm)]
    handles = [m.register_forward_hook(norm) for m in norms]
    handles.append(model.model.language_model.layers[layer].register_forward_hook(move))
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1].double()
    for handle in handles:
        handle.remove()
    return (logits[openers].logsumexp(0) - logits[own]).item()


def test_the_gradient_equals_finite_differences_with_pinned_norms(vlm):
    ids = vlm.token_ids("How do I bake a cake?")
    openers = [30, 31]
    layers = list(vlm.model.model.language_model.layers)
    ((_, gradients, activations),) = refusal_gradients(vlm, layers, [ids], openers)
    own = vlm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
    generator = torch.Generator().manual_seed(0)
    for layer in range(4):
        for _ in range(3):
            v = torch.randn(32, generator=generator)
            v /= v.norm()
            statistics = []
            pinned_score(vlm.model, torch.tensor([ids]), openers, own, layer, 0 * v, statistics)
            high, low = (
                pinned_score(vlm.model, torch.tensor([ids]), openers, own, layer, s * 0.01 * v, statistics) for s in (1, -1)
            )
            assert (gradients[0, layer] @ v).item() == pytest.approx((high - low) / 0.02, rel=0.02, abs=2e-3)
    clean = last_token_activations(vlm, layers, vlm.pad([ids]))
    assert torch.allclose(activations, clean, atol=1e-4)


def test_freezing_changes_the_gradient(vlm, monkeypatch):
    from contextlib import nullcontext

    layers, prompts = list(vlm.model.model.language_model.layers), [vlm.token_ids("How do I bake a cake?")]
    ((_, frozen, _),) = refusal_gradients(vlm, layers, prompts, [30])
    monkeypatch.setattr(refusal_gradient, "frozen_norms", lambda model: nullcontext())
    ((_, plain, _),) = refusal_gradients(vlm, layers, prompts, [30])
    assert torch.cosine_similarity(frozen, plain, dim=-1)[0, 0] < 0.999


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_and_padding_do_not_matter(vlm, batch_size):
    layers = list(vlm.model.model.language_model.layers)
    prompts = [vlm.token_ids(f"How do I {act}?") for act in ("bake", "sing a song", "fly a kite in the wind")]
    found = torch.zeros(3, 4, 32)
    for indices, gradients, _ in refusal_gradients(vlm, layers, prompts, [30], batch_size):
        found[indices] = gradients
    alone = torch.cat([next(refusal_gradients(vlm, layers, [p], [30]))[1] for p in prompts])
    assert torch.allclose(found, alone, atol=1e-4 * alone.abs().max().item())


def test_nothing_is_left_behind(vlm):
    layers = list(vlm.model.model.language_model.layers)
    with pytest.raises(IndexError):
        list(refusal_gradients(vlm, layers, [[10**6]], [30]))
    assert not any(layer._forward_hooks for layer in layers)
    assert not any("forward" in m.__dict__ for m in vlm.model.modules())
    assert all(p.requires_grad for p in vlm.model.parameters())


def test_prompts_that_are_answered_with_an_opener_are_left_out(vlm):
    layers, prompt = list(vlm.model.model.language_model.layers), vlm.token_ids("How do I bake a cake?")
    own = vlm.model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax().item()
    ((indices, gradients, _),) = refusal_gradients(vlm, layers, [prompt], [own])
    assert indices == []
    assert len(gradients) == 0


# Norms.


NORMS = [nn.LayerNorm(8), nn.RMSNorm(8), LlamaRMSNorm(8), Gemma3RMSNorm(8), CohereLayerNorm(8)]


def jacobian(module):
    x = torch.randn(8, generator=torch.Generator().manual_seed(0))
    return torch.autograd.functional.jacobian(lambda x: module(x[None])[0], x)


@pytest.mark.parametrize("norm", NORMS, ids=lambda m: type(m).__name__)
def test_a_frozen_norm_has_a_diagonal_derivative_and_the_same_values(norm):
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 8))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    before = norm(x)
    off_diagonal = jacobian(norm) * (1 - torch.eye(8))
    with frozen_norms(nn.Sequential(norm)):
        assert torch.allclose(norm(x), before, atol=1e-5)
        assert (jacobian(norm) * (1 - torch.eye(8))).abs().max() < 1e-6
    assert off_diagonal.abs().max() > 0.01  # without freezing
    assert torch.equal(jacobian(norm) * (1 - torch.eye(8)), off_diagonal)


def test_statistics_that_cannot_be_held_are_refused():
    class OddNorm(nn.Module):
        def forward(self, x):
            return x / (x * x).sum(-1, keepdim=True) ** 0.5

    model = nn.Sequential(OddNorm())
    with frozen_norms(model), pytest.raises(InputError, match="statistics of its OddNorm cannot be held constant"):
        model(torch.randn(2, 8))
    with pytest.raises(InputError, match="no normalisation layers"), frozen_norms(nn.Linear(2, 2)):
        pass


def test_a_forward_on_the_instance_is_put_back():
    """accelerate puts one there."""
    norm = LlamaRMSNorm(8)
    norm.forward = theirs = norm.forward
    with frozen_norms(nn.Sequential(norm)):
        assert norm.forward is not theirs
    assert norm.forward is theirs


# Openers, on a model that knows how to refuse.


@pytest.fixture(scope="module")
def demo_rows():
    return load_calibration("harmless", "demo").select("fit")[::6]


@pytest.fixture(scope="module")
def demo_prompts(demo, demo_rows):
    return [demo.token_ids(DEMO.prompts.counterpart(r.request, r.caption)) for r in demo_rows]


def test_the_demo_finds_its_own_refusal(demo, demo_rows, demo_prompts):
    (opener,) = find_openers(demo, [r.request for r in demo_rows], demo_prompts)
    assert opener.text == "I am sorry"
    assert demo.decode([opener.token]) == "i"
    step = [[*p, *demo.tokenizer(" i am sorry", add_special_tokens=False)["input_ids"]] for p in demo_prompts[::3][:8]]
    logits = torch.stack([demo.model(input_ids=torch.tensor([p])).logits[0].log_softmax(-1)[len(p) - 4 : -1] for p in step])
    expected = sum(logits[:, i, step[0][-3 + i]].mean() for i in range(3))
    assert opener.log_probability == pytest.approx(expected.item(), abs=1e-2)


def test_openers_that_are_answers_too_are_refused(demo, demo_rows, demo_prompts, monkeypatch):
    monkeypatch.setattr(refusal_gradient, "PHRASES", ("first take",))
    with pytest.raises(InputError, match="cannot be told apart"):
        find_openers(demo, [r.request for r in demo_rows], demo_prompts)


def test_a_refusal_that_the_model_writes_itself_is_a_candidate(demo, demo_rows, demo_prompts, monkeypatch):
    """Where it is asked for something that the demo model declines."""
    monkeypatch.setattr(refusal_gradient, "PHRASES", ())
    monkeypatch.setattr(refusal_gradient, "DECLINE", "how do i make a bomb? Image Caption: the words bomb in red.")
    (opener,) = find_openers(demo, [r.request for r in demo_rows], demo_prompts)
    assert opener.text == "i am sorry"


# Directions.


@pytest.fixture(scope="module")
def normal(demo):
    return fit_directions(demo, load_calibration("demo"), DEMO.prompts)


def test_on_the_demo_they_point_as_the_normal_ones_do(demo, normal):
    harmless = fit_directions(demo, load_calibration("harmless", "demo"), DEMO.prompts)
    cosine = torch.cosine_similarity(harmless.direction, normal.direction, dim=-1)
    assert cosine.min() > 0.7
    assert 'refusals begin with "I am sorry"' in harmless.origin
    assert all(s.split_half_cosine > 0.99 for s in harmless.statistics)
    assert {s.auroc for s in harmless.statistics} == {s.norm for s in harmless.statistics} == {None}


def test_a_wrong_opener_gives_another_direction(demo, normal, demo_prompts):
    layers = list(demo.decoder_layers)
    found = {}
    for word in (" i", " the"):
        (token,) = demo.tokenizer(word, add_special_tokens=False)["input_ids"]
        gradient = torch.cat([g for _, g, _ in refusal_gradients(demo, layers, demo_prompts, [token])]).mean(0)
        found[word] = torch.cosine_similarity(-gradient, normal.direction, dim=-1)
    assert found[" i"].min() > 0.7
    assert found[" the"].max() < 0.5


@pytest.mark.parametrize("count", [1, 4])
def test_few_harmful_requests_are_nearly_enough(demo, normal, count):
    from dataclasses import replace

    whole = load_calibration("demo")
    few = replace(whole, rows=(*whole.labelled("safe").rows, *whole.select("fit", "unsafe")[:count]))
    found = fit_directions(demo, few, DEMO.prompts)
    assert torch.cosine_similarity(found.direction, normal.direction, dim=-1).min() > 0.9
    assert {s.auroc for s in found.statistics} == {s.separation for s in found.statistics} == {None}
    assert all((s.split_half_cosine is None) == (count == 1) and s.norm > 0 for s in found.statistics)


@pytest.fixture(scope="module")
def harmless(vlm, harmless_file):
    return fit_directions(vlm, load_calibration(str(harmless_file)), RECIPE.prompts)


def test_the_shift_is_that_of_harmless_rows(harmless, vlm, harmless_file):
    layers, differences = list(vlm.model.model.language_model.layers), []
    for row in load_calibration(str(harmless_file)).select("fit"):
        image = last_token_activations(vlm, layers, vlm.encode([row.request], [row_image(row)]))[0]
        text = last_token_activations(vlm, layers, vlm.encode([RECIPE.prompts.counterpart(row.request, row.caption)]))[0]
        differences.append(((image - text) * harmless.direction).sum(-1))
    assert torch.allclose(torch.stack(differences).mean(0), harmless.shift, atol=1e-3)


def test_an_export_says_what_is_not_known(base_folder, harmless_file, tmp_path):
    plan = make_plan(str(base_folder), ExportOptions.of(output=tmp_path / "out", calibration=str(harmless_file)))
    done = export(plan)
    report = json.loads((tmp_path / "out" / "shiftdc_report.json").read_text())
    assert report["calibration"]["fit_unsafe"] == 0
    assert "No harmful request was used" in report["calibration"]["warnings"][0]
    assert report["directions"].startswith("gradient of refusal against compliance")
    assert "not known for lack of harmful rows" in report["layers"]["criterion"]
    assert report["statistics"][0]["auroc"] is None
    assert done.verification.parity
    card = (tmp_path / "out" / "README.md").read_text()
    assert "held-out text AUROC not measured" in card
    assert "No harmful request was used" in card
    with pytest.raises(InputError, match="--strength auto: it needs held-out unsafe rows"):
        make_plan(str(base_folder), ExportOptions.of(output=tmp_path / "other", calibration=str(harmless_file), strength="auto"))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_has_a_gradient(family, harmless_file, tmp_path):
    """Fails closed on norms that are not known (`frozen_norms`)."""
    plan = make_plan(
        str(tiny_family(family).save(tmp_path / "tiny")),
        ExportOptions.of(output=tmp_path / "out", calibration=str(harmless_file)),
    )
    vlm = load_vlm(plan.base, plan.recipe)
    found = fit_directions(vlm, plan.calibration, plan.recipe.prompts)
    assert torch.allclose(found.direction.norm(dim=-1), torch.ones(len(found.layers)), atol=1e-4)
    assert all(s.gradient > 1e-4 for s in found.statistics)
