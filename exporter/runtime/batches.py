"""Runs batches: split over ranks, kept on disk, and in halves where memory runs out."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Generic, TypeVar

import torch

from exporter.errors import InputError
from exporter.runtime.ranks import Ranks
from exporter.runtime.store import Store

Item = TypeVar("Item")
Value = TypeVar("Value")
#: A function from indices to a tensor with one row for each.
Compute = Callable[[list[int]], torch.Tensor]


class Batches:
    """Computes batches in an order that depends on nothing, so that sums over them come out the same, bit for bit.

    Every rank computes its share and gets all results: the statistics that are made of them are the same on all ranks, for any
    number of ranks, and after an interruption.
    """

    def __init__(self, ranks: Ranks | None = None, store: Store | None = None) -> None:
        self.ranks = ranks or Ranks()
        self.store = store or Store()
        self._stages: Counter[str] = Counter()

    def run(self, stage: str, batches: Sequence[list[int]], compute: Compute) -> Iterator[tuple[list[int], torch.Tensor]]:
        """(indices, what `compute` gives for them) of every batch, in order. Raises InputError if one row is too much."""
        self._stages[stage] += 1
        name = f"{stage}-{self._stages[stage]}"
        shrinking = ShrinkingBatches(compute)
        size = self.ranks.world_size
        for start in range(0, len(batches), size):
            turn = batches[start : start + size]  # one batch a rank
            names = [f"{name}-{start + i:05d}" for i in range(len(turn))]
            kept = self.ranks.broadcast(partial(self._kept, names, turn))
            computed = self.ranks.gather(partial(self._mine, shrinking, turn, kept))
            for indices, batch_name, old, new in zip(turn, names, kept, computed, strict=False):
                value = old if old is not None else new
                assert value is not None
                if old is None and self.ranks.is_main:
                    self.store.put(batch_name, value)
                yield indices, value

    def _kept(self, names: Sequence[str], turn: Sequence[list[int]]) -> list[torch.Tensor | None]:
        values = [self.store.get(name) for name in names]
        return [v if v is not None and len(v) == len(b) else None for v, b in zip(values, turn, strict=True)]

    def _mine(
        self, shrinking: ShrinkingBatches[int, torch.Tensor], turn: Sequence[list[int]], kept: Sequence[torch.Tensor | None]
    ) -> torch.Tensor | None:
        rank = self.ranks.rank
        if rank >= len(turn) or kept[rank] is not None:
            return None
        return torch.cat([value for _, value in shrinking(turn[rank])])


class ShrinkingBatches(Generic[Item, Value]):
    """A computation that halves its batches until they fit, and remembers what fits."""

    def __init__(self, compute: Callable[[list[Item]], Value]) -> None:
        self.compute = compute
        self.limit: int | None = None

    def __call__(self, items: list[Item]) -> Iterator[tuple[list[Item], Value]]:
        """(items, what `compute` gives for them), part by part. Raises InputError if one item is too much."""
        rest = items
        while rest:
            part = rest[: self.limit]
            found = self._tried(part)
            if not found:
                self.limit = len(part) // 2
                release()
                continue
            yield part, found[0]
            rest = rest[len(part) :]

    def _tried(self, part: list[Item]) -> list[Value]:
        """Empty where memory ran out; by then nothing holds on to what the attempt had allocated."""
        try:
            return [self.compute(part)]
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(part) == 1:
                raise InputError(
                    "MODEL: one prompt does not fit into memory beside the weights; "
                    "try --dtype bfloat16, --device-map auto or, where there is one, --load-in-4bit."
                ) from None
        return []


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    texts = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)


def release() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
