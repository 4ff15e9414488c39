"""Ways of doing the same thing, timed in turns in one process, so that a machine's other load meets them all alike."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results"


def one_thread() -> None:
    """Ratios on one thread do not depend on what else a machine with few cores does."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def seconds(ways: Mapping[str, Callable[[], Any]], rounds: int, warm: bool = True) -> dict[str, list[float]]:
    """Seconds of every way in every round; the order turns, so that none always follows the same one.

    On one CPU thread these are seconds of CPU time: waiting while other processes run does not count.
    """
    clock = time.perf_counter if torch.cuda.is_available() or torch.get_num_threads() > 1 else time.process_time
    found: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for round_ in range(rounds + warm):
        turn = round_ % len(names)
        for name in [*names[turn:], *names[:turn]]:
            start = clock()
            ways[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_ or not warm:
                found[name].append(clock() - start)
    return found


def ratio(one: list[float], other: list[float]) -> float:
    """Median over rounds of one's time over the other's."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


#: Of mallopt(3).
MMAP_THRESHOLD = -3


def give_back() -> None:
    """From here on every tensor above 64 KiB is a mapping of its own: glibc keeps none of them after it is freed.

    To be called before the heap has grown: its free parts are used first.
    """
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)


def memory(way: Callable[[], Any]) -> int:
    """Bytes of peak resident memory that `way` adds, in a fork of this process (weights are there already). Linux."""
    reader, writer = multiprocessing.get_context("fork").Pipe(duplex=False)

    def measure() -> None:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not be had for nothing
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        way()
        writer.send(_resident("VmHWM") - before)

    process = multiprocessing.get_context("fork").Process(target=measure)
    process.start()
    added = reader.recv()
    process.join()
    return added


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def row(work: str, against: str, measured: float, target: float, *, least: bool = False, unit: str = "x", note: str = "") -> dict:
    """A row of the table; `least`: the more the better."""
    met = measured >= target if least else measured <= target
    return {
        "work": work, "against": against, "measured": round(measured, 3), "target": target, "least": least, "unit": unit,
        "met": bool(met), "note": note,
    }  # fmt: skip


def write(name: str, rows: list[dict[str, Any]], **about: Any) -> None:
    """benchmarks/results/<name>.json, and the rows on stdout."""
    RESULTS.mkdir(exist_ok=True)
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "load": os.getloadavg()[0]}
    (RESULTS / f"{name}.json").write_text(json.dumps({"rows": rows, **machine, **about}, indent=2) + "\n", "utf-8")
    for found in rows:
        print(line(found), flush=True)


def line(found: dict[str, Any]) -> str:
    sign = ">=" if found["least"] else "<="
    verdict = "yes" if found["met"] else "**no**"
    figure = f"{found['measured']:.3g} {found['unit']}"
    return f"| {found['work']} | {found['against']} | {figure} | {sign} {found['target']:g} | {verdict} | {found['note']} |"
