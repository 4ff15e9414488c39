"""The probe: recorded from a stock model by hooks of its own, against the method written down once more."""

from __future__ import annotations

import stat
from dataclasses import replace
from io import BytesIO

import pytest
import torch
from PIL import Image, ImageChops
from safetensors import safe_open
from tiny import tiny_model, tiny_processor
from torch import nn

from exporter.checkpoint import probe as probing
from exporter.checkpoint.calibrated import Calibrated
from exporter.checkpoint.probe import CAPTION, PICTURE, REQUEST, Probe, corrected, record_probe
from exporter.checkpoint.verify_worker import libraries
from exporter.data.images import typographic_image
from exporter.directions.directions import Directions
from exporter.directions.statistics import LayerStatistics
from exporter.models.chat_template import DAY
from exporter.models.processors import ODD_TEXT
from exporter.models.prompt_frame import prompt_frame
from exporter.models.recipe import load_recipe
from exporter.models.vlm import VLM

LAYERS, MEASURED = (1, 2), (0, 1, 2, 3)
STEPS = {0: 7.0, 1: 0.75, 2: 0.0, 3: 9.0}


def statistics(layer: int) -> LayerStatistics:
    others = dict.fromkeys(("auroc", "separation", "split_half_cosine", "text_unsafe", "image_unsafe", "shift_cosine"))
    means = dict.fromkeys(("text_safe", "image_safe", "shift", "blank_shift"), 0.0)
    return LayerStatistics(layer, STEPS[layer], **others, **means)


@pytest.fixture(scope="module")
def vlm() -> VLM:
    processor = tiny_processor()
    return VLM(tiny_model(len(processor.tokenizer)), processor)


@pytest.fixture(scope="module")
def calibrated(vlm) -> Calibrated:
    recipe = load_recipe("llava").with_overrides(strength=0.5, gate="two-sided")
    units = torch.nn.functional.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    directions = Directions(MEASURED, units, torch.ones(4), tuple(map(statistics, MEASURED)))
    return Calibrated(recipe, directions, LAYERS, prompt_frame(vlm, recipe.wording), vlm.traits)


@pytest.fixture
def recorded(vlm, calibrated) -> Probe:
    return record_probe(vlm, calibrated)


def inputs_of(vlm: VLM) -> dict[str, torch.Tensor]:
    return vlm.encode([REQUEST], [typographic_image(PICTURE)])


@torch.no_grad()
def hidden_states(vlm: VLM, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[1, layers, hidden] at the last token, as the model itself gives them."""
    states = vlm.model(**inputs, output_hidden_states=True).hidden_states
    return torch.stack([states[layer + 1][:, -1] for layer in LAYERS], 1)


@torch.no_grad()
def logits(vlm: VLM, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return vlm.model(**inputs).logits[0, -1]


def naive(vlm: VLM, calibrated: Calibrated, amount) -> torch.Tensor:
    """Logits with x' = x - 0.5 * amount(layer, x.d) d at the last token."""
    handles = []
    for number, (layer, d, _) in enumerate(calibrated.vectors):

        def correct(_, __, hidden, number=number, d=d):
            hidden = hidden.clone()
            hidden[0, -1] -= 0.5 * amount(number, hidden[0, -1] @ d) * d
            return hidden

        handles.append(vlm.decoder_layers[layer].register_forward_hook(correct))
    found = logits(vlm, inputs_of(vlm))
    for handle in handles:
        handle.remove()
    return found


class TestRecord:
    def test_what_the_model_was_given(self, vlm, recorded):
        inputs = inputs_of(vlm)
        given = {k.removeprefix("input."): v for k, v in recorded.tensors.items() if k.startswith("input.")}
        assert given.keys() == inputs.keys() and all(torch.equal(given[k], v) for k, v in inputs.items())
        assert vlm.tokenizer.decode(recorded.tensors["caption_ids"]) == CAPTION

    def test_coordinates(self, vlm, calibrated, recorded):
        units = calibrated.directions.direction[1:3]
        inputs = inputs_of(vlm)
        expected = (hidden_states(vlm, inputs) * units).sum(-1)
        torch.testing.assert_close(recorded.tensors["coordinates"], expected)
        composer = vlm.composing(calibrated.frame)
        text = composer.text_prompt(inputs["input_ids"][0].tolist(), CAPTION)
        expected = (hidden_states(vlm, vlm.pad([text])) * units).sum(-1)
        torch.testing.assert_close(recorded.tensors["text_coordinates"], expected)

    def test_the_reference_lies_a_step_below_so_that_every_gate_corrects(self, recorded):
        step = recorded.tensors["coordinates"] - recorded.tensors["reference"]
        torch.testing.assert_close(step, torch.tensor([[STEPS[1], 1e-3]]))

    def test_logits_of_the_uncalibrated_model(self, vlm, recorded):
        torch.testing.assert_close(recorded.tensors["logits"], logits(vlm, inputs_of(vlm)))
        assert recorded.tensors["logits"].dtype == torch.float32

    def test_logits_with_the_correction(self, vlm, calibrated, recorded):
        reference = recorded.tensors["reference"][0]
        expected = naive(vlm, calibrated, lambda layer, x: x - reference[layer])
        torch.testing.assert_close(recorded.tensors["calibrated_logits"], expected)
        assert not torch.allclose(expected, recorded.tensors["logits"], atol=1e-2)

    def test_with_amounts_from_an_uncorrected_pass(self, vlm, calibrated, recorded):
        asked = replace(calibrated, recipe=calibrated.recipe.with_overrides(rule="precomputed"))
        amounts = (recorded.tensors["coordinates"] - recorded.tensors["reference"])[0]
        expected = naive(vlm, calibrated, lambda layer, _: amounts[layer])
        torch.testing.assert_close(record_probe(vlm, asked).tensors["calibrated_logits"], expected)
        assert not torch.allclose(expected, recorded.tensors["calibrated_logits"])

    @pytest.mark.parametrize("gate", ["one-sided", "two-sided"])
    def test_the_gate_is_the_recipes(self, vlm, calibrated, monkeypatch, gate):
        seen = []
        monkeypatch.setattr(probing, "corrected", lambda *a, **options: seen.append(options) or corrected(*a, **options))
        record_probe(vlm, replace(calibrated, recipe=calibrated.recipe.with_overrides(gate=gate)))
        assert [s["one_sided"] for s in seen] == [gate == "one-sided"]

    def test_what_the_processor_was_given_and_makes(self, vlm, recorded):
        picture = Image.open(BytesIO(recorded.tensors["picture"].numpy().tobytes()))
        assert picture.format == "PNG"
        assert ImageChops.difference(picture.convert("RGB"), typographic_image(PICTURE).convert("RGB")).getbbox() is None
        assert recorded.tensors["tokens.tokenizer"].tolist() == vlm.tokenizer(ODD_TEXT)["input_ids"]
        expected = {"request": REQUEST, "odd_text": ODD_TEXT, "day": DAY, "libraries": libraries()}
        assert recorded.texts == {**expected, "prompt": f"USER: <image>\n{REQUEST} ASSISTANT:"}

    def test_what_it_holds(self, recorded):
        results = {"caption_ids", "coordinates", "text_coordinates", "reference", "logits", "calibrated_logits"}
        inputs = {"input.input_ids", "input.attention_mask", "input.pixel_values"}
        assert recorded.tensors.keys() == results | inputs | {"picture", "tokens.tokenizer"}
        assert all(t.is_contiguous() and t.device.type == "cpu" for t in recorded.tensors.values())
        assert recorded.dtype == "float32"

    def test_it_is_saved_for_whoever_reads_the_export(self, recorded, tmp_path):
        file = tmp_path / "export" / "assets" / "probe.safetensors"
        for _ in range(2):
            recorded.save(file)
        with safe_open(file, "pt") as stored:
            assert stored.metadata() == {"format": "pt", "dtype": "float32", **recorded.texts}
            found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
        assert found.keys() == recorded.tensors.keys()
        assert all(torch.equal(v, recorded.tensors[k]) for k, v in found.items())
        assert stat.S_IMODE(file.stat().st_mode) == 0o644

    def test_prompts_are_composed_with_what_is_baked(self, vlm, calibrated, recorded):
        other = record_probe(vlm, replace(calibrated, frame=replace(calibrated.frame, text="{request} So: {caption}")))
        assert not torch.equal(other.tensors["text_coordinates"], recorded.tensors["text_coordinates"])


D = torch.eye(2, 3)
X = torch.tensor([[[1.0, 2, 3], [4, 5, 6]], [[-1, -2, -3], [-4, -5, -6]]])


class TestCorrected:
    """Two layers that change nothing by themselves, two rows, and directions along the first two axes."""

    POSITION, REFERENCE = torch.tensor([1, 0]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])

    def run(self, x=X, strength=0.5, one_sided=False, fixed=None):
        layers = [nn.Identity(), nn.Identity()]
        with corrected(layers, D, self.POSITION, self.REFERENCE, strength=strength, one_sided=one_sided, fixed=fixed):
            found = layers[1](layers[0](x))
        assert layers[1](layers[0](x)) is x
        return found

    def expected(self, first, second):
        """The rows' corrected tokens; all others are as they were."""
        expected = X.clone()
        expected[0, 1], expected[1, 0] = torch.tensor(first), torch.tensor(second)
        return expected

    def test_half_the_way_to_the_reference(self):
        before = X.clone()
        assert torch.equal(self.run(), self.expected([2.5, 3.0, 6.0], [-0.5, -1.0, -3.0]))
        assert torch.equal(X, before)

    def test_the_whole_way(self):
        assert torch.equal(self.run(strength=1.0), self.expected([1.0, 1.0, 6.0], [0.0, 0.0, -3.0]))

    def test_never_toward_safe(self):
        assert torch.equal(self.run(one_sided=True), self.expected([2.5, 3.0, 6.0], [-1.0, -2.0, -3.0]))

    def test_amounts_that_are_given(self):
        fixed = torch.tensor([[2.0, 4.0], [-2.0, 6.0]])
        assert torch.equal(self.run(fixed=fixed), self.expected([3.0, 3.0, 6.0], [0.0, -5.0, -3.0]))
        assert torch.equal(self.run(fixed=fixed, one_sided=True), self.expected([3.0, 3.0, 6.0], [-1.0, -5.0, -3.0]))

    def test_the_output_keeps_the_models_dtype(self):
        x = X.bfloat16()
        assert torch.equal(self.run(x), self.expected([2.5, 3.0, 6.0], [-0.5, -1.0, -3.0]).bfloat16())
        assert self.run(x).dtype == torch.bfloat16

    def test_layers_on_another_device(self):
        """What is given lies on the CPU."""
        assert self.run(X.to("meta")).device.type == "meta"
        assert self.run(X.to("meta"), fixed=torch.ones(2, 2)).device.type == "meta"
