"""Reading last-token activations: against a bare forward of the same batches, and against the reference procedure.

    python -m benchmarks.speed.directions [--rounds 3] [--prompts 160]

The reference procedure (arXiv:2502.13095, authors' code), written anew: batches of 32 in the order given, lm_head on, every
hidden state of every token returned and stacked, the last token taken afterwards.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.support.models import SMALL, model
from benchmarks.support.side_by_side import give_back, memory, one_thread, ratio, row, seconds, write
from exporter.directions.activations import RunningMean, by_length, last_token_activations
from exporter.models.vlm import VLM, Inputs

LENGTHS, FIXED_BATCH = (20, 200), 32
#: Times that memory is measured, since what the C library keeps differs from one to the next.
FORKS = 3
#: LLaVA's own, since the reference procedure computes logits; of a model this small they are a larger share than of a 7B.
VOCABULARY = 32064


CPU = torch.device("cpu")


def some_prompts(count: int) -> list[list[int]]:
    """Token ids, of lengths in LENGTHS."""
    rng = random.Random(0)
    return [[1, *(rng.randrange(5, 8000) for _ in range(rng.randint(*LENGTHS)))] for _ in range(count)]


def padded(prompts: list[list[int]], device: torch.device = CPU) -> Inputs:
    width = max(map(len, prompts))
    ids = torch.tensor([[3] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def batches(prompts: list[list[int]], device: torch.device = CPU) -> list[Inputs]:
    """As the package makes them."""
    return [padded(batch, device) for batch in by_length(prompts, [len(p) for p in prompts], None, device)]


def ways(vlm: VLM, prompts: list[list[int]]) -> dict[str, Callable[[], object]]:
    layers = list(vlm.decoder_layers)

    def ours() -> RunningMean:
        stats = RunningMean()
        for inputs in batches(prompts, vlm.device):
            stats.update(last_token_activations(vlm, layers, inputs))
        return stats

    @torch.no_grad()
    def bare() -> None:
        for inputs in batches(prompts, vlm.device):
            vlm.backbone(inputs)

    @torch.no_grad()
    def reference() -> torch.Tensor:
        kept = []
        for start in range(0, len(prompts), FIXED_BATCH):
            inputs = padded(prompts[start : start + FIXED_BATCH], vlm.device)
            states = vlm.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
            kept.append(torch.stack(states)[:, :, -1])  # [layers + 1, batch, hidden]
        return torch.cat(kept, 1).mean(1)

    return {"ours": ours, "bare": bare, "reference": reference}


def why(prompts: list[list[int]]) -> str:
    """Where the reference procedure's time goes."""
    fixed = sum(padded(prompts[i : i + FIXED_BATCH])["input_ids"].numel() for i in range(0, len(prompts), FIXED_BATCH))
    ours = sum(batch["input_ids"].numel() for batch in batches(prompts))
    return f"padding makes it {fixed / ours:.2f} x the tokens; the rest is lm_head and copies, less on larger models"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=160)
    arguments = parser.parse_args()
    one_thread()
    prompts = some_prompts(arguments.prompts)
    vlm = VLM(model(replace(SMALL, vocabulary=VOCABULARY)), None)
    bytes_ = peaks(vlm, prompts)
    found = seconds(ways(vlm, prompts), arguments.rounds, warm=False)
    write("directions", table(prompts, found, bytes_), seconds=found, bytes=bytes_)


def peaks(vlm: VLM, prompts: list[list[int]]) -> dict[str, int]:
    """Bytes of each way, in forks before this process has grown; they are those of one batch, so few prompts do."""

    def tensors(way: Callable[[], object]) -> None:
        give_back()
        way()

    few = ways(vlm, prompts[:FIXED_BATCH])
    found = [{name: memory(partial(tensors, way)) for name, way in few.items()} for _ in range(FORKS)]
    return {name: int(statistics.median(bytes_[name] for bytes_ in found)) for name in few}


def table(prompts: list[list[int]], found: dict[str, list[float]], bytes_: dict[str, int]) -> list[dict[str, Any]]:
    work = f"directions, {len(prompts)} prompts of {LENGTHS[0]}-{LENGTHS[1]} tokens"
    reference = "reference procedure (all hidden states, batches of 32, lm_head)"
    return [
        row(f"{work}: time", "bare backbone, same batches", ratio(found["ours"], found["bare"]), 1.05),
        row(f"{work}: peak memory above the weights", "bare backbone, same batches", bytes_["ours"] / bytes_["bare"], 1.05),
        row(f"{work}: speed", reference, ratio(found["reference"], found["ours"]), 2.5, least=True, note=why(prompts)),
        row(f"{work}: memory above the weights", reference, bytes_["reference"] / bytes_["ours"], 10, least=True,
            note=f"{bytes_['reference'] >> 20} against {bytes_['ours'] >> 20} MiB"),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
