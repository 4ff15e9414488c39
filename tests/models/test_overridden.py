"""Settings that are changed for a while, and hooks that see layers for a while: nothing of either is left."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from exporter.modeling.modeling_shiftdc import ShiftDCCorrection
from exporter.models.hooks import hooked
from exporter.models.overridden import overridden


@pytest.fixture
def model():
    corrections = [ShiftDCCorrection(4, column, 0.5, True, column, "") for column in range(2)]
    for column, correction in enumerate(corrections):
        correction.direction.zero_()[column] = 1
        correction.shift.fill_(column)
    return SimpleNamespace(
        config=SimpleNamespace(shiftdc={"gate": "one-sided", "reference": "text"}), shiftdc_corrections=corrections
    )


def state(model):
    corrections = [(c.direction.tolist(), c.shift.item(), c.one_sided, c.strength) for c in model.shiftdc_corrections]
    return dict(model.config.shiftdc), corrections


def test_what_is_set_meanwhile_is_undone_even_after_an_error(model):
    before = state(model)
    with pytest.raises(KeyboardInterrupt), overridden(model, {"gate": "two-sided", "reference": "static"}) as corrections:
        assert model.config.shiftdc == {"gate": "two-sided", "reference": "static"}
        assert not any(c.one_sided for c in model.shiftdc_corrections)
        for correction in corrections:
            correction.direction.neg_()
            correction.shift.fill_(9)
            correction.one_sided, correction.strength = True, 2.0
        assert state(model)[1] != before[1]
        raise KeyboardInterrupt
    assert state(model) == before


def test_nothing_changes_where_nothing_is_asked(model):
    before = state(model)
    with overridden(model):
        assert state(model) == before


class InTuple(nn.Linear):
    """As the decoder layers of some families."""

    def forward(self, x):
        return super().forward(x), "attention"


@pytest.mark.parametrize("kind", [nn.Linear, InTuple])
def test_hooks_see_each_layer_and_may_replace_what_it_puts_out(kind):
    layers, x, seen = [kind(3, 3), kind(3, 3)], torch.ones(1, 3), []
    plain = [layer(x) for layer in layers]

    def double(number, hidden):
        seen.append(number)
        return 2 * hidden if number == 1 else None

    with pytest.raises(KeyboardInterrupt), hooked(layers, double):
        first, second = (layer(x) for layer in layers)
        raise KeyboardInterrupt
    assert seen == [0, 1]
    if kind is InTuple:
        assert (first[1], second[1]) == ("attention", "attention")
        first, second, plain = first[0], second[0], [p[0] for p in plain]
    assert torch.equal(first, plain[0])
    assert torch.equal(second, 2 * plain[1])
    assert not any(layer._forward_hooks for layer in layers)
