"""`--strength auto`."""

from __future__ import annotations

import json

import pytest

from exporter.errors import InputError
from exporter.intervals import Share
from exporter.pipeline import export, make_plan
from exporter.sweep import STRENGTHS, Candidate, Measured, candidates, choose
from exporter.verify import verify


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


def test_candidates():
    assert [c.layers for c in candidates((3, 4, 5), vary_layers=False)] == [(3, 4, 5)] * len(STRENGTHS)
    assert {c.layers for c in candidates((3, 4, 5), vary_layers=True)} == {(3, 4, 5), (4, 5), (3,)}
    assert {c.layers for c in candidates((3,), vary_layers=True)} == {(3,)}


def test_the_demo_s_sweep_is_in_the_report(tmp_path):
    done = export(make_plan("demo", output=tmp_path / "out", strength="auto"))
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
    assert done.report["recipe"]["strength"] == sweep["chosen"]["strength"]
    verify(tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_model_that_refuses_nothing_cannot_be_swept(base_folder, calibration_file, tmp_path):
    plan = make_plan(str(base_folder), output=tmp_path / "out", strength="auto", layers="1-2", calibration=str(calibration_file))
    with pytest.raises(InputError, match="no candidate lowers attack success"):
        export(plan)
    assert list(tmp_path.iterdir()) == []
