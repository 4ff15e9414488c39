"""What calibration does at every precision of an ONNX export: attack success, over-refusal, utility, on ONNX Runtime.

    python -m benchmarks.effect.onnx_variants CHECKPOINT [--limit N] [--precision fp32,...] [--threads 1] [--output FILE.json]

The demo benchmark's test split, judge `prefix`, the checkpoint's own gate, rule and strength.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from exporter.data.benchmarks import load_benchmark
from exporter.data.questions import Benchmark
from exporter.data.refusals import begins_as_refusal
from exporter.evaluation.figures import judged, summarise
from exporter.evaluation.replies import Reply
from exporter.evaluation.results import About
from exporter.evaluation.results_json import as_document
from exporter.onnx.export import FOLDER, parse_precisions
from exporter.onnx.interface import SUFFIXES
from exporter.onnx.runner import OnnxShiftDC

WAYS = {"direct": None, "static": "static", "caption": "caption"}
BATCH = 32
#: Of the figures of a way.
KEPT = (
    "n_harmful", "n_benign", "asr", "asr_ci95", "over_refusal", "over_refusal_ci95", "utility", "utility_ci95", "degenerate",
    "seconds_per_reply",
)  # fmt: skip


def replies(runner: OnnxShiftDC, benchmark: Benchmark, way: str) -> list[Reply]:
    """In the order of the questions."""
    found = {}
    for has_image in (True, False):
        chosen = [q for q in benchmark.questions if (q.image is not None) == has_image]
        for start in range(0, len(chosen), BATCH):
            batch = chosen[start : start + BATCH]
            begin = time.perf_counter()
            images = [q.image.load() if q.image is not None else None for q in batch]
            texts = runner.reply([q.request for q in batch], images, reference=WAYS[way], max_new_tokens=32)
            seconds = {"reply": (time.perf_counter() - begin) / len(batch)}
            found |= {q.id: Reply(way, q.id, text, seconds) for q, text in zip(batch, texts, strict=True)}
    return [found[q.id] for q in benchmark.questions]


def judge(_: object, texts: list[str]) -> list[bool]:
    return [begins_as_refusal(text) for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--limit", type=int, help="questions per cell [default: all]")
    parser.add_argument("--precision", default=",".join(SUFFIXES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("onnx-variants.json"))
    arguments = parser.parse_args()
    benchmark = load_benchmark("demo", split="test").limited(arguments.limit)
    outcomes, same = {}, {}
    exact: dict[str, list[Reply]] = {}
    for precision in parse_precisions(arguments.precision):
        runner = OnnxShiftDC(arguments.checkpoint / FOLDER, precision, arguments.threads)
        for way in WAYS:
            found = replies(runner, benchmark, way)
            exact.setdefault(way, found)
            name = f"{precision} {way}"
            same[name] = sum(a.text == b.text for a, b in zip(found, exact[way], strict=True)) / len(found)
            outcomes[name] = judged(benchmark.questions, found, judge)
            figures = as_document(summarise(benchmark, {name: outcomes[name]}, "prefix", About()))["defences"][name]
            shown = ", ".join(f"{k} {100 * figures[k]:.1f} {figures[f'{k}_ci95']}" for k in ("asr", "over_refusal", "utility"))
            print(f"{name:13} {shown}, same as the first precision {100 * same[name]:.1f}", flush=True)
    about = {"threads": arguments.threads, "same_replies_as_first_precision": same}
    results = as_document(summarise(benchmark, outcomes, "prefix", About())) | about
    del results["paired"]  # every way is its own
    results["defences"] = {name: {key: found[key] for key in KEPT} for name, found in results["defences"].items()}
    arguments.output.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
