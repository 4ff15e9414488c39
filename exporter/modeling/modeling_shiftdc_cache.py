"""The KV cache that a caption and the replies share; travels inside exported checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

#: Tokens for which there is room behind those of a cache.
ROOM = 128


class RoomyLayer(DynamicLayer):
    """A `DynamicLayer` whose new tokens are written behind the others, which `DynamicLayer` copies for each of them."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.rooms: dict[str, torch.Tensor] = {}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        """As `DynamicLayer.update`: (keys, values), [batch, heads, time, head size] each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        self.keys = self._appended("keys", self.keys, key_states, length)
        self.values = self._appended("values", self.values, value_states, length)
        return self.keys, self.values

    def _appended(self, name: str, kept: torch.Tensor, new: torch.Tensor, length: int) -> torch.Tensor:
        end = length + new.shape[-2]
        if not self._has_room(name, kept, end):
            room = new.new_empty(*new.shape[:-2], end + ROOM, new.shape[-1])
            if length:
                room[..., :length, :] = kept
            self.rooms[name] = room
        self.rooms[name][..., length:end, :] = new
        return self.rooms[name][..., :end, :]

    def _has_room(self, name: str, kept: torch.Tensor, end: int) -> bool:
        """Whether `kept` still lies in its room, which other methods may have replaced, and `end` tokens fit."""
        room = self.rooms.get(name)
        if room is None or kept.data_ptr() != room.data_ptr() or kept.shape[:-2] != room.shape[:-2]:
            return False
        may_write = torch.is_inference_mode_enabled() or not room.is_inference()
        return may_write and end <= room.shape[-2]


def new_cache(config: Any) -> DynamicCache | None:
    """An empty cache; None where its layers forget (sliding windows, recurrent states) and cannot be cut back."""
    cache = DynamicCache(config=config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [RoomyLayer() for _ in cache.layers]
    return cache


def copied(cache: DynamicCache) -> DynamicCache:
    """A cache of `RoomyLayer`s that holds the same tokens and never writes to theirs."""
    own = DynamicCache()
    own.layers = [_copied(layer) for layer in cache.layers]
    return own


def _copied(layer: Any) -> RoomyLayer:
    """The tokens themselves are copied with the first new one, into a room of its own."""
    own = RoomyLayer()
    if layer.is_initialized:
        own.dtype, own.device = layer.dtype, layer.device
        own.keys, own.values = layer.keys, layer.values
        own.is_initialized = True
    return own
