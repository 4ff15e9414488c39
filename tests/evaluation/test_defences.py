"""What each defence asks of a model, and what it sets: on stubs, so that every setting is looked at."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from exporter.evaluation.defences import (
    DEFENCES,
    Answers,
    Run,
    applied,
    defence_words,
    defences_in_rows,
    ecso,
    shiftdc,
    text_only,
)
from exporter.modeling.modeling_shiftdc import ShiftDCCorrection

LAYERS = (3, 5)
BLANK = {3: -0.25, 4: 9.0, 5: 0.75}


def correction(layer):
    made = ShiftDCCorrection(64, LAYERS.index(layer), 1.0, True, layer, "")
    made.direction.zero_()[layer] = 1
    made.shift.fill_(0.5 + layer)
    return made


@pytest.fixture
def vlm():
    settings = {"layers": list(LAYERS), "reference": "caption", "rule": "sequential", "gate": "one-sided"}
    model = SimpleNamespace(config=SimpleNamespace(shiftdc=settings), shiftdc_corrections=[correction(i) for i in LAYERS])
    return SimpleNamespace(model=model)


@pytest.fixture
def under(vlm):
    """under(name) -> (settings, corrections) while that defence is applied."""
    with ExitStack() as stack:

        def enter(name):
            stack.close()
            stack.enter_context(applied(vlm, DEFENCES[name], BLANK))
            return vlm.model.config.shiftdc, vlm.model.shiftdc_corrections

        yield enter


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("direct", {}),
        ("shiftdc", {}),
        ("shiftdc_caption", {"reference": "caption"}),
        ("shiftdc_text", {"reference": "text"}),
        ("shiftdc_blank", {"reference": "blank"}),
        ("shiftdc_static", {"reference": "static"}),
        ("shiftdc_precomputed", {"rule": "precomputed"}),
        ("shiftdc_one_sided", {"gate": "one-sided"}),
        ("shiftdc_two_sided", {"gate": "two-sided"}),
        ("blank_image_shift", {"reference": "static", "gate": "two-sided"}),
    ],
)
@pytest.mark.parametrize("gate", ["one-sided", "two-sided"])
def test_the_settings_of_each(vlm, under, name, changed, gate):
    vlm.model.config.shiftdc["gate"] = gate
    expected = {**vlm.model.config.shiftdc, **changed}
    settings, corrections = under(name)
    assert settings == expected
    assert [c.one_sided for c in corrections] == [expected["gate"] == "one-sided"] * 2
    assert DEFENCES[name].answer is (shiftdc if "shift" in name else DEFENCES["direct"].answer)


def test_random_directions_are_unit_and_their_own(under):
    drawn = {}
    for seed in (0, 1, 2):
        drawn[seed] = torch.stack([c.direction.clone() for c in under(f"random_direction_{seed}")[1]])
        again = torch.stack([c.direction for c in under(f"random_direction_{seed}")[1]])
        assert torch.equal(again, drawn[seed])
        assert torch.allclose(drawn[seed].norm(dim=-1), torch.ones(2), atol=1e-6)
    cosines = torch.corrcoef(torch.cat(list(drawn.values()))).fill_diagonal_(0)
    assert cosines.abs().max() < 0.6  # of three seeds and two layers, no two are one


def test_the_blank_shift_is_that_of_each_layer(under):
    assert [c.shift.item() for c in under("blank_image_shift")[1]] == [-0.25, 0.75]
    assert [c.shift.item() for c in under("shiftdc_static")[1]] == [3.5, 5.5]


def test_every_defence_has_words_and_a_row():
    assert all(d.words for d in DEFENCES.values())
    assert (defence_words("shiftdc"), defence_words("a_new_one")) == ("ShiftDC, as shipped", "a new one")
    rows = list(defences_in_rows(dict.fromkeys(("zebra", "random_direction_0", "shiftdc", "blank_image_shift", "direct"))))
    assert rows == ["direct", "shiftdc", "blank_image_shift", "random_direction_0", "zebra"]


IDS, MASK = torch.tensor([[0, 1, 4, 9], [1, 4, 8, 7]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
INPUTS = {"input_ids": IDS, "attention_mask": MASK, "pixel_values": torch.ones(2, 3)}
PICTURES = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]


class Recorder(Run):
    """Notes what is generated from."""

    def generate(self, inputs, **options):
        asked.append((inputs, options))
        return Answers(["a", "b"], {"prefill": 1.0, "decode": 2.0})


asked: list = []


@pytest.fixture
def run(vlm):
    asked.clear()
    vlm.encode = lambda requests, images=None: {**INPUTS} if images is not None else {"requests": requests}
    vlm.pad = lambda prompts: {"prompts": prompts}
    vlm.model.shiftdc_captions = lambda **inputs: [[71], [72, 73]] if inputs.keys() == INPUTS.keys() else None
    vlm.model.shiftdc_image = lambda **inputs: SimpleNamespace(captions=[[71], [72, 73]], of=inputs)
    vlm.model.shiftdc_reference = lambda captions=None, **inputs: ("reference", captions, inputs.keys())
    vlm.model.shiftdc_composer = SimpleNamespace(text_prompt=lambda ids, caption=None: [*ids, "caption", *(caption or [])])
    return Recorder(vlm, 8)


def test_text_only_has_the_caption_and_no_image_and_is_not_calibrated(run):
    answers = text_only(run, ["p", "q"], PICTURES[:2])
    ((inputs, options),) = asked
    assert inputs == {"prompts": [[1, 4, 9, "caption", 71], [1, 4, 8, 7, "caption", 72, 73]]}
    assert options == {"shiftdc": False}
    assert answers.seconds.keys() == {"caption", "prefill", "decode"}


def test_without_an_image_there_is_no_defence_to_compare(run):
    text_only(run, ["p"], None)
    DEFENCES["direct"].answer(run, ["p"], None)
    assert asked == [({"requests": ["p"]}, {"shiftdc": False})] * 2


@pytest.mark.parametrize("kind", ["caption", "text", "blank"])
def test_the_reference_is_computed_once_and_passed_on(run, kind):
    run.vlm.model.config.shiftdc["reference"] = kind
    answers = shiftdc(run, ["p", "q"], PICTURES[:2])
    ((inputs, options),) = asked
    assert inputs.keys() == INPUTS.keys()
    captions = [[71], [72, 73]] if kind == "caption" else None
    assert options["shiftdc_reference"] == ("reference", captions, INPUTS.keys())
    assert (options["shiftdc_image"] is None) == (kind != "caption")
    assert "shiftdc" not in options
    spent = {"caption"} if kind == "caption" else set()
    assert answers.seconds.keys() == {*spent, "reference", "prefill", "decode"}


def test_a_static_reference_takes_no_pass(run):
    run.vlm.model.config.shiftdc["reference"] = "static"
    shiftdc(run, ["p", "q"], PICTURES[:2])
    assert asked[0][1] == {}


def test_ecso_looks_at_the_images_of_the_flagged_replies_and_answers_without():
    shown = []

    class Script(Run):
        def ask(self, requests, images=None):
            shown.append((requests, None if images is None else [PICTURES.index(i) for i in images]))
            step = ("first", "judge", "caption", "answer")[len(shown) - 1]
            texts = {"first": ["r0", "r1", "r2"], "judge": ["no", "Yes", "yes."], "caption": ["c1", "c2"], "answer": ["s1", "s2"]}
            return Answers(texts[step], {"prefill": 1.0})

    answers = ecso(Script(None, 8), ["q0", "q1", "q2"], PICTURES)
    assert answers.texts == ["r0", "s1", "s2"]
    (_, first), (judged, seen), (captioned, captions), (final, last) = shown
    assert (first, seen, captions, last) == ([0, 1, 2], [0, 1, 2], [1, 2], None)
    assert all(f"q{i}" in text and f"r{i}" in text for i, text in enumerate(judged))
    assert ["q1" in captioned[0], "q2" in captioned[1]] == [True, True]
    assert all(f"q{i}" in text and f"c{i}" in text for i, text in enumerate(final, 1))
