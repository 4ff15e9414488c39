"""Prompts of several lengths as rows of one length."""

from __future__ import annotations

from collections.abc import Sequence


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[list[list[int]], list[list[int]]]:
    """(ids, mask) [batch, time], with padding before the prompts; the mask is 1 at their tokens."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + [*prompt] for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return ids, mask
