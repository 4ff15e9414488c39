"""Who attends to whom in the decoder graph: padding, which the cache remembers, and masks by family."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def attended_positions(attention_mask: torch.Tensor, keys: torch.Tensor, time: int) -> torch.Tensor:
    """int64 [batch, past + time]: 1 where a position is no padding.

    While decoding transformers.js gives a mask of ones; the first layer's cached keys are zeros at padding.
    """
    cached = keys.abs().sum((1, 3)) > 0
    new = torch.ones_like(attention_mask[:, -time:])
    return (attention_mask > 0).long() * torch.cat([cached.long(), new], 1)


def with_padding_zeroed(keys: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """`keys` [batch, heads, time, width] with zeros at padding only: the embedding of a PAD that was generated may be zero."""
    zero = (keys.abs().sum((1, 3), keepdim=True) == 0).to(keys.dtype)
    return (keys + torch.finfo(keys.dtype).tiny * zero) * attended[:, None, :, None].to(keys.dtype)


def causal_mask(attended: torch.Tensor, image: torch.Tensor, dtype: torch.dtype, text: PretrainedConfig) -> torch.Tensor:
    """[batch, 1, time, past + time] for a decoder whose tokens see all before them; 0 or the lowest number.

    attended [batch, past + time]: no padding; image [batch, time]: tokens of an image; text: the decoder's config.
    """
    return additive(causal(attended, image), attended, dtype)


def gemma3_masks(
    attended: torch.Tensor, image: torch.Tensor, dtype: torch.dtype, text: PretrainedConfig
) -> dict[str, torch.Tensor]:
    """Masks by kind of layer: tokens of one image see each other, and some layers look back a window only."""
    query, key = _indices(attended, image)
    first = image & ~torch.nn.functional.pad(image, (1, 0))[:, :-1]
    block = torch.where(image, first.long().cumsum(1), 0)
    past = torch.zeros_like(attended)[:, : attended.shape[1] - image.shape[1]]
    same = (block[:, :, None] == torch.cat([past, block], 1)[:, None]) & (block > 0)[:, :, None]
    near = (key > query - text.sliding_window)[None]
    allowed = causal(attended, image)
    return {
        "full_attention": additive(allowed | same, attended, dtype),
        "sliding_attention": additive((allowed & near) | same, attended, dtype),
    }


def causal(attended: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """bool [batch, time, past + time]: keys at or before the query that are no padding."""
    query, key = _indices(attended, image)
    return (key <= query)[None] & (attended[:, None] > 0)


def additive(allowed: torch.Tensor, attended: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`allowed` as numbers to add to scores. Padding attends to itself: a row of nothing would be NaN."""
    query, key = _indices(attended, allowed[:, :, 0])
    return torch.where(allowed | (key == query)[None], 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


def _indices(attended: torch.Tensor, fed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of queries [time, 1] and keys [1, past + time] in the whole sequence."""
    width, time = attended.shape[1], fed.shape[1]
    return torch.arange(time)[:, None] + (width - time), torch.arange(width)[None]
