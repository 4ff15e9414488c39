"""How reading activations grows: seconds and memory against prompts, their length, layers, hidden size and parameters.

    python -m benchmarks.scale.scale [--rounds 2]

Writes results/scale.json and scale.png (exponents found and expected), and estimate.md: what 34B and 72B models take on paper, by
rules that are checked here on two sizes each (`spread.py`: in two processes, and with half of the layers on disk).

Expected: operations over one rate, and the tensors that one decoder layer holds for the tokens of one batch.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import matplotlib
import numpy as np
import torch

from benchmarks.scale.estimate import estimate
from benchmarks.scale.spread import spread
from benchmarks.support.models import Size, model
from benchmarks.support.side_by_side import MMAP_THRESHOLD, RESULTS, give_back, memory, one_thread, seconds, write
from exporter.directions.activations import AUTO_TOKENS, RunningMean, by_length, last_token_activations
from exporter.models.vlm import VLM

matplotlib.use("Agg")

Way = Callable[[], object]
BUDGET = AUTO_TOKENS["cpu"]
FLOAT = 4  # bytes
LEAST = 8  # tokens; a single one would be multiplied without the buffers of matrix products
#: Of mallopt(3). glibc raises both thresholds as tensors are freed, up to these limits of its own.
_TRIM_THRESHOLD = -1
_LIMIT = 32 << 20


def sized(hidden: int, layers: int) -> Size:
    """Llama's shape: heads of 64, and a gated MLP of 11/4 of the hidden size."""
    return Size(hidden=hidden, layers=layers, heads=hidden // 64, intermediate=hidden * 11 // 4, vocabulary=1024, vision_layers=2)


BASE = sized(512, 4)


@dataclass(frozen=True)
class Pass:
    """`prompts` of `length` tokens through a model of `size`."""

    size: Size = BASE
    prompts: int = 8
    length: int = 64

    @property
    def tokens(self) -> int:
        return self.prompts * self.length

    @property
    def operations(self) -> float:
        """Two a weight and token; causal attention, scores and values, over half of the prompt on average."""
        return self.tokens * (2.0 * weights(self.size) + 2.0 * self.size.layers * self.size.hidden * self.length)

    @property
    def tensors(self) -> float:
        """Bytes alive at once: three tensors of the gated MLP, four of the residual stream, and what is kept of each layer."""
        rows = min(self.prompts, max(1, BUDGET // self.length))
        alive = 3 * self.size.intermediate + 4 * self.size.hidden
        return FLOAT * rows * (self.length * alive + self.size.layers * self.size.hidden)


def weights(size: Size) -> int:
    """Parameters of the decoder layers' matrices."""
    return size.layers * (4 * size.hidden**2 + 3 * size.hidden * size.intermediate)


BEYOND = "prompt length, beyond it"
SERIES: dict[str, dict[int, Pass]] = {
    "prompts": {n: Pass(prompts=n) for n in (8, 16, 32, 64, 128)},
    f"prompt length, up to a batch ({BUDGET})": {n: Pass(length=n) for n in (64, 128, 256, 512)},
    BEYOND: {n: Pass(length=n, prompts=1) for n in (512, 1024, 2048, 4096)},
    "layers": {n: Pass(sized(512, n)) for n in (2, 4, 8, 16, 32)},
    "hidden size": {n: Pass(sized(n, 2)) for n in (512, 768, 1024, 1536, 2048)},
    # 128 of hidden size a layer, as in a 7B (4096, 32)
    "parameters": {weights(size): Pass(size) for size in (sized(n, n // 128) for n in (384, 512, 768, 1024, 1536))},
}
#: On which the rules of the estimate are checked: what the first takes foretells the second.
CHECKED = (sized(768, 6), sized(1536, 12))


@cache
def loaded(size: Size) -> VLM:
    return VLM(model(size), None)


def reading(work: Pass) -> Way:
    """As `exporter.directions` reads text prompts."""
    vlm = loaded(work.size)
    layers = list(vlm.decoder_layers)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, work.size.vocabulary, (work.prompts, work.length), generator=generator)

    def read() -> None:
        stats = RunningMean()
        for rows in by_length(range(work.prompts), [work.length] * work.prompts, None, torch.device("cpu")):
            mask = torch.ones(len(rows), work.length, dtype=torch.long)
            stats.update(last_token_activations(vlm, layers, {"input_ids": ids[rows], "attention_mask": mask}))

    return read


def keep() -> None:
    """From here on glibc keeps freed tensors for later ones, as far as it goes by itself where nothing is set."""
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, _LIMIT)
    ctypes.CDLL(None).mallopt(_TRIM_THRESHOLD, 2 * _LIMIT)


def keeping(way: Way) -> Way:
    def run() -> None:
        keep()
        way()

    return run


def apart(ways: dict[str, Way], rounds: int) -> list[float]:
    """Median seconds of each way, found in a fork: this process, of which memory is measured, stays as small as it is."""
    reader, writer = multiprocessing.get_context("fork").Pipe(duplex=False)

    def measure() -> None:
        keep()
        writer.send([statistics.median(s) for s in seconds(ways, rounds).values()])

    process = multiprocessing.get_context("fork").Process(target=measure)
    process.start()
    found = reader.recv()
    process.join()
    return found


def above_least(work: Pass) -> dict[str, int]:
    """Peak bytes above the weights, less those of a pass of eight tokens: libraries' pages, and buffers of matrix products."""
    way, least = reading(work), reading(replace(work, prompts=1, length=LEAST))
    fixed = memory(least)
    return {
        "fixed": fixed,
        "resident": memory(keeping(way)) - memory(keeping(least)),
        "tensors_alone": memory(way) - fixed,
    }


def fit(values: Sequence[float], found: Sequence[float], expected: Sequence[float]) -> dict[str, float]:
    """A straight line through the logarithms. scatter: root mean square of found / line - 1; r2 says nothing of a flat line."""
    x, y = np.log(values), np.log(found)
    slope, start = np.polyfit(x, y, 1)
    rest = y - (slope * x + start)
    return {
        "exponent": round(float(slope), 3),
        "expected_exponent": round(float(np.polyfit(x, np.log(expected), 1)[0]), 3),
        "r2": round(float(1 - (rest**2).sum() / ((y - y.mean()) ** 2).sum()), 4),
        "scatter": round(float(np.expm1(np.sqrt((rest**2).mean()))), 4),
        "at_1": float(np.exp(start)),
    }


def measured(steps: dict[int, Pass], rounds: int) -> dict[str, Any]:
    """One series. The rate of the expected seconds is the median over it; expected bytes have no free number."""
    values = list(steps)
    found = apart({str(n): reading(work) for n, work in steps.items()}, rounds)
    bytes_ = [above_least(work) for work in steps.values()]
    rate = statistics.median(work.operations / s for work, s in zip(steps.values(), found, strict=True))
    expected = {
        "seconds": [work.operations / rate for work in steps.values()],
        "bytes": [work.tensors for work in steps.values()],
    }
    columns = {kind: [b[kind] for b in bytes_] for kind in bytes_[0]}
    return {
        "values": values, "seconds": found, "bytes": columns, "operations_a_second": rate, "expected": expected,
        "fit": {
            "seconds": fit(values, found, expected["seconds"]),
            "tensors_alone": fit(values, columns["tensors_alone"], expected["bytes"]),
            "resident": fit(values, columns["resident"], expected["bytes"]),
        },
    }  # fmt: skip


def check(rounds: int) -> dict[str, Any]:
    """What the smaller size foretells of the larger, over what was found there: reading by operations, a decode step by bytes.

    `calls`: seconds of a step through as many layers of next to no weights, which a GPU's rate has no part in.
    """
    ratio = weights(CHECKED[1]) / weights(CHECKED[0])
    small, large = apart({str(size): reading(Pass(size)) for size in CHECKED}, rounds)
    result: dict[str, Any] = {"parameters": [weights(size) for size in CHECKED]}
    result["reading"] = {"seconds": [small, large], "foretold_over_found": small * ratio / large}
    steps = (*CHECKED, *(sized(64, size.layers) for size in CHECKED))
    small, large, *calls = apart({str(size): reading(Pass(size, 1, 1)) for size in steps}, 4 * rounds)
    foretold = {
        "foretold_over_found": small * ratio / large,
        "foretold_over_found_with_calls": ((small - calls[0]) * ratio + calls[1]) / large,
    }
    result["decode step"] = {"seconds": [small, large], "calls": calls, **foretold}
    return result


def attention(size: Size, lengths: Sequence[int], rounds: int) -> list[float]:
    """Seconds of the scores and values alone, in all layers, of one prompt of each length."""

    def way(length: int) -> Way:
        states = torch.randn(1, size.heads, length, size.hidden // size.heads)
        return lambda: [
            torch.nn.functional.scaled_dot_product_attention(states, states, states, is_causal=True) for _ in range(size.layers)
        ]

    return apart({str(n): way(n) for n in lengths}, 4 * rounds)


def plot(result: dict[str, Any]) -> None:
    """Time above, memory below; points found, their fitted line, and what was expected dotted."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(result), figsize=(3.6 * len(result), 7), sharey="row", constrained_layout=True)
    for (upper, lower), (variable, found) in zip(axes.T, result.items(), strict=True):
        values = found["values"]
        _line(upper, values, found["seconds"], found["fit"]["seconds"], "o", "tab:blue", "found")
        upper.plot(values, found["expected"]["seconds"], "k:", lw=1.2, label=_expected(found["fit"]["seconds"], "operations"))
        for kind, marker, colour, words in (
            ("resident", "s", "tab:orange", "resident"),
            ("tensors_alone", "^", "tab:green", "tensors alone"),
        ):
            _line(lower, values, [b / 1e6 for b in found["bytes"][kind]], found["fit"][kind], marker, colour, words, 1e-6)
        expected = [b / 1e6 for b in found["expected"]["bytes"]]
        lower.plot(values, expected, "k:", lw=1.2, label=_expected(found["fit"]["resident"], "tensors"))
        for axis in (upper, lower):
            axis.set(xscale="log", yscale="log")
            axis.set_xticks(values, [_short(v) for v in values])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7.5, loc="upper left")
        lower.set_xlabel(variable)
    for axis, words in ((axes[0, 0], "seconds, one thread"), (axes[1, 0], "peak MB above weights and an 8-token pass")):
        axis.set_ylabel(words)
        low, high = axis.get_ylim()
        axis.set_ylim(low, high * (high / low) ** 0.35)  # room for the legends
        ticks = [m * 10.0**e for e in range(-2, 4) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    figure.savefig(RESULTS / "scale.png", dpi=110)


def _line(
    axis: Any, values: Sequence[int], found: Sequence[float], fitted: dict[str, float], marker: str, colour: str, words: str,
    unit: float = 1.0,
) -> None:  # fmt: skip
    quality = f"R² {fitted['r2']:.3f}, " if abs(fitted["exponent"]) >= 0.1 else ""  # of a flat line it says nothing
    label = f"{words}: n^{round(fitted['exponent'], 2) + 0.0:.2f}, {quality}scatter {fitted['scatter']:.1%}"
    axis.plot(values, found, marker, color=colour, ms=5, label=label)
    axis.plot(values, [unit * fitted["at_1"] * v ** fitted["exponent"] for v in values], "-", color=colour, lw=1, alpha=0.7)


def _expected(fitted: dict[str, float], what: str) -> str:
    return f"expected of {what}: n^{round(fitted['expected_exponent'], 2) + 0.0:.2f}"


def _short(value: int) -> str:
    return f"{value / 1e6:.0f}M" if value >= 1_000_000 else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    one_thread()
    give_back()
    result = {}
    for variable, steps in SERIES.items():
        result[variable] = measured(steps, arguments.rounds)
        for kind, found in result[variable]["fit"].items():
            print(f"{variable}: {kind} ~ n^{found['exponent']}, expected {found['expected_exponent']}, "
                  f"R2 {found['r2']}, scatter {found['scatter']:.1%}", flush=True)  # fmt: skip
        loaded.cache_clear()
        gc.collect()
    plot(result)
    checked = check(arguments.rounds) | {"attention": attention(BASE, list(SERIES[BEYOND]), arguments.rounds)}
    loaded.cache_clear()
    gc.collect()
    print(checked, flush=True)
    spreading = spread()
    print(spreading, flush=True)
    write("scale", [], scale=result, check=checked, spread=spreading)
    (RESULTS / "estimate.md").write_text(estimate(result, checked, spreading), "utf-8")


if __name__ == "__main__":
    main()
