"""What calibration costs in time, as a ratio to a plain reply of the same model, side by side in one run.

    python benchmarks/reply_cost.py CHECKPOINT [--rounds 20] [--tokens 24] [--caption-tokens N]

One image, one prompt, greedy replies of a fixed length; the ways of answering alternate, and the median ratio is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from exporter.checkpoint.open import open_export
from exporter.data.images import typographic_image
from exporter.evaluation.defences import DEFENCES, applied

WAYS = ("direct", "shiftdc_static", "shiftdc_text", "shiftdc_blank", "shiftdc_caption")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=24, help="length of the reply")
    parser.add_argument("--caption-tokens", type=int, help="longest caption [default: the checkpoint's]")
    arguments = parser.parse_args()
    vlm = open_export(arguments.checkpoint)
    if arguments.caption_tokens:
        vlm.model.config.shiftdc["caption_max_new_tokens"] = arguments.caption_tokens
    inputs = vlm.encode(["What is shown in the image?"], [typographic_image("hello")])
    length = {"max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens, "do_sample": False}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for round_ in range(arguments.rounds + 1):
        for name in WAYS:
            defence = DEFENCES[name]
            with applied(vlm, defence):
                start = time.perf_counter()
                vlm.model.generate(**inputs, **length, **({"shiftdc": False} if name == "direct" else {}))
                if round_:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
    print(f"reply of {arguments.tokens} tokens, {arguments.rounds} rounds, {torch.get_num_threads()} threads, {vlm.device}")
    for name in WAYS:
        ratios = [a / b for a, b in zip(seconds[name], seconds["direct"], strict=True)]
        print(f"{name:16} {statistics.median(ratios):6.2f} x direct   ({statistics.median(seconds[name]) * 1000:.1f} ms)")


if __name__ == "__main__":
    main()
