"""Captions of calibration images, written by the model itself in place of a paid service (arXiv:2502.13095, section 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from exporter.data.calibration import CalibrationRow, CalibrationSet
from exporter.data.images import row_image
from exporter.models.recipe import Wording
from exporter.models.vlm import VLM
from exporter.runtime.batches import Batches
from exporter.runtime.progress import Progress, silent

BATCH = 16


@torch.no_grad()
def captions(
    vlm: VLM,
    rows: Sequence[CalibrationRow],
    prompts: Wording,
    max_new_tokens: int,
    batch_size: int | None = None,
    runner: Batches | None = None,
) -> Iterator[list[str]]:
    """Greedy captions in view of each row's request, in the order of `rows`, a batch at a time."""
    size = batch_size or BATCH
    batches = [list(range(start, min(start + size, len(rows)))) for start in range(0, len(rows), size)]

    def compute(indices: list[int]) -> torch.Tensor:
        """Token ids [rows, max_new_tokens], -1 behind the last."""
        batch = [rows[i] for i in indices]
        inputs = vlm.encode([prompts.caption_request(r.request) for r in batch], [row_image(r) for r in batch])
        out = vlm.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        return torch.nn.functional.pad(out.cpu(), (0, max_new_tokens - out.shape[1]), value=-1)

    for _, ids in (runner or Batches()).run("captions", batches, compute):
        yield [vlm.decode(row[row >= 0]) for row in ids]


def captioned(
    vlm: VLM,
    calibration: CalibrationSet,
    prompts: Wording,
    max_new_tokens: int,
    batch_size: int | None = None,
    progress: Progress = silent,
    runner: Batches | None = None,
) -> CalibrationSet:
    """The set with a caption in each row that has none."""
    missing = calibration.uncaptioned
    written: list[str] = []
    for batch in captions(vlm, missing, prompts, max_new_tokens, batch_size, runner):
        written += batch
        progress("captions", len(written), len(missing))
    texts = iter(written)
    rows = tuple(r if r.caption else r.model_copy(update={"caption": next(texts)}) for r in calibration.rows)
    return replace(calibration, rows=rows)
