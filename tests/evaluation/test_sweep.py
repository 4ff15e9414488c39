"""`--strength auto`."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from exporter.checkpoint.verify import verify
from exporter.errors import InputError
from exporter.evaluation import sweep
from exporter.evaluation.intervals import Share
from exporter.evaluation.sweep import STRENGTHS, Candidate, Measured, _Batch, _divergence, candidates, choose, run_sweep
from exporter.modeling.modeling_shiftdc import ShiftDCCorrection
from exporter.pipeline import export as pipeline
from exporter.pipeline.export import export
from exporter.pipeline.plan import ExportOptions, make_plan


def measured(strength, asr, over_refusal=0, kl=0.0, layers=(4, 5)):
    return Measured(Candidate(layers, strength), Share(asr, 100), Share(over_refusal, 100), kl)


BASE = measured(0.0, 90)


def test_the_lowest_asr_wins():
    assert choose(BASE, [measured(0.5, 40), measured(1.5, 10), measured(1.0, 20)]).candidate.strength == 1.5


@pytest.mark.parametrize("too_much", [{"over_refusal": 4}, {"kl": 0.11}])
def test_bounds_come_first(too_much):
    assert choose(BASE, [measured(1.0, 30), measured(1.5, 10, **too_much)]).candidate.strength == 1.0


def test_of_equals_the_paper_s_strength_and_more_layers():
    tried = [measured(0.5, 10), measured(1.0, 10, layers=(5,)), measured(1.0, 10), measured(1.5, 10)]
    assert choose(BASE, tried).candidate == Candidate((4, 5), 1.0)


@pytest.mark.parametrize("tried", [[measured(1.0, 90)], [measured(1.0, 95)], [measured(1.0, 0, over_refusal=50)]])
def test_no_gain_is_an_error(tried):
    with pytest.raises(InputError, match="no candidate lowers attack success"):
        choose(BASE, tried)


def test_the_bounds_are_met_exactly():
    tried = [measured(1.0, 10, over_refusal=3, kl=0.1)]
    assert choose(BASE, tried) is tried[0]


PROMPT, REPLY = 5, 3


class Logits:
    """Uniform over two tokens without calibration, (1/4, 3/4) with it; notes what it is called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, *, shiftdc=None, **inputs):
        self.calls.append({"shiftdc": shiftdc, **inputs})
        odds = 0.0 if shiftdc is False else math.log(3)
        return SimpleNamespace(logits=torch.tensor([0.0, odds]).expand(2, inputs["logits_to_keep"], 2))


def test_the_divergence_is_of_base_from_calibrated_over_the_base_s_replies():
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    replies = torch.arange(2 * (PROMPT + REPLY)).view(2, -1)
    batch = _Batch({"input_ids": replies[:, :PROMPT], "attention_mask": mask, "pixel_values": "p"}, "reference", replies)
    model = Logits()
    found = _divergence(SimpleNamespace(model=model), [batch, batch])
    assert found == pytest.approx(math.log(4 / 3) / 2)  # of calibrated from base it would be 0.1308
    base, calibrated = model.calls[:2]
    for call in (base, calibrated):
        assert torch.equal(call["input_ids"], replies[:, :-1])
        assert call["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1, 1], [1] * 7]
        assert (call["logits_to_keep"], call["pixel_values"]) == (REPLY, "p")
    assert base["shiftdc"] is False and calibrated["shiftdc"] is None
    assert calibrated["shiftdc_position"].tolist() == [PROMPT - 1] * 2  # the prompt's last token, not the reply's
    assert calibrated["shiftdc_reference"] == "reference"


def test_what_each_candidate_is_measured_on(monkeypatch):
    """Attacks on unsafe rows; refusals and the divergence on safe ones; each at the strengths of the candidate."""
    corrections = [ShiftDCCorrection(8, column, 1.0, True, 4 + column, "") for column in range(2)]
    settings = {"layers": [4, 5], "gate": "one-sided"}
    model = SimpleNamespace(config=SimpleNamespace(shiftdc=settings), shiftdc_corrections=corrections)
    rows = [SimpleNamespace(label=label) for label in ("safe", "unsafe", "safe")]
    monkeypatch.setattr(sweep, "_prepared", lambda vlm, rows: {r.label for r in rows}.pop())

    def strengths():
        return tuple(c.strength for c in corrections)

    def refused(vlm, label):
        used.append((label, strengths()))
        return {"unsafe": Share(9 if any(strengths()) else 1, 10), "safe": Share(0, 20)}[label]

    used: list = []
    monkeypatch.setattr(sweep, "_refusals", refused)
    monkeypatch.setattr(sweep, "_divergence", lambda vlm, label: sum(strengths()) / 40 if label == "safe" else math.nan)
    found = run_sweep(SimpleNamespace(model=model), rows, vary_layers=True)
    assert (found.base.asr, found.base.over_refusal, found.base.kl) == (Share(9, 10), Share(0, 20), 0.0)
    assert {m.asr for m in found.measured} == {Share(1, 10)}
    assert [m.kl for m in found.measured] == [0.025, 0.05, 0.075, 0.0125, 0.025, 0.0375, 0.0125, 0.025, 0.0375]
    whole, later, earlier = ([(s, s) for s in STRENGTHS], [(0.0, s) for s in STRENGTHS], [(s, 0.0) for s in STRENGTHS])
    assert used == [(label, s) for s in [(0.0, 0.0), *whole, *later, *earlier] for label in ("unsafe", "safe")]
    assert strengths() == (1.0, 1.0)  # as it was


def test_the_rows_are_those_held_out(monkeypatch, tmp_path):
    seen = []

    def stop(vlm, rows, vary_layers, progress):
        seen.extend([rows, vary_layers])
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "scratch", lambda *_: nullcontext(Path(tmp_path)))
    monkeypatch.setattr(pipeline, "bake_measured", lambda *_, **__: None)
    monkeypatch.setattr(pipeline, "load_calibrated", lambda *_, **__: None)
    monkeypatch.setattr(pipeline, "run_sweep", stop)
    calibration = SimpleNamespace(select=lambda split, label=None: (split, label))
    plan = SimpleNamespace(calibration=calibration, layers=None, output=tmp_path, recipe=None, dtype="auto", device_map=None)
    with pytest.raises(KeyboardInterrupt):
        pipeline.swept(plan, None, pipeline.Clock(lambda *_: None), None)
    assert seen == [("held_out", None), True]


def test_candidates():
    assert [c.layers for c in candidates((3, 4, 5), vary_layers=False)] == [(3, 4, 5)] * len(STRENGTHS)
    assert {c.layers for c in candidates((3, 4, 5), vary_layers=True)} == {(3, 4, 5), (4, 5), (3,)}
    assert {c.layers for c in candidates((3,), vary_layers=True)} == {(3,)}


def test_the_demo_s_sweep_is_in_the_report(tmp_path):
    """On a third of the rows that are held out: it is replies to these that take the time."""
    plan = make_plan("demo", ExportOptions.of(output=tmp_path / "out", strength="auto"))
    third = plan.calibration.select("held_out")[::3]
    assert min(sum(r.label == label for r in third) for label in ("safe", "unsafe")) >= 10
    rows = (*plan.calibration.select("fit"), *third)
    done = export(replace(plan, calibration=replace(plan.calibration, rows=rows)))
    report = json.loads((tmp_path / "out" / "shiftdc_report.json").read_text())
    sweep = report["sweep"]
    assert sweep["base"]["strength"] == 0
    assert sweep["base"]["asr"] >= 0.9
    assert sweep["chosen"]["asr"] <= 0.1
    assert sweep["chosen"] in sweep["candidates"]
    assert len(sweep["candidates"]) == 3 * len(STRENGTHS)
    assert all(c["kl"] >= 0 for c in sweep["candidates"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["shiftdc"]
    assert (config["layers"], config["strength"]) == (sweep["chosen"]["layers"], sweep["chosen"]["strength"])
    assert done.report.recipe.strength == sweep["chosen"]["strength"]
    verify(tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_model_that_refuses_nothing_cannot_be_swept(base_folder, calibration_file, tmp_path):
    plan = make_plan(
        str(base_folder),
        ExportOptions.of(output=tmp_path / "out", strength="auto", layers="1-2", calibration=str(calibration_file)),
    )
    with pytest.raises(InputError, match="no candidate lowers attack success"):
        export(plan)
    assert list(tmp_path.iterdir()) == []
