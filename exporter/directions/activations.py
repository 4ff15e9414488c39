"""Last-token activations of decoder layers, streamed: no other token's hidden state is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch
from torch import nn

from exporter.models.hooks import hooked
from exporter.models.vlm import VLM, Inputs

#: Padded tokens in one automatic batch: keeps a CPU's caches and a GPU busy without holding many activations.
AUTO_TOKENS = {"cpu": 512, "cuda": 16384}

T = TypeVar("T")


class RunningMean:
    """The mean of activations [layers, hidden] that come in batches, float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())

    def update(self, activations: torch.Tensor) -> None:
        """Add `activations` [batch, layers, hidden] of any dtype."""
        batch = RunningMean()
        batch.count, batch.mean = len(activations), activations.double().mean(0)
        self.merge(batch)

    def merge(self, other: RunningMean) -> None:
        if not other.count:
            return
        if not self.count:
            self.count, self.mean = other.count, other.mean
            return
        self.count += other.count
        self.mean = self.mean + (other.mean - self.mean) * (other.count / self.count)


class _LastLayerReachedError(Exception):
    """Ends a forward pass after the last layer that is needed."""


@contextmanager
def recording(
    vlm: VLM, layers: Sequence[nn.Module], position: torch.Tensor, stop_early: bool = False
) -> Iterator[list[torch.Tensor]]:
    """Hooks that append each layer's output at `position` [batch], float32 on the CPU; gone afterwards, whatever happens."""
    recorded: list[torch.Tensor] = []
    rows = torch.arange(len(position))

    def record(number: int, hidden: torch.Tensor) -> None:
        recorded.append(hidden[rows.to(hidden.device), position.to(hidden.device)].float().cpu())
        if stop_early and number == len(layers) - 1:
            raise _LastLayerReachedError

    with hooked(layers, record, vlm.traits.stream_axis):
        yield recorded


@torch.no_grad()
def last_token_activations(vlm: VLM, layers: Sequence[nn.Module], inputs: Inputs) -> torch.Tensor:
    """Activations after each of `layers` at the last prompt token: float32 [batch, layers, hidden], on the CPU.

    Works for any padding side. Runs the backbone without its head, and nothing behind the last of `layers`
    (arXiv:2502.13095, section 3: x_l(t)).
    """
    position = last_token(inputs["attention_mask"])
    stop_early = not hasattr(vlm.model, "hf_device_map")  # accelerate's hooks must see the whole pass
    with recording(vlm, layers, position, stop_early) as recorded, suppress(_LastLayerReachedError):
        vlm.backbone(inputs)
    return torch.stack(recorded, dim=1)


def last_token(mask: torch.Tensor) -> torch.Tensor:
    """int64 [batch]: the last nonzero position of `mask` [batch, time]."""
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(-1)


def by_length(items: Iterable[T], lengths: Sequence[int], batch_size: int | None, device: torch.device) -> list[list[T]]:
    """Batches of items of similar length: `batch_size` items each, or as many as fit the automatic token budget."""
    ordered = sorted(zip(lengths, items, strict=True), key=lambda pair: pair[0])
    budget = AUTO_TOKENS.get(device.type, AUTO_TOKENS["cpu"])
    batches: list[list[T]] = []
    for length, item in ordered:
        # ascending lengths: the new item sets the padded width
        full = not batches or len(batches[-1]) >= (batch_size or max(1, budget // length))
        if full:
            batches.append([])
        batches[-1].append(item)
    return batches
