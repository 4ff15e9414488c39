"""Several processes of one run (`torchrun --nproc-per-node N -m exporter ...`).

What they exchange are last-token activations, on the CPU and a few hundred kilobytes a batch: gloo carries them whatever device
computed them. The first rank alone prints and writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TypeVar

from exporter.errors import ShiftDCError

T = TypeVar("T")
#: A dead rank is noticed by torchrun at once; this only bounds how long the others may have to wait for a slow one.
TIMEOUT = timedelta(hours=12)


@dataclass(frozen=True)
class Ranks:
    """This process's rank among `world_size`; by default it is alone."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def gather(self, compute: Callable[[], T]) -> list[T]:
        """What every rank computed, by rank, on all of them. An error of this package on one is raised on all."""
        if self.world_size == 1:
            return [compute()]
        import torch.distributed as dist

        found: list[tuple[T | None, ShiftDCError | None]] = [(None, None)] * self.world_size
        try:
            dist.all_gather_object(found, _attempt(compute))
        except RuntimeError:  # gloo: connection closed by peer
            raise ShiftDCError("Another process of this run ended; its message stands above.") from None
        for _, error in found:
            if error is not None:
                raise error
        return [value for value, _ in found]  # type: ignore[misc]  # None only beside an error

    def broadcast(self, compute: Callable[[], T]) -> T:
        """What the first rank computed, on all of them."""
        return self.gather(compute if self.is_main else _nothing)[0]  # type: ignore[return-value]

    @contextmanager
    def on_main(self, context: AbstractContextManager[T]) -> Iterator[T]:
        """The context entered and left by the first rank alone; what it gives, on all of them."""
        with ExitStack() as stack:
            yield self.broadcast(partial(stack.enter_context, context))


def _nothing() -> None:
    """What the other ranks compute meanwhile."""


def _attempt(compute: Callable[[], T]) -> tuple[T | None, ShiftDCError | None]:
    try:
        return compute(), None
    except ShiftDCError as error:
        return None, error


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that prints, also before and after `joined`."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process among those that torchrun started, each with a GPU of its own where there are any."""
    if world_size() == 1:
        yield Ranks()
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
