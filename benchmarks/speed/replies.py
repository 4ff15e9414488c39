"""What a calibrated reply costs, in parts of a plain one: one image of 576 tokens, a caption and an answer of fixed lengths.

    python -m benchmarks.speed.replies [--rounds 5] [--tokens 64] [--batch-rounds 3] [--near-rounds 15]

Plain: the stock class. Ideal: plain, plus decoding a caption, plus reading the text-only prompt; all three measured here. The
reference procedure: caption, text pass, image pass, calibrated reply, each by itself.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from tiny import picture

from benchmarks.support.models import SMALL, Size, save
from benchmarks.support.side_by_side import one_thread, ratio, row, seconds, write
from exporter.checkpoint.bake import bake
from exporter.checkpoint.calibrated import Calibrated
from exporter.checkpoint.open import load_calibrated
from exporter.directions.directions import Directions
from exporter.models.base import resolve
from exporter.models.loading import load_vlm
from exporter.models.prompt_frame import prompt_frame
from exporter.models.recipe import load_recipe
from exporter.models.trials import tried_traits
from exporter.models.vlm import VLM

QUESTION, OTHERS = "What is it?", ["What is it?", "Who needs it, and what for?", "Why?", "How is it made at home?"]
LAYERS = (3, 4, 5)


def calibrated(base_folder: Path, folder: Path, size: Size = SMALL) -> VLM:
    """A checkpoint with random directions, loaded."""
    base, recipe = resolve(str(base_folder)), load_recipe("llava").with_overrides(layers="3-5")
    unit = torch.nn.functional.normalize(
        torch.randn(len(LAYERS), size.hidden, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    folder.mkdir()
    directions = Directions(LAYERS, unit, torch.ones(len(LAYERS)), ())
    vlm = load_vlm(base, recipe)
    bake(base, Calibrated(recipe, directions, LAYERS, prompt_frame(vlm, recipe.wording), tried_traits(vlm)), folder)
    return load_calibrated(folder, recipe)


class Replies:
    """Ways to answer the same questions about the same images; captions are as long as replies if `caption` is None."""

    def __init__(self, vlm: VLM, stock: Any, tokens: int, questions: list[str], caption: int | None = None):
        self.vlm, self.stock, self.tokens = vlm, stock, tokens
        self.caption = caption or tokens
        self.model, self.settings = vlm.model, dict(vlm.model.config.shiftdc) | {"caption_max_new_tokens": self.caption}
        for model in (self.model, stock):  # captions and replies of exactly so many tokens
            model.generation_config.min_new_tokens = self.caption
        self.inputs = vlm.encode(questions, [picture(seed, 336, 336) for seed in range(len(questions))])
        self.use("caption")
        self.seen = self.model.shiftdc_image(**self.inputs)
        composer = self.model.shiftdc_composer
        prompts = [
            ids[mask.bool()].tolist() for ids, mask in zip(self.inputs["input_ids"], self.inputs["attention_mask"], strict=True)
        ]
        self.counterparts = vlm.pad([composer.text_prompt(p, c) for p, c in zip(prompts, self.seen.captions, strict=True)])
        self.length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        self.one = {"max_new_tokens": 1, "min_new_tokens": 1, "do_sample": False}

    def use(self, reference: str) -> None:
        self.model.config.shiftdc = {**self.settings, "reference": reference}

    def plain(self) -> Any:
        return self.stock.generate(**self.inputs, **self.length)

    def plain_caption(self) -> Any:
        """As many tokens as a caption has."""
        return self.stock.generate(
            **self.inputs, **self.length | {"max_new_tokens": self.caption, "min_new_tokens": self.caption}
        )

    def plain_prefill(self) -> Any:
        return self.stock.generate(**self.inputs, **self.one)

    @torch.no_grad()
    def text_pass(self) -> None:
        self.stock.model(**self.counterparts, use_cache=False)

    def exact(self) -> Any:
        self.use("caption")
        return self.model.generate(**self.inputs, **self.length)

    def reference_procedure(self) -> Any:
        self.use("caption")
        captions = self.model.shiftdc_captions(**self.inputs)
        reference = self.model.shiftdc_reference(**self.inputs, captions=captions)
        self.model.shiftdc_coordinates(**self.inputs)
        return self.model.generate(**self.inputs, **self.length, shiftdc_reference=reference)

    def caption_kept(self) -> Any:
        self.use("caption")
        return self.model.generate(**self.inputs, **self.length, shiftdc_captions=self.seen.captions)

    def cache_kept(self) -> Any:
        self.use("caption")
        return self.model.generate(**self.inputs, **self.length, shiftdc_image=self.seen)

    def text(self) -> Any:
        self.use("text")
        return self.model.generate(**self.inputs, **self.length)

    def static(self) -> Any:
        self.use("static")
        return self.model.generate(**self.inputs, **self.length)

    def static_prefill(self) -> Any:
        self.use("static")
        return self.model.generate(**self.inputs, **self.one)


def added(*parts: list[float]) -> list[float]:
    return [sum(values) for values in zip(*parts, strict=True)]


def less(one: list[float], other: list[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


def single(replies: Replies, rounds: int) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    names = ("plain", "plain_prefill", "text_pass", "exact", "reference_procedure", "cache_kept")
    found = seconds({name: getattr(replies, name) for name in names}, rounds)
    plain, prefill = found["plain"], found["plain_prefill"]
    ideal = added(plain, less(plain, prefill), found["text_pass"])
    exact = f"exact method, one image, caption {replies.tokens}, answer {replies.tokens}"
    times_plain = f"{ratio(found['exact'], plain):.2f} x a plain reply, ideal {ratio(ideal, plain):.2f} x"
    return [
        row(exact, "ideal", ratio(found["exact"], ideal), 1.05, note=times_plain),
        row(f"{exact}: speed", "reference procedure", ratio(found["reference_procedure"], found["exact"]), 1.3, least=True),
        row("exact method, the image's KV cache kept", "plain reply", ratio(found["cache_kept"], plain), 0.8),
    ], found


def near(replies: Replies, rounds: int) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """What differs from a plain reply by little, in more rounds."""
    names = ("plain", "static", "plain_prefill", "static_prefill", "text_pass", "caption_kept", "text")
    found = seconds({name: getattr(replies, name) for name in names}, rounds)
    plain, prefill = found["plain"], found["plain_prefill"]
    steps, calibrated = less(plain, prefill), less(found["static"], found["static_prefill"])
    spread = statistics.quantiles((a / b for a, b in zip(found["static"], plain, strict=True)), n=4)
    note = f"middle half of the rounds {spread[0]:.3f}-{spread[2]:.3f}"
    kept = f"a text-only pass through all layers is {ratio(found['text_pass'], plain):.3f} x"
    return [
        row("exact method, caption kept per image", "plain reply", ratio(found["caption_kept"], plain), 1.05, note=kept),
        row("`text` reference", "plain reply", ratio(found["text"], plain), 1.08),
        row("static: reply", "plain reply", ratio(found["static"], plain), 1.01, note=note),
        row("static: prefill", "plain prefill", ratio(found["static_prefill"], prefill), 1.02),
        row("static: decode steps", "plain decode steps", ratio(calibrated, steps), 1.02, note="1.00 within noise is asked"),
    ], found


def batch(replies: Replies, rounds: int) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    names = ("plain", "plain_prefill", "text_pass", "exact")
    found = seconds({name: getattr(replies, name) for name in names}, rounds, warm=False)
    ideal = added(found["plain"], less(found["plain"], found["plain_prefill"]), found["text_pass"])
    work = f"exact method, batch of {len(OTHERS)}, caption {replies.tokens}"
    parts = f"{ratio(ideal, found['plain']):.2f} x; exact {ratio(found['exact'], ideal):.2f} x ideal"
    note = f"ideal (plain, caption decode, text pass) {parts}"
    return [row(work, "plain batch", ratio(found["exact"], found["plain"]), 1.5, note=note)], found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-rounds", type=int, default=3)
    parser.add_argument("--near-rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    one_thread()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        stock = save(SMALL, base)
        vlm = calibrated(base, Path(folder) / "calibrated")
    one = Replies(vlm, stock, arguments.tokens, [QUESTION])
    rows, found = single(one, arguments.rounds)
    like_plain, likes = near(one, arguments.near_rounds)
    more, batches = batch(Replies(vlm, stock, arguments.tokens, OTHERS), arguments.batch_rounds)
    write("replies", [*rows, *like_plain, *more], seconds=found, near_seconds=likes, batch_seconds=batches)


if __name__ == "__main__":
    main()
