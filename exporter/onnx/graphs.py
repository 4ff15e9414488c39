"""The three graphs of an export as torch modules: vision encoder, token embedding, calibrated decoder.

Names and dimensions are those that transformers.js expects; interface.py says how a reference reaches the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from exporter.onnx.attention import attended_positions, with_padding_zeroed
from exporter.onnx.interface import AMOUNTS, END_FLAG, EXACT, IMAGE_FLAG, OFF, SCALE, STATIC

#: Attention masks by what is no padding, what is an image, dtype and the decoder's config; by kind of layer where they differ.
Masks = Callable[[torch.Tensor, torch.Tensor, torch.dtype, PretrainedConfig], torch.Tensor | dict[str, torch.Tensor]]

#: A position that no message has: what lies behind a message's last number.
_NOTHING = torch.iinfo(torch.int64).min


def with_flag(features: torch.Tensor, flag: torch.Tensor | float) -> torch.Tensor:
    """`features` [..., hidden] as float32 with one more channel."""
    features = features.float()
    return torch.cat([features, torch.ones_like(features[..., :1]) * flag], -1)


class LlavaVision(nn.Module):
    """Pixels to image features. get_image_features() would freeze the number of images, so its steps are called."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        chosen = model.config.vision_feature_layer
        self.chosen = [chosen] if isinstance(chosen, int) else list(chosen)
        self.first = 1 if model.config.vision_feature_select_strategy == "default" else 0

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[images, channels, height, width] to [images, features, hidden + 1]."""
        pixels = pixel_values.to(next(self.tower.parameters()).dtype)
        states = self.tower(pixels, output_hidden_states=True).hidden_states
        features = torch.cat([states[i][:, self.first :] for i in self.chosen], -1)
        return with_flag(self.projector(features), IMAGE_FLAG)


class Gemma3Vision(nn.Module):
    """Pixels to image features."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[images, channels, height, width] to [images, features, hidden + 1]."""
        pixels = pixel_values.to(next(self.tower.parameters()).dtype)
        return with_flag(self.projector(self.tower(pixels).last_hidden_state), IMAGE_FLAG)


class Idefics3Vision(nn.Module):
    """Pixels to image features. Tiles that only fill up a batch are left out at the end."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.tower, self.connector = model.model.vision_model, model.model.connector
        self.patch = model.config.vision_config.patch_size

    def forward(self, pixel_values: torch.Tensor, pixel_attention_mask: torch.Tensor) -> torch.Tensor:
        """[batch, tiles, channels, height, width] and [batch, tiles, height, width] to [real tiles, features, hidden + 1]."""
        pixels, mask = pixel_values.flatten(0, 1), pixel_attention_mask.flatten(0, 1)
        real = (pixels != 0).flatten(1).any(-1)
        patches = mask.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch)
        attended_patches = (patches.sum((-1, -2)) > 0) | ~real[:, None, None]  # a tile of nothing would be NaN
        pixels = pixels.to(next(self.tower.parameters()).dtype)
        states = self.tower(pixel_values=pixels, patch_attention_mask=attended_patches).last_hidden_state
        return with_flag(self.connector(states), IMAGE_FLAG)[real]


class Embedding(nn.Module):
    """Token ids to embeddings."""

    end_ids: torch.Tensor

    def __init__(self, model: PreTrainedModel, end_ids: Sequence[int]):
        super().__init__()
        self.embedding = model.get_input_embeddings()
        self.register_buffer("end_ids", torch.tensor(end_ids))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[batch, time] to [batch, time, hidden + 1]."""
        ends = (input_ids[..., None] == self.end_ids).any(-1, keepdim=True)
        return with_flag(self.embedding(input_ids), END_FLAG * ends.float())


@dataclass
class Corrections:
    """How the rows of one forward are corrected; goes through the layers as a keyword argument.

    rows, kind [batch]; target, directions, shifts [batch or 1, layers, ...] float32; coordinates are collected on the way.
    """

    rows: torch.Tensor
    kind: torch.Tensor
    target: torch.Tensor
    strength: torch.Tensor
    one_sided: torch.Tensor
    directions: torch.Tensor
    shifts: torch.Tensor
    coordinates: list[torch.Tensor]

    def correct(self, hidden: torch.Tensor) -> torch.Tensor:
        """The next calibrated layer's output [batch, time, hidden], corrected at its last token, in float32."""
        column = len(self.coordinates)
        direction = self.directions[column]
        last = hidden[:, -1]
        x = last.float()
        coordinate = (x * direction).sum(-1)  # no MatMul: quantisation must not touch it
        self.coordinates.append(coordinate)
        target = self.target[:, column]
        amount = torch.where(self.kind == AMOUNTS, target, self.shifts[column])
        amount = torch.where(self.kind == EXACT, coordinate - target, amount)
        amount = torch.where((self.one_sided > 0) & (amount < 0), 0.0, amount) * self.strength
        moved = (x - amount[:, None] * direction).to(hidden.dtype)
        change = self.rows & (self.kind != OFF) & (amount != 0)  # elsewhere the row keeps its own bits
        return torch.cat([hidden[:, :-1], torch.where(change[:, None], moved, last)[:, None]], 1)


def _calibrated(
    layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: torch.Tensor | tuple[torch.Tensor, ...]
) -> torch.Tensor | tuple[torch.Tensor, ...] | None:
    """Forward hook of a calibrated layer."""
    corrections = kwargs.get("shiftdc_graph")
    if not isinstance(corrections, Corrections):
        return None
    if isinstance(output, tuple):
        return (corrections.correct(output[0]), *output[1:])
    return corrections.correct(output)


class Decoder(nn.Module):
    """Embeddings and a flat key-value cache to logits, coordinates and the longer cache.

    Positions follow from the mask, so that `position_ids` may carry a message.
    """

    directions: torch.Tensor
    shifts: torch.Tensor
    end_logits: torch.Tensor

    def __init__(self, model: PreTrainedModel, masks: Masks, end_ids: Sequence[int]):
        super().__init__()
        self.masks = masks
        self.language_model, self.head = model.get_decoder(), model.get_output_embeddings()
        corrections = model.shiftdc_corrections
        self.register_buffer("directions", torch.stack([c.direction.float() for c in corrections]))
        self.register_buffer("shifts", torch.stack([c.shift.float() for c in corrections]))
        end_logits = torch.full((self.head.weight.shape[0],), -1e4)
        end_logits[end_ids[0]] = 0.0
        self.register_buffer("end_logits", end_logits)
        layers = model.get_submodule(model.config.shiftdc["traits"]["decoder_layers"])
        self.hooks = [layers[i].register_forward_hook(_calibrated, with_kwargs=True) for i in model.config.shiftdc["layers"]]

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        mode: torch.Tensor,
        target: torch.Tensor,
        strength: torch.Tensor,
        one_sided: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Returns logits [batch, time, vocabulary], coordinates, what `messages()` gives, and keys and values of every layer."""
        flag, x = inputs_embeds[..., -1], inputs_embeds[..., :-1].to(past[0].dtype)
        time = flag.shape[1]
        attended = attended_positions(attention_mask, past[0], time)
        counted = (attended.cumsum(1) - 1).clamp(min=0)[:, -time:]
        image = (flag > IMAGE_FLAG / 2) & (flag < (IMAGE_FLAG + END_FLAG) / 2)
        positions, kind, target = self.read(position_ids, counted, mode, target)
        corrections = Corrections(
            rows=image.any(-1),
            kind=kind,
            target=target,
            strength=strength,
            one_sided=one_sided,
            directions=self.directions,
            shifts=self.shifts,
            coordinates=[],
        )
        cache = DynamicCache([(past[i], past[i + 1]) for i in range(0, len(past), 2)])
        states = self.language_model(
            inputs_embeds=x,
            attention_mask=self.masks(attended, image, x.dtype, self.language_model.config),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            shiftdc=False,
            shiftdc_graph=corrections,
        ).last_hidden_state
        logits = self.head(states).float()
        # transformers.js stops when all rows end in the same step: one that has ended goes on ending
        ended = (flag > (IMAGE_FLAG + END_FLAG) / 2).all(1)
        logits = torch.where(ended[:, None, None], self.end_logits, logits)
        coordinates = torch.stack(corrections.coordinates, 1)
        presents = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        presents[0] = with_padding_zeroed(presents[0], attended)
        return logits, coordinates, *self.messages(coordinates), *presents

    def read(
        self, position_ids: torch.Tensor, counted: torch.Tensor, mode: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(positions, kind [batch], target [batch, layers]) by the inputs; `counted` [batch, time]: positions by the mask."""
        kind, target_in_message = read_message(position_ids, self.shifts.shape[0])
        return counted, torch.where(mode > 0, mode, kind), torch.where((mode > 0)[:, None], target, target_in_message)

    def messages(self, coordinates: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Coordinates as a message, where the graph reads messages."""
        return (message(coordinates),)


class GridDecoder(Decoder):
    """A decoder whose `position_ids` [3, batch, time] are needed: they follow from the shapes of the pictures."""

    def read(
        self, position_ids: torch.Tensor, counted: torch.Tensor, mode: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # no position is above the count of tokens; transformers.js 4.3.1 has some that are, while it answers a prompt of text
        return torch.minimum(position_ids, counted[None]), mode.expand(counted.shape[0]), target

    def messages(self, coordinates: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ()


def read_message(position_ids: torch.Tensor, layers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(kind [batch], target [batch, layers]) of what lies in `position_ids`; ordinary positions are STATIC.

    A message for another number of layers is ignored: the row gets the baked shift.
    """
    padded = torch.cat([position_ids, torch.full_like(position_ids[:, :1], _NOTHING).expand(-1, layers + 2)], 1)
    code = -padded[:, 0]
    whole = (padded[:, layers] != _NOTHING) & (padded[:, layers + 1] == _NOTHING)
    known = (code == OFF) | (((code == EXACT) | (code == AMOUNTS)) & whole)
    return torch.where(known, code, STATIC), padded[:, 1 : layers + 1].float() / SCALE


def message(coordinates: torch.Tensor) -> torch.Tensor:
    """int64 [batch, layers + 1] of kind EXACT."""
    numbers = torch.round(coordinates * SCALE).long()
    return torch.cat([torch.full_like(numbers[:, :1], -EXACT), numbers], 1)
