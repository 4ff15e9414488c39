"""Frozen norms give the values that they give, in every way that norms are written, and are checked once a class."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from exporter.directions.frozen_norms import frozen_norms


class FunctionalLayerNorm(nn.Module):
    """With the function's own eps."""

    def forward(self, x):
        return torch.layer_norm(x, (8,))


class ModulatedNorm(nn.Module):
    """As diffusion and gated models have: what it scales and adds comes with each call."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x, scale, *, offset):
        self.calls += 1
        return F.rms_norm(x, (8,)) * scale + offset


def filled(norm):
    for i, parameter in enumerate(norm.parameters()):
        nn.init.uniform_(parameter, 0.5 + i, 1.5 + i, generator=torch.Generator().manual_seed(i))
    return norm


NORMS = {
    "layer": filled(nn.LayerNorm(8, eps=0.1)),
    "layer, two axes": filled(nn.LayerNorm((3, 8), eps=0.1)),
    "layer, no bias": filled(nn.LayerNorm(8, bias=False)),
    "layer, plain": nn.LayerNorm(8, elementwise_affine=False),
    "layer, function": FunctionalLayerNorm(),
    "layer, half": filled(nn.LayerNorm(8)).bfloat16(),
    "rms": filled(nn.RMSNorm(8, eps=0.1)),
    "rms, plain": nn.RMSNorm(8, elementwise_affine=False),
    "rms, half": filled(nn.RMSNorm(8)).bfloat16(),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_values_are_those_of_the_norm(norm):
    dtype = next((p.dtype for p in norm.parameters()), torch.float32)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(9)).to(dtype)
    expected = norm(x)
    with frozen_norms(nn.Sequential(norm)):
        found = norm(x)
    assert found.dtype == dtype
    assert torch.allclose(found, expected, atol=1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8)], ids=["layer", "rms"])
def test_values_that_hardly_differ_are_as_the_norm_has_them(norm):
    """There eps decides."""
    x = torch.linspace(1e-4, 8e-4, 8)[None]
    expected = norm(x)
    with frozen_norms(nn.Sequential(norm)):
        assert torch.allclose(norm(x), expected, rtol=1e-3)


def test_what_else_a_norm_is_given_reaches_it_and_a_class_is_checked_once():
    one, other, x = ModulatedNorm(), ModulatedNorm(), torch.linspace(-1, 3, 8)[None]
    expected = one(x, 2.0, offset=1.0)
    one.calls = 0
    with frozen_norms(nn.Sequential(one, other)):
        for _ in range(2):
            assert torch.allclose(one(x, 2.0, offset=1.0), expected, atol=1e-5)
            assert torch.allclose(other(x, 2.0, offset=1.0), expected, atol=1e-5)
    assert one.calls + other.calls == 4 + 1
