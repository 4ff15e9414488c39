"""One reading of an image for its caption and the reply, and for many questions; travels inside exported checkpoints.

A prompt and the request for its caption are the same up to the end of the image: the prefix. Its KV cache, filled when the
caption is written, serves the reply too, which then needs neither the image nor a pass over the prefix. Rows are laid out as
[padding | prefix | padding | rest]: a prefix must stand in the same columns in every prompt that uses its cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.generation import GenerationConfig, GenerationMode

from .modeling_shiftdc_cache import copied, new_cache

if TYPE_CHECKING:  # what the mixin is mixed into
    from transformers import PreTrainedModel as _Model
else:
    _Model = object

#: Arguments of generate() that stand for themselves with a cache that was filled before.
_WITH_CACHE = {"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer", "tokenizer"}


@dataclass
class ShiftDCImage:
    """The images of a batch of prompts, read once: `captions` as token ids, one list per row, and the prefixes' KV cache.

    Without a cache (the family, or the prompts, do not allow one) only the captions are used again. Questions that follow must
    start as the prompts did, up to the end of the image. Nothing in here changes while they are answered, each from a cache of
    its own that begins with the prefixes: any number of threads may use it at once.
    """

    captions: list[list[int]]
    images: dict[str, torch.Tensor]
    prefixes: list[list[int]]
    cache: DynamicCache | None = None

    def check(self, prompt: dict[str, Any]) -> None:
        """Raise ValueError where the inputs `prompt` are about other images."""
        if (batch := len(prompt["input_ids"])) != len(self.captions):
            raise ValueError(f"shiftdc_image is of {len(self.captions)} prompts, found {batch}: call shiftdc_image(**inputs).")
        for name, value in prompt.items():
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

    def crop(self) -> None:
        """Leave nothing but the prefixes in the cache."""
        if self.cache is not None:
            self.cache.crop(-(self.cache.get_seq_length() - max(map(len, self.prefixes))))

    def own_cache(self) -> DynamicCache:
        """The prefixes' cache for one reply, whose tokens are written elsewhere."""
        assert self.cache is not None
        return copied(self.cache)


def laid_out(
    prefixes: Sequence[list[int]], rests: Sequence[list[int]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), int64 [batch, time]: [padding | prefix | padding | rest]."""
    ids, mask = [], []
    width, length = max(map(len, prefixes)), max(map(len, rests))
    for prefix, rest in zip(prefixes, rests, strict=True):
        before, between = width - len(prefix), length - len(rest)
        ids.append([pad] * before + prefix + [pad] * between + rest)
        mask.append([0] * before + [1] * len(prefix) + [0] * between + [1] * len(rest))
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


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


class ShiftDCPrefixMixin(_Model):
    """The part of `ShiftDCMixin` that reads images: captions, and the cache that goes with them."""

    #: Whether the cache of a prompt's beginning, up to the end of the image, is the same whatever follows.
    shiftdc_shares_prefix = True

    if TYPE_CHECKING:  # of ShiftDCMixin
        shiftdc_composer: Any
        _shiftdc_aside: Any
        _shiftdc_eos_ids: Any
        _shiftdc_image_rows: Any
        _shiftdc_of_rows: Any
        _shiftdc_pad_id: Any
        _shiftdc_prompts: Any
        _shiftdc_require_pixels: Any
        _shiftdc_typed: Any

    @torch.no_grad()
    def shiftdc_image(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **image_inputs: Any
    ) -> ShiftDCImage:
        """Read the images of a batch of prompts once, for many questions: `generate(**inputs, shiftdc_image=...)`.

        A caption in view of the request stays the one of the request here; `caption_style: describe` or `naming` at export
        makes captions that serve every question. Raises ValueError where the checkpoint's reference is no caption.
        """
        if self.config.shiftdc["reference"] != "caption":
            raise ValueError("shiftdc_image() is for checkpoints with 'reference: caption'; the others write no caption.")
        return self._shiftdc_read(input_ids, attention_mask, keep=True, **image_inputs)

    @torch.no_grad()
    def shiftdc_captions(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **image_inputs: Any
    ) -> list[list[int]]:
        """The model's own captions as token ids, one list per row; empty in rows without an image."""
        return self._shiftdc_read(input_ids, attention_mask, keep=False, **image_inputs).captions

    @torch.no_grad()
    def _shiftdc_read(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, keep: bool, **image_inputs: Any
    ) -> ShiftDCImage:
        """Greedy, uncalibrated captions (arXiv:2502.13095, section 4: the same model describes its own input).

        keep: with the cache, where the family and these prompts allow it.
        """
        rows = self._shiftdc_image_rows(input_ids)
        prompts = self._shiftdc_prompts(input_ids, attention_mask, rows)
        if not prompts:
            return ShiftDCImage([[] for _ in input_ids], {}, [])
        self._shiftdc_require_pixels(image_inputs)
        prefixes = [self.shiftdc_composer.image_prefix(p) for p in prompts]
        asked = [self.shiftdc_composer.caption_prompt(p) for p in prompts]
        cache = new_cache(self.config) if keep and rows.all() and all(prefixes) and self._shiftdc_keeps_cache() else None
        if cache is None:
            prefixes = [[] for _ in prompts]
        rests = [a[len(p) :] for a, p in zip(asked, prefixes, strict=True)]
        ids, mask = laid_out(prefixes, rests, self._shiftdc_pad_id(), input_ids.device)
        settings = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}
        given = self._shiftdc_typed(ids, self._shiftdc_of_rows(image_inputs, rows))
        with self._shiftdc_aside():
            out = super().generate(
                input_ids=ids, attention_mask=mask, shiftdc=False, **given, **settings, use_cache=True,
                max_new_tokens=self.config.shiftdc["caption_max_new_tokens"],
                **({} if cache is None else {"past_key_values": cache}),
            )  # fmt: skip
        end = {self._shiftdc_pad_id(), *self._shiftdc_eos_ids()}
        written = iter([[t for t in row if t not in end] for row in out[:, ids.shape[1] :].tolist()])
        captions = [next(written) if row else [] for row in rows.tolist()]
        pixels = {k: v for k, v in image_inputs.items() if k.startswith("pixel") and v is not None}
        read = ShiftDCImage(captions, pixels, prefixes, cache)
        read.crop()
        return read

    def _shiftdc_keeps_cache(self) -> bool:
        return self.shiftdc_shares_prefix and self.generation_config.cache_implementation is None

    def _shiftdc_takes_cache(self, prompt: dict[str, Any], kwargs: dict[str, Any]) -> bool:
        """Whether a reply with these arguments of generate() may go on from the cache of a `ShiftDCImage`."""
        if self.config.shiftdc["rule"] != "sequential" or not self._shiftdc_keeps_cache():
            return False
        return takes_cache(*self._shiftdc_settings(prompt, kwargs))

    def _shiftdc_settings(self, prompt: dict[str, Any], kwargs: dict[str, Any]) -> tuple[GenerationConfig, set[str]]:
        """The settings of a call of generate(), and the names of its other arguments."""
        given = {k: v for k, v in kwargs.items() if k not in prompt and v is not None}
        config = given.pop("generation_config", None)
        settings, others = self._prepare_generation_config(config, **given)
        return settings, set(others)

    def _shiftdc_laid_out(
        self, read: ShiftDCImage, prompt: dict[str, Any], kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(ids, mask) of prompts whose prefixes stand in the columns of the cache; None where they cannot."""
        ids = prompt["input_ids"]
        everything = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        prompts = self._shiftdc_prompts(ids, prompt.get("attention_mask"), everything)
        rests = read.rest(prompts)
        if rests is None:
            return None
        moved = laid_out(read.prefixes, rests, self._shiftdc_pad_id(), ids.device)
        same = torch.equal(moved[0], ids)
        return moved if same or not reads_padding(*self._shiftdc_settings(prompt, kwargs)) else None

    def _shiftdc_continue(self, laid: tuple[torch.Tensor, torch.Tensor], prompt: dict[str, Any], **kwargs: Any) -> Any:
        """Replies from a cache of the prefixes, behind the prompts of `prompt`."""
        ids, mask = laid
        length, own = ids.shape[1], prompt["input_ids"]
        out = super().generate(input_ids=ids, attention_mask=mask, shiftdc_prompt_length=length, **kwargs)
        return torch.cat([own.to(out.device), out[:, length:]], dim=1)
