"""The vision encoder of Qwen2-VL and Qwen2.5-VL: pictures of any shape as one row of patches, and a grid for each picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import and_

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention

from exporter.onnx.graphs import with_flag
from exporter.onnx.interface import IMAGE_FLAG


@dataclass(frozen=True)
class PatchPositions:
    """Where patches [patches] lie: picture (each frame counts as one), row and column.

    A picture's patches come in blocks of merge x merge, which become one feature: blocks row by row, and so the patches of one.
    """

    picture: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor

    def blocks(self, window: int | None) -> torch.Tensor:
        """bool [patches, patches]: of the same picture, and of the same window of window x window patches."""
        numbers = [self.picture] if window is None else [self.picture, self.row // window, self.column // window]
        return reduce(and_, (n[:, None] == n[None] for n in numbers))


def patch_positions(grid: torch.Tensor, patches: int, merge: int) -> PatchPositions:
    """Of `patches` in a row, by `grid` [pictures, 3]: frames, rows and columns of patches."""
    sizes = grid.prod(1)
    ends = sizes.cumsum(0)
    number = torch.arange(patches)
    picture = (number[:, None] >= ends[None]).sum(1)
    rows, columns = grid[picture, 1], grid[picture, 2]
    within = number - (ends - sizes)[picture]
    frame, rest = within // (rows * columns), within % (rows * columns)
    block, inside = rest // merge**2, rest % merge**2
    across = columns // merge
    return PatchPositions(
        picture=picture * (patches + 1) + frame,
        row=block // across * merge + inside // merge,
        column=block % across * merge + inside % merge,
    )


class PatchVision(nn.Module):
    """Patches to image features. The tower's own forward cuts the row into pictures, which would freeze their sizes."""

    weight: torch.Tensor

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.tower = model.model.visual
        config = model.config.vision_config
        self.merge = config.spatial_merge_size
        window = getattr(config, "window_size", None)  # Qwen2-VL has none
        self.window = None if window is None else window // self.merge // config.patch_size * self.merge
        self.full = range(config.depth) if window is None else config.fullatt_block_indexes
        # a convolution whose steps are as wide as its kernel
        self.register_buffer("weight", self.tower.patch_embed.proj.weight.detach().flatten(1))

    def forward(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """[patches, numbers of a patch] and int64 [pictures, 3] to [features, hidden + 1]."""
        # with a batch of one, because ONNX Runtime's quantiser fails on products without a batch
        x = nn.functional.linear(pixel_values.to(self.weight.dtype)[None], self.weight)
        positions = patch_positions(image_grid_thw, x.shape[1], self.merge)
        rotations = self.tower.rotary_pos_emb(x, torch.stack([positions.row, positions.column], 1))
        masks = {full: self._mask(positions, None if full else self.window, x.dtype) for full in (True, False)}
        for number, block in enumerate(self.tower.blocks):
            x = x + _attention(block.attn, block.norm1(x), rotations, masks[number in self.full])
            x = x + block.mlp(block.norm2(x))
        merger = self.tower.merger
        features = merger.mlp(merger.ln_q(x).reshape(1, -1, merger.hidden_size))
        return with_flag(features[0], IMAGE_FLAG)

    @staticmethod
    def _mask(positions: PatchPositions, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        return torch.where(positions.blocks(window), 0.0, torch.finfo(dtype).min).to(dtype)[None]


def _attention(
    attention: VisionAttention, x: torch.Tensor, rotations: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor
) -> torch.Tensor:
    """Self-attention of patches [1, patches, width] under `mask` [1, patches, patches]."""
    q, k, v = attention.qkv(x).reshape(x.shape[1], 3, attention.num_heads, -1).permute(1, 2, 0, 3).unbind(0)
    cos, sin = (t[None].float() for t in rotations)
    q, k = ((t.float() * cos + _rotate_half(t.float()) * sin).to(x.dtype) for t in (q, k))
    mixed = nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], mask[None], scale=attention.scaling)
    return attention.proj(mixed.transpose(1, 2).flatten(2))


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    one, two = x.chunk(2, -1)
    return torch.cat([-two, one], -1)
