"""What 34B and 72B models take on paper, on one GPU and several. Arithmetic, and the checks of its rules that `scale.py` made."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exporter.data.calibration_sets import load_calibration
from exporter.directions.activations import AUTO_TOKENS
from exporter.directions.fit import BLANK_IMAGES, image_rows
from exporter.models.footprint import QUANTISED

#: bfloat16 FLOP/s and bytes/s of an A100-80GB, and the share of them that large matrix products and decode steps reach.
FLOPS, BYTES, SHARE_FLOPS, SHARE_BYTES = 312e12, 2.0e12, 0.5, 0.6
GPU = 80e9
BF16 = 2
TEXT_TOKENS, IMAGE_TOKENS, CAPTION, ANSWER = 110, 2880, 64, 64
GPUS, NODES = (1, 2, 4, 8), (1, 2, 4)


@dataclass(frozen=True)
class Large:
    """What the arithmetic needs of a published model: its config.json, and its parameters with vision encoder."""

    name: str
    parameters: float
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    key_value: int  # heads times head size

    @property
    def weights(self) -> float:
        return BF16 * self.parameters

    @property
    def four_bits(self) -> float:
        """`--load-in-4bit`: embeddings and head stay as they are."""
        whole = 2 * self.vocabulary * self.hidden
        return BF16 * whole + QUANTISED[4] * (self.parameters - whole)

    @property
    def activations(self) -> float:
        """Of the layer that runs, for one batch, as `--dry-run` counts them."""
        return BF16 * AUTO_TOKENS["cuda"] * (8 * self.hidden + 3 * self.intermediate)

    @property
    def cache(self) -> float:
        """KV cache of one reply: keys and values of every layer."""
        return BF16 * 2 * self.layers * self.key_value * (IMAGE_TOKENS + TEXT_TOKENS + CAPTION + ANSWER)

    @property
    def statistics(self) -> float:
        """Four running means and sums of squares (two labels, two halves), float64."""
        return 4 * 2 * 8 * self.layers * self.hidden

    @property
    def read(self) -> float:
        """Seconds a token."""
        return 2 * self.parameters / (FLOPS * SHARE_FLOPS)

    @property
    def step(self) -> float:
        """Seconds a decode step."""
        return self.weights / (BYTES * SHARE_BYTES)

    @property
    def plain(self) -> float:
        return (IMAGE_TOKENS + TEXT_TOKENS) * self.read + ANSWER * self.step

    @property
    def exact(self) -> float:
        """The caption's decoding and request, and the text-only pass, come on top: the image is read once."""
        return self.plain + CAPTION * self.step + 2 * TEXT_TOKENS * self.read

    def a_gpu(self, gpus: int) -> float:
        return self.weights / gpus + self.activations + self.cache / gpus


LARGE = (
    Large("LLaVA-1.6-34B", 34.8e9, 60, 7168, 20480, 64064, 8 * 128),
    Large("LLaVA-OneVision-72B", 73.2e9, 80, 8192, 29568, 152064, 8 * 128),
)


def prompts() -> tuple[int, int]:
    """Prompts without and with an image that directions of the built-in set take."""
    rows = load_calibration("builtin")
    pictures, blanks = len(image_rows(rows)), 2 * BLANK_IMAGES
    return len(rows.rows) + pictures + blanks, pictures + blanks


def estimate(series: dict[str, Any], checked: dict[str, Any], spreading: list[dict[str, Any]]) -> str:
    """Markdown."""
    text, image = prompts()
    tokens = text * TEXT_TOKENS + image * (IMAGE_TOKENS + TEXT_TOKENS)
    parts = [
        ["# On paper: 34B and 72B"], _assumptions(text, image, tokens), _growth(series, checked["attention"]),
        _checks(checked, spreading), _device_map(tokens), _torchrun(tokens), _replies(),
    ]  # fmt: skip
    return "\n\n".join(_wrapped(block) for part in parts for block in part) + "\n"


def _wrapped(block: str) -> str:
    """A paragraph or a list item in lines; headings and tables as they are."""
    if block.startswith(("#", "|")):
        return block
    return textwrap.fill(block, 128, break_on_hyphens=False, subsequent_indent="  " if block.startswith("- ") else "")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def _assumptions(text: int, image: int, tokens: int) -> list[str]:
    return [
        "Written by `python -m benchmarks.scale.scale`. Neither model was run: **every number under a heading that says "
        "arithmetic is arithmetic**, by rules that were checked on small models (below). What the measurements look like: "
        "[picture](scale.png).",
        "Assumptions:",
        f"- GPUs are A100s of 80 GB: 312 TFLOP/s in bfloat16, of which matrix products reach {SHARE_FLOPS:.0%}; 2 TB/s, of which "
        f"decode steps reach {SHARE_BYTES:.0%}.",
        "- Reading costs 2 operations a parameter and token, and nothing else counts: not attention's scores (at "
        f"{IMAGE_TOKENS} tokens {_attention():.0%} more), not the vision encoder (about 1 %), not loading, nor what travels "
        "between "
        "GPUs and nodes.",
        "- A decode step reads every weight once.",
        f"- Directions of the built-in set read {text} prompts of text alone, {TEXT_TOKENS} tokens each, and {image} with an "
        "image "
        f"of {IMAGE_TOKENS} tokens besides: {tokens / 1e3:.0f} thousand tokens, of which images are "
        f"{image * IMAGE_TOKENS / tokens:.0%}. The answer has {ANSWER} tokens and the caption {CAPTION}.",
        f"- Activations are one decoder layer's, for a batch of {AUTO_TOKENS['cuda']} tokens: 8 hidden + 3 intermediate "
        "numbers of "
        "two bytes a token, as `--dry-run` counts them.",
        "- GB are 10^9 bytes. CUDA's context takes a part of each GPU that is not in the tables.",
    ]


def _attention() -> float:
    """Causal scores and values over the decoder's products, of a prompt of IMAGE_TOKENS; the larger of the two models."""
    return max(m.layers * m.hidden * IMAGE_TOKENS / m.parameters for m in LARGE)


def _growth(series: dict[str, Any], attention: list[float]) -> list[str]:
    rows = [
        [name, f"{found['values'][0]} to {found['values'][-1]}",
         *(_exponent(found["fit"][kind]) for kind in ("seconds", "tensors_alone", "resident"))]
        for name, found in series.items()
    ]  # fmt: skip
    fixed = [b / 1e6 for found in series.values() for b in found["bytes"]["fixed"]]
    return [
        "## Growth (measured)",
        "On a CPU in float32, one thread, random weights. Exponents of straight lines through the logarithms: found (expected), "
        "scatter around the line, R², which says nothing where the line is flat. Expected seconds are operations over one rate; "
        "expected bytes are the tensors of one layer and one batch, with no free number. Memory is the peak above the "
        "weights, less "
        f"that of a pass of eight tokens ({min(fixed):.0f} to {max(fixed):.0f} MB: pages of libraries, buffers of matrix "
        "products).",
        _table(["against", "range", "seconds", "memory, tensors alone", "memory, resident"], rows),
        _allocator(series),
        _beyond(series["prompt length, beyond it"], attention),
    ]


def _exponent(found: dict[str, float]) -> str:
    r2 = f", R² {found['r2']:.3f}" if abs(found["exponent"]) >= 0.1 else ""
    return (
        f"{round(found['exponent'], 2) + 0.0:.2f} ({round(found['expected_exponent'], 2) + 0.0:.2f}), {found['scatter']:.1%}{r2}"
    )


def _allocator(series: dict[str, Any]) -> str:
    """What lies between tensors and resident memory."""
    pairs = [found["bytes"] for found in series.values()]
    kept = [r / a for found in pairs for r, a in zip(found["resident"], found["tensors_alone"], strict=True)]
    far = [
        a / e
        for found in series.values()
        for a, e in zip(found["bytes"]["tensors_alone"], found["expected"]["bytes"], strict=True)
    ]
    return (
        "Tensors alone: every freed tensor goes back to the system at once (glibc's mmap threshold at 64 KiB); the peak is then "
        f"{min(far):.2f} to {max(far):.2f} times what is expected. Resident: glibc keeps freed tensors for later ones, "
        "its thresholds "
        "at the limits to which it raises them by itself where nothing is set (a lower one in a short run), and the "
        "process holds "
        f"{min(kept):.2f} to {max(kept):.2f} times as much. Nothing else differs between the two columns, so the "
        "resident exponents, "
        "and their scatter, are those of the allocator's leftovers. Allocators of GPUs were not measured."
    )


def _beyond(found: dict[str, Any], attention: list[float]) -> str:
    """Where the exponent of long prompts comes from."""
    shares = [a / s for a, s in zip(attention, found["seconds"], strict=True)]
    rest = [(s - a) / n * 1e3 for n, a, s in zip(found["values"], attention, found["seconds"], strict=True)]
    first, last = found["values"][0], found["values"][-1]
    return (
        "A prompt longer than a batch's budget is a batch by itself, so memory grows with it. Its time grows faster than its "
        f"length: attention's scores and values, timed alone, take {shares[0]:.0%} of the time at {first} tokens and "
        f"{shares[-1]:.0%} at {last}; all else takes {rest[0]:.2f} ms a token at {first} and {rest[-1]:.2f} ms at {last}."
    )


def _checks(checked: dict[str, Any], spreading: list[dict[str, Any]]) -> list[str]:
    small, large = (f"{p / 1e6:.0f}" for p in checked["parameters"])
    sizes = " and ".join(f"{row['parameters'] / 1e6:.1f}" for row in spreading)
    rows = [
        [
            f"{rule}: the smaller foretells the larger",
            f"{small} and {large}",
            f"{checked[key][value]:.2f} times the seconds found",
        ]
        for rule, key, value in (
            ("reading takes seconds by operations", "reading", "foretold_over_found"),
            ("a decode step takes seconds by bytes of weights", "decode step", "foretold_over_found"),
            ("the same, less the calls of layers without weights", "decode step", "foretold_over_found_with_calls"),
        )
    ]
    for rule, key in (
        ("`torchrun`, 2 processes: 1/2 of the CPU time, busier process", "two_over_one_cpu"),
        ("of this, in the batches, which are shared", "two_over_one_batches"),
        ("the same, wall time", "two_over_one_wall"),
        ("`device_map`, half of the layers on disk: not faster, CPU time", "disk_over_memory"),
    ):
        rows.append([rule, sizes, " and ".join(f"{row[key]:.2f}" for row in spreading) + " times one process"])
    load = max(row["load"] for row in spreading)
    return [
        "## The rules, checked at two sizes (measured)",
        "One thread a process.",
        _table(["rule", "sizes, million parameters", "found"], rows),
        "The calls are what a step takes through as many layers with next to no weights. What remains is that the larger model "
        "reads its weights at a higher rate; why was not measured.",
        f"The load average was {load:.1f} on {spreading[0]['cores']} cores that other work used too, so the wall time of two "
        "processes says little; their CPU time does not count waiting for a core or for the other process. What is done "
        "outside of "
        "batches (tokenizing, statistics) every process does for itself. That the batches themselves take more than 1/2 was not "
        "traced; it is less in the larger model.",
        "One CPU is one device, so layers could not be placed on several. That `device_map` runs them one after the other was "
        "not "
        "timed: it follows from each layer needing the output of the one before it, and from the exporter having one batch "
        "under way. "
        "What was timed is `device_map` with the disk, which reads the offloaded weights again for every batch.",
    ]


def _device_map(tokens: int) -> list[str]:
    rows = [
        [model.name, str(gpus), f"{model.weights / gpus / 1e9:.1f} GB", f"{model.activations / 1e9:.1f} GB",
         f"{model.cache / gpus / 1e9:.2f} GB", f"{model.a_gpu(gpus) / 1e9:.1f} GB", _fits(model.a_gpu(gpus)),
         _time(tokens * model.read)]
        for model in LARGE
        for gpus in GPUS
    ]  # fmt: skip
    return [
        "## One process, `--device-map auto` (arithmetic)",
        "Weights and KV cache are split by layers; the activations are whole on each GPU in its turn. One layer runs at a "
        "time, so "
        "more GPUs hold a larger model and make nothing faster.",
        _table(
            ["", "GPUs", "weights a GPU", "activations", "KV cache a GPU, one reply", "sum a GPU", "in 80 GB", "directions"], rows
        ),
    ]


def _torchrun(tokens: int) -> list[str]:
    rows = []
    for model in LARGE:
        for name, weights in (("bfloat16", model.weights), ("4 bits", model.four_bits)):
            total = weights + model.activations
            times = [_time(tokens * model.read / n) if total <= GPU else "-" for n in NODES]
            rows.append([model.name, name, f"{total / 1e9:.1f} GB", _fits(total), *times])
    return [
        "## Several nodes, `torchrun` (arithmetic)",
        "Every process holds the whole model on one GPU (`--device-map` is refused beside it), and prompts are shared: time "
        "falls to "
        "1/n. Bfloat16 therefore ends where one GPU does; a 72B then takes `--load-in-4bit`, whose products are taken here to "
        "be as "
        "fast as bfloat16's, or one process with `--device-map`. The table has one process a node; eight on each of two nodes "
        "are 16.",
        _table(["", "weights", "a GPU, with activations", "in 80 GB", "1 process", "2 nodes", "4 nodes"], rows),
    ]


def _replies() -> list[str]:
    rows = [
        [model.name, f"{model.plain:.1f} s", f"{model.exact:.1f} s", f"{model.exact / model.plain:.2f}",
         f"{model.statistics / 1e6:.0f} MB"]
        for model in LARGE
    ]  # fmt: skip
    return [
        "## A reply (arithmetic)",
        "The exact method adds the caption's decoding and its request, and the text-only pass; the image is read once.",
        _table(["", "plain", "exact method", "ratio", "statistics kept while measuring"], rows),
    ]


def _fits(size: float) -> str:
    return "no" if size > GPU else "barely" if size > 0.9 * GPU else "yes"


def _time(seconds: float) -> str:
    return f"{math.ceil(seconds)} s" if seconds < 120 else f"{seconds / 60:.1f} min"
