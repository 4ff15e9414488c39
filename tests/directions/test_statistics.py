"""Statistics of decoder layers, against figures made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from exporter.directions.statistics import LayerStatistics, auroc, cosines, rounded, separation, separations

SAFE = torch.tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]])
UNSAFE = torch.tensor([[2.0, 0.0], [0.0, 4.0]])


def statistics(norm=2.0, gradient=None):
    return LayerStatistics(3, norm, None, 1 / 3, None, 2 / 3, None, -1 / 3, None, 1.25e-7, None, 1e-3, gradient)


def test_a_step_is_the_way_between_the_means_or_worth_one_nat_of_refusal():
    assert statistics(norm=2.0, gradient=0.25).step == 2
    assert statistics(norm=None, gradient=0.25).step == 4
    assert statistics(norm=None, gradient=0.0).step == statistics(norm=None).step == pytest.approx(1e6)


def test_separations_layer_by_layer():
    found = separations({"safe": SAFE, "unsafe": UNSAFE}, 2)
    assert found["auroc"] == [4.5 / 6, 2 / 6]
    assert found["separation"] == pytest.approx([2 / math.sqrt((7 + 2) / 2), -1 / math.sqrt((3 + 8) / 2)])


def test_separations_of_too_few_rows_are_not_known():
    nothing = [None, None]
    for held_out in ({}, {"safe": SAFE}, {"unsafe": UNSAFE}):
        assert separations(held_out, 2) == {"auroc": nothing, "separation": nothing}
    for held_out in ({"safe": SAFE, "unsafe": UNSAFE[:1]}, {"safe": SAFE[2:], "unsafe": UNSAFE}):
        found = separations(held_out, 2)
        assert None not in found["auroc"]
        assert found["separation"] == nothing
    assert None not in separations({"safe": SAFE[:2], "unsafe": UNSAFE[:2]}, 2)["separation"]


def test_labels_of_other_layers_cannot_be_compared():
    with pytest.raises(ValueError, match="longer"):
        separations({"safe": SAFE[:, :1], "unsafe": UNSAFE}, 2)


def test_values_that_do_not_vary_are_far_apart_and_no_error():
    assert separation(torch.ones(2), torch.zeros(2)) == pytest.approx(1e12)


def test_ties_of_auroc_count_half():
    assert auroc(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0])) == 0.5
    assert auroc(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0])) == pytest.approx(2 / 3, abs=1e-12)


def test_cosines_are_of_rows():
    assert cosines(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 1.0], [-2.0, -2.0]])) == pytest.approx([0, -1])


def test_statistics_are_reported_with_six_decimals():
    (layer,) = rounded([statistics()])
    assert (layer.layer, layer.norm, layer.auroc, layer.separation) == (3, 2.0, None, 0.333333)
    assert (layer.text_safe, layer.image_safe, layer.shift, layer.blank_shift) == (0.666667, -0.333333, 0.0, 0.001)
