"""Each check that `verify` makes in a fresh process, on a model of which one thing is doctored."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from exporter.checkpoint import verify_worker
from exporter.checkpoint.verify_worker import main, refuses_uncalibrated_loading, reproduces_probe

NAN = float("nan")
BASE, CALIBRATED = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1.0, 2.0, 0.5])
COORDINATES, TEXT = torch.tensor([[0.5, 0.25]]), torch.tensor([[1.5, -0.25]])
PROBE = {
    "input.input_ids": torch.tensor([[1, 4, 9]]),
    "input.attention_mask": torch.ones(1, 3, dtype=torch.long),
    "input.pixel_values": torch.ones(1, 3, 2, 2),
    "reference": torch.tensor([[0.1, 0.2]]),
    "caption_ids": torch.tensor([5, 6]),
    "logits": BASE,
    "calibrated_logits": CALIBRATED,
    "coordinates": COORDINATES,
    "text_coordinates": TEXT,
}


class Doctored:
    """A model that answers as recorded, but in what it is told."""

    def __init__(self, off=BASE, calibrated=CALIBRATED, none=None, coordinates=COORDINATES, text=TEXT, tokens=2, **settings):
        self.config = SimpleNamespace(shiftdc={"reference": "caption", **settings})
        self.shiftdc_corrections = [SimpleNamespace(strength=0.7), SimpleNamespace(strength=0.7)]
        self.off, self.calibrated, self.none = off, calibrated, off if none is None else none
        self.coordinates, self.text, self.tokens = coordinates, text, tokens

    def get_input_embeddings(self):
        return torch.nn.Embedding(1, 1)

    def __call__(self, *, shiftdc=None, shiftdc_reference=None, shiftdc_position=None, **inputs):
        assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "logits_to_keep"}
        if shiftdc is not False:
            assert torch.equal(shiftdc_reference, PROBE["reference"]) and shiftdc_position.tolist() == [2]
        answers = {0.0: self.none, 0.7: self.calibrated}
        strength = {c.strength for c in self.shiftdc_corrections}.pop()
        return SimpleNamespace(logits=(self.off if shiftdc is False else answers[strength])[None, None])

    def shiftdc_coordinates(self, **inputs):
        return self.coordinates

    def shiftdc_reference(self, input_ids, attention_mask, captions, **images):
        assert captions[0].tolist() == [5, 6] and set(images) == {"pixel_values"}
        return self.text

    def generate(self, input_ids, **_):
        return torch.cat([input_ids, input_ids[:, : self.tokens]], 1)


def found(dtype="float32", **doctored):
    return reproduces_probe(Doctored(**doctored), PROBE, dtype)[0]


def test_a_model_that_answers_as_recorded_passes():
    failures, parity = reproduces_probe(Doctored(), PROBE, "float32")
    assert failures == []
    names = ("logits", "calibrated_logits", "coordinates", "text_coordinates")
    assert parity == {**dict.fromkeys(names, 0.0), "uncalibrated_exact": True}


@pytest.mark.parametrize(
    ("argument", "name", "recorded"),
    [
        ("off", "logits", BASE),
        ("calibrated", "calibrated_logits", CALIBRATED),
        ("coordinates", "coordinates", COORDINATES),
        ("text", "text_coordinates", TEXT),
    ],
)
@pytest.mark.parametrize("wrong", [0.01, NAN])
def test_each_number_of_the_probe_is_compared(argument, name, recorded, wrong):
    failure, *_ = found(**{argument: recorded + wrong})
    assert failure.startswith(f"the probe's {name} differ by ") and failure.endswith("expected at most 0.001")
    assert found(**{argument: recorded * (1 + 1e-4)}) == []  # another machine's rounding


@pytest.mark.parametrize(("dtype", "within"), [("float32", 9e-4), ("float16", 0.019), ("bfloat16", 0.079)])
def test_how_far_another_machine_may_be(dtype, within):
    assert found(dtype, coordinates=COORDINATES * (1 + within)) == []
    assert len(found(dtype, coordinates=COORDINATES * (1 + 1.3 * within))) == 1


def test_the_text_pass_of_a_static_reference_is_not_asked_for():
    assert found(reference="static", text=TEXT * NAN) == []


def test_uncalibrated_is_exact():
    """One bit is too much, where calibration is merely of strength 0."""
    assert found(none=BASE.nextafter(torch.tensor(9.0))) == ["strength 0 is not the uncalibrated model exactly"]
    failures, parity = reproduces_probe(Doctored(off=BASE.nextafter(torch.tensor(9.0))), PROBE, "float32")
    assert failures == [] and parity["uncalibrated_exact"] is False


def test_strengths_are_those_of_before():
    model = Doctored()
    reproduces_probe(model, PROBE, "float32")
    assert [c.strength for c in model.shiftdc_corrections] == [0.7, 0.7]


def test_calibration_that_changes_nothing():
    probe = {**PROBE, "calibrated_logits": BASE}
    assert reproduces_probe(Doctored(calibrated=BASE), probe, "float32")[0] == ["calibration changes nothing on the probe"]


def test_no_reply():
    assert found(tokens=0) == ["generate() gives no token"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(**what loading reports, class name) -> failures of the whole check of a folder."""
    (tmp_path / "assets").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Doctored"]}))
    (tmp_path / "shiftdc_report.json").write_text(json.dumps({"base_model": {"architecture": "Stock"}}))
    save_file(PROBE, tmp_path / "assets" / "shiftdc_probe.safetensors", metadata={"dtype": "float32"})
    monkeypatch.setattr(verify_worker, "refuses_uncalibrated_loading", lambda folder, name: [f"asked of {name}"])
    monkeypatch.setattr(verify_worker, "remakes_inputs", lambda *_: ["asked of the processor"])

    def run(cls=Doctored, imports=False, doctored=None, **loading):
        model = cls(**(doctored or {}))
        model.to = model.eval = lambda *_: model
        report = {"missing_keys": [], "unexpected_keys": set(), "mismatched_keys": [], **loading}
        monkeypatch.setattr(verify_worker.AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: (model, report))
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, "exporter", object()) if imports else patched.delitem(sys.modules, "exporter")
            return main(tmp_path)["failures"]

    return run


FIRST = ["asked of Stock", "asked of the processor"]


def test_a_whole_folder(run):
    assert run() == FIRST
    assert run(doctored={"tokens": 0}) == [*FIRST, "generate() gives no token"]


@pytest.mark.parametrize("kind", ["missing_keys", "unexpected_keys", "mismatched_keys"])
def test_keys_that_loading_reports(run, kind):
    assert run(**{kind: {"b.weight", "a.weight"}}) == [*FIRST, f"loading reports 2 {kind.replace('_', ' ')} (a.weight)"]


def test_another_class(run):
    other = type("Other", (Doctored,), {})
    assert run(cls=other) == [*FIRST, "loading gives a Other, expected Doctored"]


def test_a_checkpoint_that_imports_this_package(run):
    expected = "the checkpoint imports the exporter package; it must load with transformers alone"
    assert run(imports=True) == [*FIRST, expected]


def test_how_the_stock_classes_refuse(tmp_path, monkeypatch):
    def raising(message, cause=None):
        def load(*_, trust_remote_code):
            assert trust_remote_code is False
            raise ValueError(message) from cause

        return SimpleNamespace(from_pretrained=load)

    def refused(stock, auto):
        monkeypatch.setattr(verify_worker.transformers, "Stock", stock, raising=False)
        monkeypatch.setattr(verify_worker, "AutoModelForImageTextToText", auto)
        return refuses_uncalibrated_loading(tmp_path, "Stock")

    stock, auto = raising("x", KeyError("calibrated by ShiftDC")), raising("needs trust_remote_code=True")
    loads = SimpleNamespace(from_pretrained=lambda *_, **__: object())
    assert refused(stock, auto) == []
    assert refused(loads, auto) == ["the stock class Stock loads it without an error, uncalibrated"]
    name = "AutoModelForImageTextToText without trust_remote_code"
    assert refused(stock, loads) == [f"{name} loads it without an error, uncalibrated"]
    assert refused(stock, raising("no disk")) == [f"{name} does not refuse it as calibrated, but fails with ValueError"]
