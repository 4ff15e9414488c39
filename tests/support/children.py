"""Copies of the test's process that do something and end, or are killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import torch


def child(work: Callable[[int], None]) -> tuple[int, int]:
    """A copy of this process that does `work(a pipe's end to write to)`: (process id, the other end)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(300)
        try:
            torch.set_num_threads(torch.get_num_threads())  # makes PyTorch's own threads anew, which two threads at once cannot
            work(writing)
        finally:
            os._exit(0)
    os.close(writing)
    return pid, reading


def answer(pid: int, reading: int) -> tuple[int, str]:
    """(status, what it wrote) of a child that has ended; the status of a killed one is negative."""
    with os.fdopen(reading) as stream:
        text = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text
