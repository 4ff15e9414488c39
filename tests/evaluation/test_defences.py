"""What each defence asks of a model, and what it sets: on stubs, so that every setting is looked at."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from exporter.data.defence_prompts import ADASHIELD_REQUEST, fill
from exporter.evaluation import defences
from exporter.evaluation.defences import (
    DEFENCES,
    Answers,
    Run,
    adashield,
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
encoded: list = []


@pytest.fixture
def run(vlm):
    asked.clear()
    encoded.clear()

    def encode(requests, images=None):
        encoded.append((requests, images))
        return {**INPUTS} if images is not None else {"requests": requests}

    vlm.encode = encode
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
    assert encoded == [(["p", "q"], PICTURES[:2])]
    assert answers.texts == ["a", "b"]
    assert answers.seconds.keys() == {"caption", "prefill", "decode"}


def test_text_only_takes_no_caption_for_another_s(run):
    run.vlm.model.shiftdc_captions = lambda **inputs: [[71]]
    with pytest.raises(ValueError, match="shorter"):
        text_only(run, ["p", "q"], PICTURES[:2])


def test_direct_and_adashield_show_the_images_to_the_base_model(run):
    DEFENCES["direct"].answer(run, ["p", "q"], PICTURES[:2])
    adashield(run, ["p", "q"], PICTURES[:2])
    assert encoded == [(requests, PICTURES[:2]) for requests in (["p", "q"], [fill(ADASHIELD_REQUEST, question=q) for q in "pq"])]
    assert [options for _, options in asked] == [{"shiftdc": False}] * 2


def test_without_an_image_there_is_no_defence_to_compare(run):
    text_only(run, ["p"], None)
    DEFENCES["direct"].answer(run, ["p"], None)
    assert asked == [({"requests": ["p"]}, {"shiftdc": False})] * 2


@pytest.mark.parametrize("kind", ["caption", "text", "blank"])
def test_the_reference_is_computed_once_and_passed_on(run, kind):
    run.vlm.model.config.shiftdc["reference"] = kind
    answers = shiftdc(run, ["p", "q"], PICTURES[:2])
    ((inputs, options),) = asked
    assert encoded == [(["p", "q"], PICTURES[:2])]
    assert inputs.keys() == INPUTS.keys()
    captions = [[71], [72, 73]] if kind == "caption" else None
    assert options["shiftdc_reference"] == ("reference", captions, INPUTS.keys())
    assert (options["shiftdc_image"] is None) == (kind != "caption")
    assert "shiftdc" not in options
    assert answers.texts == ["a", "b"]
    spent = {"caption"} if kind == "caption" else set()
    assert answers.seconds.keys() == {*spent, "reference", "prefill", "decode"}


def test_a_static_reference_takes_no_pass(run):
    run.vlm.model.config.shiftdc["reference"] = "static"
    answers = shiftdc(run, ["p", "q"], PICTURES[:2])
    ((inputs, options),) = asked
    assert inputs.keys() == INPUTS.keys()
    assert options == {}
    assert answers.seconds.keys() == {"prefill", "decode"}


def test_replies_are_greedy_and_timed_up_to_the_first_pass_of_the_last_layer(monkeypatch):
    layers, given = nn.ModuleList([nn.Identity(), nn.Identity()]), {}

    def generate(**options):
        given.update(options)
        for _ in range(3):
            for layer in layers:
                layer(torch.zeros(2, 1, 4))
        return torch.cat([IDS, torch.tensor([[5, 6], [7, 8]])], dim=1)

    model = SimpleNamespace(generate=generate, config=SimpleNamespace())
    vlm = SimpleNamespace(
        model=model,
        device=torch.device("cpu"),
        decoder_layers=layers,
        decode=lambda ids: str(ids.tolist()),
    )
    clock = iter([10.0, 11.5, 14.0])  # before, after the first pass, after the last
    monkeypatch.setattr(defences, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = Run(vlm, 8).generate(INPUTS, shiftdc=False)
    assert found == Answers(["[5, 6]", "[7, 8]"], {"prefill": 1.5, "decode": 2.5})
    assert given == {**INPUTS, "shiftdc": False, "max_new_tokens": 8, "do_sample": False}


SCRIPT = {"first": ["r0", "r1", "r2"], "judge": ["no", "Yes", "yes."], "caption": ["c1", "c2"], "answer": ["s1", "s2"]}


class Script(Run):
    """Answers what is scripted for each step of ECSO."""

    def ask(self, requests, images=None):
        shown.append((requests, None if images is None else [PICTURES.index(i) for i in images]))
        return Answers(list(scripted.values())[len(shown) - 1], {"prefill": 1.0})


scripted: dict = {}
shown: list = []


@pytest.fixture
def script():
    shown.clear()
    scripted.update(SCRIPT)
    return Script(None, 8)


def test_ecso_looks_at_the_images_of_the_flagged_replies_and_answers_without(script):
    answers = ecso(script, ["q0", "q1", "q2"], PICTURES)
    assert answers.texts == ["r0", "s1", "s2"]
    assert answers.seconds.keys() == {"prefill", "judge", "caption", "reference"}
    (requests, first), (judged, seen), (captioned, captions), (final, last) = shown
    assert requests == ["q0", "q1", "q2"]
    assert (first, seen, captions, last) == ([0, 1, 2], [0, 1, 2], [1, 2], None)
    assert all(f"q{i}" in text and f"r{i}" in text for i, text in enumerate(judged))
    assert ["q1" in captioned[0], "q2" in captioned[1]] == [True, True]
    assert all(f"q{i}" in text and f"c{i}" in text for i, text in enumerate(final, 1))


@pytest.mark.parametrize(("verdicts", "images"), [(["no", "no", "no"], PICTURES), (["yes", "yes", "yes"], None)])
def test_ecso_leaves_replies_that_are_not_flagged_and_those_to_text(script, verdicts, images):
    scripted["judge"] = verdicts
    answers = ecso(script, ["q0", "q1", "q2"], images)
    assert answers.texts == ["r0", "r1", "r2"]
    assert answers.seconds.keys() == {"prefill", "judge"}
    assert len(shown) == 2


@pytest.mark.parametrize(("step", "texts"), [("first", ["r0"]), ("caption", ["c1"]), ("answer", ["s1"])])
def test_ecso_takes_no_reply_for_another_s(script, step, texts):
    scripted[step] = texts
    with pytest.raises(ValueError, match="shorter"):
        ecso(script, ["q0", "q1", "q2"], PICTURES)
