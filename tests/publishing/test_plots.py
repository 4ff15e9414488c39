"""Pictures: drawn from whatever was measured, the same bytes from the same numbers, nothing outside the frame."""

from __future__ import annotations

import dataclasses
import math
import subprocess

import pytest
from interpreters import python
from PIL import Image

from exporter.directions.statistics import LayerStatistics
from exporter.evaluation.defences import DEFENCES
from exporter.evaluation.projections import Projections
from exporter.evaluation.results import Results
from exporter.evaluation.results_json import read_results
from exporter.publishing import plots
from exporter.publishing.plots import PICTURES, REFERENCES, write_all

NAMES = [f.name for f in dataclasses.fields(LayerStatistics)]


def statistics(layers=8):
    return tuple(
        LayerStatistics(**dict.fromkeys(NAMES, 0.1 * i) | {"layer": i, "auroc": 0.5 + i / 20, "shift_cosine": i / 10 - 0.3})
        for i in range(layers)
    )


CHOSEN = (3, 4, 5)


def results(names=tuple(DEFENCES)):
    found = {}
    for i, name in enumerate(names):
        value = i / max(1, len(names) - 1)
        found[name] = {
            "asr": value, "asr_ci95": [0.9 * value, min(1, value + 0.03)], "over_refusal": 1 - value, "over_refusal_ci95": None,
            "cost_ratio": 1 + 0.2 * i,
        }  # fmt: skip
    return read_results({"defences": found})


POINTS = {
    "safe text": [1.0, 2.0, math.nan, 1.5],
    "unsafe text": [-1.0],
    "unsafe image before": [0.5, 0.5],
    "unsafe image after": [-1.0, -0.5],
    "empty": [],
}


def test_everything_is_drawn(tmp_path):
    files = write_all(results(), statistics(), CHOSEN, Projections(4, POINTS), tmp_path / "new" / "assets")
    assert sorted(f.name for f in files) == sorted(PICTURES)
    for file in files:
        with Image.open(file) as picture:
            assert picture.format == "PNG"
            assert picture.width == 1200  # twice the width that a card shows
            assert "Software" not in picture.info
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 2


def test_same_numbers_same_bytes(tmp_path):
    first, second = (write_all(results(), statistics(), CHOSEN, Projections(4, POINTS), tmp_path / n) for n in "ab")
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in second]


@pytest.mark.parametrize(
    ("found", "drawn"),
    [
        (read_results({}), {"layers.png"}),
        (read_results({"defences": {"direct": {"asr": None}}}), {"layers.png"}),
        (read_results({"defences": {"direct": {"asr": 0.5}}}), {"layers.png", "attack_success.png"}),
        (results(("direct", "shiftdc")), {"layers.png", "attack_success.png", "cost.png"}),
        (results(("direct", "ecso")), {"layers.png", "attack_success.png"}),
        (
            read_results({"defences": {"shiftdc": {"asr": math.nan}, "other": {"asr": 0.2, "asr_ci95": [None, 1]}}}),
            {"layers.png", "attack_success.png"},
        ),
    ],
)
def test_what_is_missing_is_left_out(found, drawn, tmp_path):
    assert {f.name for f in write_all(found, statistics(), CHOSEN, None, tmp_path)} == drawn
    assert {f.name for f in tmp_path.iterdir()} == drawn


def test_no_statistics_no_points(tmp_path):
    unknown = [dataclasses.replace(s, auroc=None, shift_cosine=math.nan) for s in statistics()]
    for found in ([], unknown):
        assert write_all(Results(), found, [], Projections(0, {"safe text": [math.nan]}), tmp_path) == []


def test_layers_take_gaps_and_a_single_layer(tmp_path):
    broken = [dataclasses.replace(s, shift_cosine=math.nan) for s in statistics()]
    plots.plot_layers(broken, [3], tmp_path / "gaps.png")
    plots.plot_layers(statistics(3)[2:], [2], tmp_path / "single.png")


def test_labels_cover_neither_each_other_nor_a_point():
    from matplotlib.text import Annotation, Text

    _, (axes,) = plots._figure(3.3)
    axes.set_xlim(0, 3)
    axes.set_ylim(-6, 106)
    points = {"no defence": (1, 100), "caption": (2.45, 2), "text": (2.3, 2), "blank image": (2.35, 2), "static": (2.4, 2)}
    plots._label_points(axes, points)
    labels = [t for t in axes.texts if isinstance(t, Annotation)]
    assert [t.get_text() for t in labels] == list(points)
    for label in labels:
        label.get_window_extent()
    boxes = [Text.get_window_extent(t) for t in labels]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(b.contains(*axes.transData.transform(p)) for b in boxes for p in points.values())


def test_the_costs_of_references_or_of_the_checkpoint():
    assert list(plots._costs(results())) == ["direct", *REFERENCES]
    assert list(plots._costs(results(("direct", "shiftdc", "ecso")))) == ["direct", "shiftdc"]
    costs = {"direct": {"asr": 1, "cost_ratio": 1}, "shiftdc": {"asr": 0, "cost_ratio": 0}}
    assert list(plots._costs(read_results({"defences": costs}))) == ["direct"]


def test_matplotlib_is_imported_when_something_is_drawn():
    code = "import sys, exporter.publishing.plots; assert not any(m.startswith('matplotlib') for m in sys.modules)"
    subprocess.run([*python(""), "-c", code], check=True)


def test_no_global_state(tmp_path):
    code = (
        "import sys, pathlib, exporter.publishing.plots as p\n"
        "p.plot_projections({'safe text': [1.0, 2.0]}, 3, pathlib.Path(sys.argv[1]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([*python(""), "-c", code, tmp_path / "a.png"], check=True)
