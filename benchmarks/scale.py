"""How reading activations grows: seconds and memory against prompts, prompt length, layers, hidden size, with fitted exponents.

    python benchmarks/scale.py [--rounds 2]

Writes results/scale.json, scale.png and estimate.md: what 34B and 72B models take on paper, by a rule checked on two sizes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from models import Size, model
from side_by_side import RESULTS, memory, one_thread, seconds, write

from exporter.activations import LastTokenStats, by_length, last_token_activations
from exporter.vlm import VLM

matplotlib.use("Agg")

BASE = Size(hidden=384, layers=6, heads=6, intermediate=1024, vocabulary=1024, vision_layers=2)
PROMPTS, LENGTH = 16, 64
STEPS: dict[str, Sequence[int]] = {
    "prompts": (8, 16, 32, 64),
    "prompt length": (32, 64, 128, 256),
    "layers": (3, 6, 12, 24),
    "hidden size": (192, 384, 768, 1152),
}
#: Two sizes on which the rule of the estimate is checked: it is fitted to the first and foretells the second.
CHECKED = (BASE, Size(hidden=1024, layers=12, heads=16, intermediate=2816, vocabulary=1024, vision_layers=2))
PROMPTS_OF_A_FIT, TOKENS_OF_A_PROMPT = 960, 110


def reading(size: Size, prompts: int, length: int) -> Callable[[], object]:
    vlm = VLM(model(size), None)
    layers = list(vlm.decoder_layers("model.language_model.layers"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, size.vocabulary, (prompts, length), generator=generator)

    def read() -> None:
        stats = LastTokenStats()
        for rows in by_length(range(prompts), [length] * prompts, None, torch.device("cpu")):
            batch = {"input_ids": ids[rows], "attention_mask": torch.ones(len(rows), length, dtype=torch.long)}
            stats.update(last_token_activations(vlm, layers, batch))

    return read


def one(variable: str, value: int) -> Callable[[], object]:
    size, prompts, length = BASE, PROMPTS, LENGTH
    if variable == "prompts":
        prompts = value
    elif variable == "prompt length":
        length = value
    elif variable == "layers":
        size = replace(BASE, layers=value)
    else:
        size = replace(BASE, hidden=value, heads=value // 64, intermediate=value * 8 // 3)
    return reading(size, prompts, length)


def exponent(values: Sequence[float], found: Sequence[float]) -> float:
    """Slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(values), np.log(np.maximum(found, 1e-9)), 1)[0])


def measured(rounds: int) -> dict[str, Any]:
    result = {}
    for variable, values in STEPS.items():
        ways = {str(v): one(variable, v) for v in values}
        bytes_ = {name: memory(way) for name, way in ways.items()}
        time = {name: statistics.median(s) for name, s in seconds(ways, rounds).items()}
        result[variable] = {
            "values": list(values),
            "seconds": list(time.values()),
            "bytes": list(bytes_.values()),
            "exponent_seconds": round(exponent(values, list(time.values())), 2),
            "exponent_bytes": round(exponent(values, list(bytes_.values())), 2),
        }
        print(f"{variable}: seconds ~ n^{result[variable]['exponent_seconds']}, bytes ~ n^{result[variable]['exponent_bytes']}")
    return result


def multiplications(size: Size) -> float:
    """Of a token in the decoder's matrices: two a weight, additions counted."""
    return 2.0 * size.layers * (4 * size.hidden**2 + 3 * size.hidden * size.intermediate)


def check(rounds: int) -> dict[str, float]:
    """Whether time is operations over a rate: the rate of the first size foretells the time of the second."""
    ways = {str(i): reading(size, PROMPTS, LENGTH) for i, size in enumerate(CHECKED)}
    found = [statistics.median(s) for s in seconds(ways, rounds).values()]
    rates = [multiplications(size) * PROMPTS * LENGTH / t for size, t in zip(CHECKED, found, strict=True)]
    return {"rate_small": rates[0], "rate_large": rates[1], "foretold_over_found": rates[1] / rates[0]}


def plot(result: dict[str, Any], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(result), figsize=(14, 3.4), constrained_layout=True)
    for axis, (variable, found) in zip(axes, result.items(), strict=True):
        axis.loglog(found["values"], found["seconds"], "o-", label=f"seconds, n^{found['exponent_seconds']}")
        axis.loglog(found["values"], [b / 2**30 for b in found["bytes"]], "s--", label=f"GiB, n^{found['exponent_bytes']}")
        axis.set_xlabel(variable)
        axis.legend(fontsize=8)
    figure.savefig(file, dpi=120)


#: Parameters, layers, hidden size, bytes a cached token (float16: 2 tensors x layers x key/value heads x head size x 2 bytes).
LARGE = {
    "LLaVA-1.6-34B": (34.4e9, 60, 7168, 2 * 60 * 8 * 128 * 2),
    "LLaVA-OneVision-72B": (72.7e9, 80, 8192, 2 * 80 * 8 * 128 * 2),
}
#: bfloat16 FLOP/s and bytes/s of an A100-80GB, and the share of them that large matrix products and decode steps reach.
FLOPS, BYTES, SHARE_FLOPS, SHARE_BYTES = 312e12, 2.0e12, 0.5, 0.6
IMAGE_TOKENS, CAPTION, ANSWER = 2880, 64, 64


def estimate(checked: dict[str, float]) -> str:
    """Markdown. Everything in it but the check is arithmetic, not measurement."""
    fit = f"{PROMPTS_OF_A_FIT} prompts of {TOKENS_OF_A_PROMPT} tokens"
    lines = [
        "# On paper: 34B and 72B",
        "",
        "Written by `python benchmarks/scale.py`. Not measured: arithmetic from parameters and an A100-80GB's 312 TFLOP/s and",
        f"2 TB/s, of which matrix products are taken to reach {SHARE_FLOPS:.0%} and decode steps {SHARE_BYTES:.0%}.",
        "Rule: reading costs 2 operations a parameter and token; a decode step reads every weight once.",
        "Checked on two sizes on one CPU thread: the rate of",
        f"{describe(CHECKED[0])} foretells {checked['foretold_over_found']:.2f} times the time of {describe(CHECKED[1])}.",
        "",
        f"A prompt has {IMAGE_TOKENS} image tokens; answer {ANSWER} tokens, caption {CAPTION}.",
        "",
        f"| | weights, bf16 | GPUs of 80 GB | directions, {fit} | statistics kept | plain reply | exact method | ratio | "
        "KV cache of an image |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (parameters, layers, hidden, cached) in LARGE.items():
        gpus = int(np.ceil(2 * parameters / 70e9))
        read = 2 * parameters / (FLOPS * SHARE_FLOPS)  # seconds a token, pipelined over GPUs one at a time (device_map)
        step = 2 * parameters / (BYTES * SHARE_BYTES)
        plain = IMAGE_TOKENS * read + ANSWER * step
        exact = plain + CAPTION * step + 2 * TOKENS_OF_A_PROMPT * read
        lines.append(
            f"| {name} | {2 * parameters / 1e9:.0f} GB | {gpus} | {PROMPTS_OF_A_FIT * TOKENS_OF_A_PROMPT * read:.0f} s | "
            f"{2 * layers * hidden * 8 / 1e6:.0f} MB | {plain:.1f} s | {exact:.1f} s | {exact / plain:.2f} | "
            f"{IMAGE_TOKENS * cached / 1e9:.2f} GB |"
        )
    lines += [
        "",
        "`device_map` runs the layers of several GPUs one after the other: it holds larger models and makes nothing faster.",
        "Nodes that each hold the model can share the prompts and merge their statistics (`LastTokenStats.merge`): time falls",
        "to 1/n, and what travels is the column of statistics (`torchrun`, as the README says).",
    ]
    return "\n".join(lines) + "\n"


def describe(size: Size) -> str:
    return f"{size.layers} layers of {size.hidden}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    one_thread()
    result = measured(arguments.rounds)
    checked = check(arguments.rounds)
    write("scale", [], scale=result, check=checked)
    plot(result, RESULTS / "scale.png")
    (RESULTS / "estimate.md").write_text(estimate(checked), "utf-8")


if __name__ == "__main__":
    main()
