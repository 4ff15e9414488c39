"""A full-size random-weight LLaVA-1.5-7B in bfloat16 on a GPU: times, and shares of its bandwidth and arithmetic limits.

    python benchmarks/gpu.py [--rounds 5] [--tflops 989] [--gigabytes 3350]

Extraction (tokens a second, share of the FLOP limit), and replies: plain, exact, text, static, KV cache kept, and some of
them with a static cache and torch.compile (share of the bandwidth limit in decode steps). The limits are those of the GPU's
data sheet, for bfloat16.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from directions import LENGTHS, padded
from models import FULL, save
from replies import QUESTION, Replies, calibrated
from side_by_side import seconds, write

from exporter.activations import LastTokenStats, by_length, last_token_activations
from exporter.vlm import VLM

PROMPTS, TOKENS = 512, 64


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def extraction(stock: Any, rounds: int, tflops: float) -> dict[str, float]:
    vlm = VLM(stock, None)
    layers = list(vlm.decoder_layers("model.language_model.layers"))
    rng = random.Random(0)
    prompts = [[1, *(rng.randrange(5, 8000) for _ in range(rng.randint(*LENGTHS)))] for _ in range(PROMPTS)]

    def read() -> None:
        stats = LastTokenStats()
        for batch in by_length(prompts, [len(p) for p in prompts], None, vlm.device):
            stats.update(last_token_activations(vlm, layers, {k: v.to(vlm.device) for k, v in padded(batch).items()}))

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    time = statistics.median(seconds({"read": read}, rounds)["read"])
    tokens = sum(map(len, prompts))
    operations = 2 * tokens * parameters(torch.nn.ModuleList(layers))
    return {
        "seconds": time,
        "tokens_per_second": tokens / time,
        "share_of_flops": operations / time / (tflops * 1e12),
        "gigabytes_above_weights": (torch.cuda.max_memory_allocated() - before) / 1e9,
    }


def replies(vlm: VLM, stock: Any, rounds: int, gigabytes: float) -> dict[str, Any]:
    asked = Replies(vlm, stock, TOKENS, [QUESTION])
    compiled = {"cache_implementation": "static"}  # generate() then compiles the decode steps by itself

    def static_cache(reference: str) -> None:
        asked.use(reference)
        asked.model.generate(**asked.inputs, **asked.length, **compiled)

    ways = {name: getattr(asked, name) for name in ("plain", "plain_prefill", "exact", "cache_kept", "text", "static")}
    ways["plain, static cache, compiled"] = lambda: stock.generate(**asked.inputs, **asked.length, **compiled)
    ways["static, static cache, compiled"] = lambda: static_cache("static")
    ways["exact, static cache, compiled"] = lambda: static_cache("caption")
    found = {name: statistics.median(times) for name, times in seconds(ways, rounds).items()}
    weights = 2 * parameters(stock.model.language_model) + 2 * parameters(stock.lm_head)

    def bandwidth(whole: float) -> float:
        return weights * (TOKENS - 1) / (whole - found["plain_prefill"]) / (gigabytes * 1e9)

    return {
        "seconds": found,
        "ratio_to_plain": {name: time / found["plain"] for name, time in found.items()},
        "decode_share_of_bandwidth": bandwidth(found["plain"]),
        "decode_share_of_bandwidth_compiled": bandwidth(found["plain, static cache, compiled"]),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tflops", type=float, default=989, help="of the GPU, bfloat16, dense [default: an H100 SXM's]")
    parser.add_argument("--gigabytes", type=float, default=3350, help="a second, of the GPU's memory [default: an H100 SXM's]")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA GPU with 64 GB, and there is none; nothing was measured.")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        stock = save(FULL, base, device="cuda", dtype=torch.bfloat16)
        vlm = calibrated(base, Path(folder) / "calibrated", FULL)
        about = {
            "device": torch.cuda.get_device_name(),
            "extraction": extraction(stock, arguments.rounds, arguments.tflops),
            "replies": replies(vlm, stock, arguments.rounds, arguments.gigabytes),
        }
    write("gpu", [], **about)
    print((Path(__file__).parent / "results" / "gpu.json").read_text())


if __name__ == "__main__":
    main()
