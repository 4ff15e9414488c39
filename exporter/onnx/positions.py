"""Positions of prompts for families that count an image's rows and columns (multimodal RoPE of Qwen2-VL and Qwen2.5-VL)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from exporter.errors import InputError

Ids = npt.NDArray[np.int64]


def grid_positions(ids: Ids, mask: Ids, image_token_id: int, grids: Ids, merge: int) -> Ids:
    """int64 [3, batch, time]: frame, row and column of each token; a text token counts on in all three.

    ids, mask [batch, time]; grids [images, 3]: frames, rows and columns of patches, of which `merge` x `merge` are a token.
    Raises InputError where grids and image tokens do not belong together.
    """
    positions = np.zeros((3, *ids.shape), np.int64)
    left = [grid // (1, merge, merge) for grid in grids]
    for row in range(len(ids)):
        places = np.flatnonzero(mask[row])
        tokens, start, at = ids[row, places], 0, 0
        while at < len(tokens):
            if tokens[at] == image_token_id:
                if not left or (tokens[at : at + left[0].prod()] == image_token_id).sum() != left[0].prod():
                    raise InputError("image_grid_thw: its grids do not belong to the prompts' image tokens.")
                grid = left.pop(0)
                new = np.indices(grid).reshape(3, -1)
            else:
                new = np.zeros((3, 1), np.int64)
            positions[:, row, places[at : at + new.shape[1]]] = start + new
            start += new.max() + 1
            at += new.shape[1]
    if left:
        raise InputError("image_grid_thw: it has more grids than the prompts have images.")
    return positions
