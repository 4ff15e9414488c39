"""Each check that `verify` makes in a fresh process, on a model of which one thing is doctored."""

from __future__ import annotations

import json
import sys
import threading
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


def assert_recorded(inputs):
    assert {f"input.{k}": v.tolist() for k, v in inputs.items()} == {k: v.tolist() for k, v in PROBE.items() if "input." in k}


class Doctored:
    """A model that answers as recorded, but in what it is told."""

    def __init__(
        self,
        off=BASE,
        calibrated=CALIBRATED,
        none=None,
        coordinates=COORDINATES,
        text=TEXT,
        tokens=2,
        strength=0.7,
        layers=2,
        **settings,
    ):
        self.config = SimpleNamespace(shiftdc={"reference": "caption", **settings})
        self.shiftdc_corrections = [SimpleNamespace(strength=strength) for _ in range(layers)]
        self.off, self.calibrated, self.none = off, calibrated, off if none is None else none
        self.coordinates, self.text, self.tokens = coordinates, text, tokens

        self.done = []

    def to(self, device):
        self.done.append(f"to {device}")
        return self

    def eval(self):
        self.done.append("eval")
        return self

    def get_input_embeddings(self):
        return torch.nn.Embedding(1, 1)

    def __call__(self, *, shiftdc=None, shiftdc_reference=None, shiftdc_position=None, **inputs):
        assert inputs.pop("logits_to_keep") == 1
        assert_recorded(inputs)
        if shiftdc is not False:
            assert torch.equal(shiftdc_reference, PROBE["reference"]) and shiftdc_position.tolist() == [2]
        answers = {0.7: self.calibrated, 0.0: self.none}
        strength = {c.strength for c in self.shiftdc_corrections}.pop()
        return SimpleNamespace(logits=(self.off if shiftdc is False else answers[strength])[None, None])

    def shiftdc_coordinates(self, **inputs):
        assert_recorded(inputs)
        return self.coordinates

    def shiftdc_reference(self, input_ids, attention_mask, captions, **images):
        assert_recorded({"input_ids": input_ids, "attention_mask": attention_mask, **images})
        assert [c.tolist() for c in captions] == [[5, 6]]
        return self.text

    def generate(self, input_ids, attention_mask, pixel_values, *, max_new_tokens, do_sample):
        assert_recorded({"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values})
        assert (max_new_tokens, do_sample) == (2, False)  # enough to see that it runs, with a cache
        return torch.cat([input_ids, input_ids[:, : self.tokens]], 1)


def found(dtype="float32", **doctored):
    return reproduces_probe(Doctored(**doctored), PROBE, dtype)[0]


def test_a_model_that_answers_as_recorded_passes():
    failures, parity = reproduces_probe(Doctored(), PROBE, "float32")
    assert failures == found(layers=1) == []
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
    assert reproduces_probe(Doctored(strength=0.0), probe, "float32")[0] == []  # nor is it asked to


def test_no_reply():
    assert found(tokens=0) == ["generate() gives no token"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(**what loading reports, class name) -> failures of the check of a folder; `run.model`, `run.options` as loaded."""
    (tmp_path / "assets").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Doctored"]}))
    (tmp_path / "shiftdc_report.json").write_text(json.dumps({"base_model": {"architecture": "Stock"}}))

    def refuses(folder, name):
        return [f"{folder.name} asked of {name}"]

    def remakes(folder, probe, texts):
        assert probe.keys() == PROBE.keys()
        return [f"{folder.name} asked of the processor of {texts['request']}"]

    monkeypatch.setattr(verify_worker, "refuses_uncalibrated_loading", refuses)
    monkeypatch.setattr(verify_worker, "remakes_inputs", remakes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: run.cuda)

    def run(*placement, cls=Doctored, imports=False, doctored=None, dtype="float32", **loading):
        texts = {"dtype": dtype, "request": "What?"}
        save_file(PROBE, tmp_path / "assets" / "shiftdc_probe.safetensors", metadata=texts)
        run.model = model = cls(**(doctored or {}))
        report = {"missing_keys": [], "unexpected_keys": set(), "mismatched_keys": [], **loading}

        def load(folder, **options):
            assert folder == tmp_path
            run.options = options
            return model, report

        monkeypatch.setattr(verify_worker.AutoModelForImageTextToText, "from_pretrained", load)
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, "exporter", object()) if imports else patched.delitem(sys.modules, "exporter")
            found = main(tmp_path, *placement)
        run.parity = found["parity"]
        assert found["failures"][:2] == [f"{tmp_path.name} asked of {who}" for who in ("Stock", "the processor of What?")]
        return found["failures"][2:]

    run.cuda = False
    return run


def test_a_whole_folder(run):
    assert run() == []
    assert run.parity.keys() == {"logits", "calibrated_logits", "coordinates", "text_coordinates", "uncalibrated_exact"}
    assert run(doctored={"tokens": 0}) == ["generate() gives no token"]


@pytest.mark.parametrize("kind", ["missing_keys", "unexpected_keys", "mismatched_keys"])
def test_keys_that_loading_reports(run, kind):
    assert run(**{kind: {"b.weight", "a.weight"}}) == [f"loading reports 2 {kind.replace('_', ' ')} (a.weight)"]


def test_keys_with_shapes(run):
    found = run(mismatched_keys=[("b.weight", (1,), (2,)), ("a.weight", (1,), (2,))])
    assert found == ["loading reports 2 mismatched keys (('a.weight', (1,), (2,)))"]


def test_another_class(run):
    assert run(cls=type("Other", (Doctored,), {})) == ["loading gives a Other, expected Doctored"]


def test_a_checkpoint_that_imports_this_package(run):
    assert run(imports=True) == ["the checkpoint imports the exporter package; it must load with transformers alone"]


def test_how_the_checkpoint_is_loaded(run):
    """With its own code, in the probe's dtype, and as for use."""
    run(dtype="bfloat16")
    assert run.options == {"trust_remote_code": True, "dtype": torch.bfloat16, "output_loading_info": True}
    assert run.model.done == ["to cpu", "eval"]
    run.cuda = True
    run()
    assert run.model.done == ["to cuda", "eval"]


def test_how_a_checkpoint_is_loaded_that_one_device_does_not_hold(run):
    """accelerate has put it where it is to run."""
    run("auto", "/offload")
    assert run.options["device_map"] == "auto" and run.options["offload_folder"] == "/offload"
    assert run.model.done == ["eval"]


class Elsewhere(Doctored):
    """A model on another device, whose answers are fetched from there."""

    def get_input_embeddings(self):
        return torch.nn.Embedding(1, 1, device="meta")

    def __call__(self, *, logits_to_keep, **inputs):
        assert {v.device.type for v in inputs.values() if isinstance(v, torch.Tensor)} == {"meta"}
        strength = {c.strength for c in self.shiftdc_corrections}.pop()
        off = inputs.get("shiftdc") is False or strength == 0
        return SimpleNamespace(logits=(self.off if off else self.calibrated)[None, None])

    def shiftdc_coordinates(self, **inputs):
        assert {v.device.type for v in inputs.values()} == {"meta"}
        return self.coordinates

    def shiftdc_reference(self, *ids_and_mask, captions, **images):
        assert {v.device.type for v in (*ids_and_mask, *images.values())} == {"meta"}
        return self.text

    def generate(self, input_ids, **_):
        return torch.cat([input_ids, input_ids], 1)


def test_a_model_on_another_device():
    assert reproduces_probe(Elsewhere(), PROBE, "float32")[0] == []


def test_inputs_go_where_the_embeddings_run():
    """Of a model that is offloaded, its weights lie elsewhere."""
    model = Doctored()
    assert verify_worker._device(model) == torch.device("cpu")
    offloaded = torch.nn.Embedding(1, 1, device="meta")
    model.get_input_embeddings = lambda: offloaded
    assert verify_worker._device(model) == torch.device("meta")
    offloaded._hf_hook = SimpleNamespace(execution_device="cuda:0")
    assert verify_worker._device(model) == torch.device("cuda:0")
    offloaded._hf_hook = SimpleNamespace(execution_device="cpu")
    assert verify_worker._device(model) == torch.device("cpu")


def test_it_ends_with_its_parent(monkeypatch):
    """Who started it holds its stdin open; and at its own end nothing of it waits for that."""
    ended, waiting, closing = [], threading.Event(), threading.Event()

    def read(descriptor, count):
        assert descriptor == 0 and count == 1  # a read of no byte would not wait
        waiting.set()
        closing.wait(10)
        return b""

    monkeypatch.setattr(verify_worker.os, "read", read)
    monkeypatch.setattr(verify_worker.os, "_exit", ended.append)
    before = set(threading.enumerate())
    verify_worker.end_with_parent()
    (thread,) = set(threading.enumerate()) - before
    assert waiting.wait(10) and thread.daemon and not ended
    closing.set()
    thread.join(10)
    assert ended == [1]


def test_how_the_stock_classes_refuse(tmp_path, monkeypatch):
    def raising(message, cause=None):
        def load(folder, *, trust_remote_code):
            assert folder == tmp_path and trust_remote_code is False
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
