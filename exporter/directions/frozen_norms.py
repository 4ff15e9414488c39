"""Backward passes through normalisation layers as if these were fixed linear maps.

A norm's own derivative takes out the part of a gradient that would only change the activation's length, and with depth that
part grows. With its statistics held constant a norm is `x -> scale * x + offset`, and gradients keep their direction.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from exporter.errors import InputError

_NAMES = ("mean", "var", "std", "norm", "rsqrt", "sqrt")
_STATISTICS = {torch.linalg.vector_norm, *(getattr(owner, name) for owner in (torch, torch.Tensor) for name in _NAMES)}


class _StatisticsConstant(TorchFunctionMode):
    """No gradient flows through means, variances and lengths."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Collection[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in (F.layer_norm, torch.layer_norm):
            return _layer_norm(*args, **kwargs)
        if func in (F.rms_norm, torch.rms_norm):
            return _rms_norm(*args, **kwargs)
        result = func(*args, **kwargs)
        return result.detach() if func in _STATISTICS else result


def _layer_norm(
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> torch.Tensor:
    """`layer_norm` in pieces, because the fused one has no statistics to hold."""
    axes = tuple(range(-len(shape), 0))
    centred = x.float() - x.detach().float().mean(axes, keepdim=True)
    return _scaled(centred, axes, weight, bias, eps).to(x.dtype)


def _rms_norm(
    x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    axes = tuple(range(-len(shape), 0))
    return _scaled(x.float(), axes, weight, None, torch.finfo(x.dtype).eps if eps is None else eps).to(x.dtype)


def _scaled(
    x: torch.Tensor, axes: tuple[int, ...], weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    x = x * torch.rsqrt(x.detach().square().mean(axes, keepdim=True) + eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


@contextmanager
def frozen_norms(model: nn.Module) -> Iterator[None]:
    """Norms of `model` with constant statistics in the backward pass; the forward pass gives what it gives. Undone afterwards.

    Norms are the modules without children whose class name holds "Norm". Raises InputError where there is none, and in the
    forward pass where one has statistics that are computed in a way that is not known here.
    """
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower() and next(m.children(), None) is None]
    if not norms:
        raise InputError("MODEL: it has no normalisation layers that are known here; use a calibration set with unsafe rows.")
    kept = [(m, m.__dict__.get("forward")) for m in norms]  # accelerate puts one on the instance
    checked: set[type] = set()
    try:
        for module in norms:
            module.forward = _frozen(module.forward, type(module), checked)
        yield
    finally:
        for module, forward in kept:
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


def _frozen(forward: Callable[..., torch.Tensor], kind: type, checked: set[type]) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        with _StatisticsConstant():
            if kind not in checked:
                _check(lambda x: forward(x, *args, **kwargs), x, kind)
                checked.add(kind)
            return forward(x, *args, **kwargs)

    return run


@torch.enable_grad()
def _check(norm: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, kind: type) -> None:
    """With constant statistics the derivative is diagonal: J v = (J 1) * v. Raises InputError."""
    x = x.detach().requires_grad_()
    y = norm(x)
    v = torch.linspace(-1, 2, y.shape[-1], dtype=y.dtype, device=y.device).expand_as(y)
    ones, found = (torch.autograd.grad(y, x, g, retain_graph=True)[0].float() for g in (torch.ones_like(y), v))
    if not torch.allclose(found, ones * v.float(), rtol=0.05, atol=1e-3 * ones.abs().max().item()):
        raise InputError(
            f"MODEL: the statistics of its {kind.__name__} cannot be held constant; use a calibration set with unsafe rows."
        )
