# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""One reading of an image for its caption and the reply, and for many questions.

A prompt and the request for its caption are the same up to the end of the image: the prefix. Its KV cache, filled when the
caption is written, serves the reply too, which then needs neither the image nor a pass over the prefix. Rows are laid out as
[padding | prefix | padding | rest]: a prefix must stand in the same columns in every prompt that uses its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerationConfig, GenerationMode

from .inputs_shiftdc import ImageArguments, Images, Padding, Prompt, align_prefixes, require_pixels
from .prompts_shiftdc import PromptComposer

#: Arguments of generate() that stand for themselves with a cache that was filled before.
_WITH_CACHE = {"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer", "tokenizer"}
#: Tokens for which there is room behind those of a cache.
SPARE = 128


@dataclass
class ShiftDCImage:
    """The images of a batch of prompts, read once; `shiftdc_image()` makes it, `generate(..., shiftdc_image=)` takes it.

    Questions that follow must start as the prompts did, up to the end of the image. Nothing in here changes while they are
    answered, each from a cache of its own that begins with the prefixes: any number of threads may use it at once.

    Args:
        captions (`list[list[int]]`):
            The captions' token ids, one list per row; empty in rows without an image.
        images (`dict[str, torch.Tensor]`):
            The pixels, by which other images are told apart.
        prefixes (`list[list[int]]`):
            The prompts up to the end of their images.
        cache (`DynamicCache`, *optional*):
            The prefixes' KV cache. Without one (the family, or the prompts, do not allow one) only the captions are used again.
    """

    captions: list[list[int]]
    images: dict[str, torch.Tensor]
    prefixes: list[list[int]]
    cache: DynamicCache | None = None

    def check(self, prompt: Prompt) -> None:
        """Raise ValueError where `prompt` is about other images."""
        if (batch := len(prompt.ids)) != len(self.captions):
            raise ValueError(f"shiftdc_image is of {len(self.captions)} prompts, found {batch}: call shiftdc_image(**inputs).")
        for name, value in prompt.images.items():
            if name in self.images and not torch.equal(value.to(self.images[name].device), self.images[name]):
                raise ValueError(f"shiftdc_image is of other images ({name} differ): call shiftdc_image(**inputs) for these.")

    def rest(self, prompts: Sequence[list[int]]) -> list[list[int]] | None:
        """What stands in the prompts after the prefixes; None where there is no cache or another prefix."""
        if self.cache is None or len(prompts) != len(self.prefixes):
            return None
        pairs = list(zip(prompts, self.prefixes, strict=True))
        # a cache that covered the whole prompt would leave no token to predict from
        fits = all(p[: len(x)] == x and len(p) > len(x) for p, x in pairs)
        return [p[len(x) :] for p, x in pairs] if fits else None

    def own_cache(self) -> DynamicCache | None:
        """The prefixes' cache for one reply, whose tokens are written elsewhere."""
        return None if self.cache is None else copied(self.cache)


def read_images(
    prompt: Prompt,
    composer: PromptComposer,
    images: ImageArguments,
    padding: Padding,
    cache: DynamicCache | None,
    generate: Callable[..., torch.Tensor],
) -> ShiftDCImage:
    """Greedy, uncalibrated captions (arXiv:2502.13095, section 4: the same model describes its own input).

    cache: an empty one, to keep the prefixes in where the prompts allow it. generate: of the base class.
    """
    require_pixels(prompt.images)
    prompts = padding.token_lists(prompt)
    requests = [composer.caption_prompt(p) for p in prompts]
    prefixes = [composer.image_prefix(p) for p in prompts]
    if cache is None or not (prompt.rows.all() and all(prefixes)):
        prefixes, cache = [[] for _ in prompts], None
    rests = [r[len(p) :] for r, p in zip(requests, prefixes, strict=True)]
    ids, mask = align_prefixes(prefixes, rests, padding.filler, prompt.ids.device)
    given = images.of_rows(prompt.images, prompt.rows)
    out = generate(
        **{**given, **images.for_tokens(ids, given)}, input_ids=ids, attention_mask=mask, use_cache=True,
        do_sample=False, num_beams=1, num_return_sequences=1, return_dict_in_generate=False,
        **({} if cache is None else {"past_key_values": cache}),
    )  # fmt: skip
    if cache is not None:
        cache.crop(max(map(len, prefixes)) - cache.get_seq_length())
    end = {padding.filler, *padding.ends}
    written = iter([[t for t in row if t not in end] for row in out[:, ids.shape[1] :].tolist()])
    captions = [next(written) if row else [] for row in prompt.rows.tolist()]
    return ShiftDCImage(captions, _pixels(prompt.images), prefixes, cache)


def _pixels(images: Images) -> dict[str, torch.Tensor]:
    return {k: v for k, v in images.items() if k.startswith("pixel") and v is not None}


def behind_prefixes(
    read: ShiftDCImage, prompt: Prompt, padding: Padding, fixed_columns: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(ids, mask) of `prompt` with its prefixes in the columns of the cache; None where they cannot stand there.

    fixed_columns: the prompt's tokens must stay in the caller's columns, see `reads_padding`.
    """
    rests = read.rest(padding.token_lists(prompt))
    if rests is None:
        return None
    ids, mask = align_prefixes(read.prefixes, rests, padding.filler, prompt.ids.device)
    return None if fixed_columns and not torch.equal(ids, prompt.ids) else (ids, mask)


def takes_cache(config: GenerationConfig, given: Iterable[str]) -> bool:
    """Whether generate() with `config` and the other arguments `given` can go on from a cache as if it had filled it."""
    return (
        config.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and (config.num_return_sequences or 1) == 1
        and config.use_cache is not False
        and config.cache_implementation is None
        and config.prefill_chunk_size is None
        and config.guidance_scale is None
        and not (config.return_dict_in_generate or config.output_attentions or config.token_healing)
        and _WITH_CACHE.issuperset(given)
    )


def reads_padding(config: GenerationConfig, given: Iterable[str]) -> bool:
    """Whether what comes out may depend on the columns that padding takes."""
    return (
        config.max_new_tokens is None
        or bool(config.min_length)
        or any((getattr(config, name, None) or 1.0) != 1.0 for name in ("repetition_penalty", "encoder_repetition_penalty"))
        or bool(config.no_repeat_ngram_size or config.encoder_no_repeat_ngram_size)
        or not {"tokenizer"}.issuperset(given)
    )


class PreallocatedLayer(DynamicLayer):
    """A `DynamicLayer` whose new tokens are written behind the others, which `DynamicLayer` copies for each of them.

    With it a reply and its caption took 0.95 times as long as plain decoding of as many tokens, without it 1.05 times.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, **kwargs: object):
        super().__init__(**kwargs)
        self.buffers: dict[str, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
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
            buffer = new.new_empty(*new.shape[:-2], end + SPARE, new.shape[-1])
            if length:
                buffer[..., :length, :] = kept
            self.buffers[name] = buffer
        self.buffers[name][..., length:end, :] = new
        return self.buffers[name][..., :end, :]

    def _has_room(self, name: str, kept: torch.Tensor, end: int) -> bool:
        """Whether `kept` still lies in its buffer, which other methods may have replaced, and `end` tokens fit."""
        buffer = self.buffers.get(name)
        if buffer is None or kept.data_ptr() != buffer.data_ptr() or kept.shape[:-2] != buffer.shape[:-2]:
            return False
        may_write = torch.is_inference_mode_enabled() or not buffer.is_inference()
        return may_write and end <= buffer.shape[-2]


def new_cache(config: PreTrainedConfig) -> DynamicCache | None:
    """An empty cache; None where its layers forget (sliding windows, recurrent states) and cannot be cut back."""
    cache = DynamicCache(config=config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [PreallocatedLayer() for _ in cache.layers]
    return cache


def copied(cache: DynamicCache) -> DynamicCache:
    """A cache of `PreallocatedLayer`s that holds the same tokens and never writes to theirs."""
    own = DynamicCache()
    own.layers = [_copied(layer) for layer in cache.layers]
    return own


def _copied(layer: DynamicLayer) -> PreallocatedLayer:
    """The tokens themselves are copied with the first new one, into a buffer of its own."""
    own = PreallocatedLayer()
    if layer.is_initialized:
        own.dtype, own.device = layer.dtype, layer.device
        own.keys, own.values = layer.keys, layer.values
        own.is_initialized = True
    return own
