"""How fast ONNX Runtime is beside PyTorch eager on the CPU: prefill and decode of one uncalibrated and one static reply.

    python -m benchmarks.speed.onnx_speed CHECKPOINT [--rounds 20] [--tokens 24] [--threads 1] [--batch 1] [--output FILE.json]

Every round asks all of them in turn; ratios are medians of (ONNX Runtime / PyTorch) within a round, below 1 is faster. Prefill
includes the image. PyTorch runs in float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from exporter.checkpoint.open import open_export
from exporter.data.images import typographic_image
from exporter.onnx.export import FOLDER
from exporter.onnx.interface import SUFFIXES, graph_file
from exporter.onnx.parity import as_prompts
from exporter.onnx.runner import BAKED, UNCALIBRATED, OnnxShiftDC


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=24, help="length of the reply")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("onnx-speed.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = arguments.checkpoint / FOLDER
    vlm = open_export(arguments.checkpoint, dtype="float32")
    vlm.model.config.shiftdc = {**vlm.model.config.shiftdc, "reference": "static"}
    inputs = vlm.encode(["What is shown in the image?"] * arguments.batch, [typographic_image("bread")] * arguments.batch)
    prompts = as_prompts(inputs)
    precisions = [p for p in SUFFIXES if (folder / graph_file("decoder_model_merged", p)).is_file()]
    runners = {p: OnnxShiftDC(folder, p, arguments.threads) for p in precisions}
    for runner in runners.values():
        runner.eos = [-1]  # replies of one length

    def torch_run(tokens: int, calibrated: bool) -> float:
        length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        return seconds(lambda: vlm.model.generate(**inputs, **length, **({} if calibrated else {"shiftdc": False})))

    def onnx_run(runner: OnnxShiftDC, tokens: int, calibrated: bool) -> float:
        return seconds(lambda: runner.generate(prompts, BAKED if calibrated else UNCALIBRATED, tokens))

    ratios: dict[str, list[float]] = {}
    for round_ in range(arguments.rounds + 1):
        for calibrated in (False, True):
            name = "static" if calibrated else "uncalibrated"
            base = [torch_run(n, calibrated) for n in (1, arguments.tokens)]
            for precision, runner in runners.items():
                found = [onnx_run(runner, n, calibrated) for n in (1, arguments.tokens)]
                if round_:  # the first round warms up
                    ratios.setdefault(f"{precision} {name} prefill", []).append(found[0] / base[0])
                    decode = (found[1] - found[0]) / (base[1] - base[0])
                    ratios.setdefault(f"{precision} {name} decode", []).append(decode)
    medians = {name: round(statistics.median(found), 3) for name, found in ratios.items()}
    about = {k: v for k, v in vars(arguments).items() if isinstance(v, int)} | {"prompt_tokens": prompts.ids.shape[1]}
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    for name, ratio in medians.items():
        print(f"{name:30} {ratio:6.2f} x PyTorch")
    arguments.output.write_text(json.dumps({**about, "torch": torch.__version__, "ratios": medians}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
