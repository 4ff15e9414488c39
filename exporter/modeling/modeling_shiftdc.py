"""ShiftDC inside a vision-language model: what every family shares, loading and generation.

This file travels inside exported checkpoints and imports torch and transformers only. A family adds a config class and a
model class that puts `ShiftDCMixin` before its transformers class; nothing else differs between families.

Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095, Eq. 5-7. With a
unit direction `d` that points from unsafe to safe, Eq. 7 replaces the coordinate `x.d` of the image prompt by the coordinate
`r` of its text-only counterpart: `x' = x - strength * (x.d - r) d`, at the last prompt token of rows that hold an image, once,
while the prompt is read. `gate: one-sided` corrects `max(0, x.d - r)` only, so that no input is ever moved toward "safe".
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import is_peft_available, logging

from .modeling_shiftdc_config import FORMAT_VERSION
from .modeling_shiftdc_correction import ShiftDCCorrection, ShiftDCReadout, calibrate
from .modeling_shiftdc_prefix import ShiftDCImage, ShiftDCPrefixMixin
from .modeling_shiftdc_prompts import PromptPieces

logger = logging.get_logger(__name__)

#: Arguments of from_pretrained() that say how to fetch, for the adapter as for the model.
_FETCHING = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")

#: Arguments of forward() that describe text, caching or output; all others describe the image.
_NOT_IMAGE_INPUTS = {
    "self", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "cache_position", "labels",
    "use_cache", "logits_to_keep", "output_attentions", "output_hidden_states", "return_dict", "kwargs", "token_type_ids",
    "mm_token_type_ids", "rope_deltas", "shiftdc", "shiftdc_reference", "shiftdc_correction", "shiftdc_position",
}  # fmt: skip
#: Arguments that say of each token whether it is part of an image; made anew for prompts that are composed here.
_TOKEN_TYPES = {"token_type_ids", "mm_token_type_ids"}


class ShiftDCMixin(ShiftDCPrefixMixin):
    """A calibrated `...ForConditionalGeneration`; put it before the transformers class in the list of bases.

    `generate()` and `forward()` take, beside what the base class takes:
        shiftdc: False gives the base model, token for token.
        shiftdc_reference: float32 [batch, calibrated layers], coordinates `r` to correct to.
        shiftdc_captions (generate only): one sequence of caption token ids per row, used instead of the model's own caption.
        shiftdc_image (generate only): what `shiftdc_image()` read of these images, used instead of reading them again.
    """

    #: Every pixel of the blank reference, after normalisation: the processor's mean colour.
    shiftdc_blank_pixel = 0.0
    #: Attributes of the backbone in which the base class keeps something from one pass to the next.
    shiftdc_kept: tuple[str, ...] = ()
    #: Image inputs that have an entry for every row of the batch, with an image or without.
    shiftdc_row_inputs: frozenset[str] = frozenset()

    @staticmethod
    def shiftdc_backbone(model: Any, **inputs: Any) -> None:
        """One pass of `model` (this class, or the transformers class) through its decoder layers, without cache."""
        model.model(**inputs, use_cache=False)

    @staticmethod
    def shiftdc_token_inputs(ids: torch.Tensor, image_token_id: int, given: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Inputs as long as the prompt, for prompts `ids` [batch, time] that were composed here; `given`: the original ones.

        By default those that mark a token of an image by 1, where the original prompt has them.
        """
        return {name: (ids == image_token_id).long() for name in given if name in _TOKEN_TYPES}

    @staticmethod
    def shiftdc_image_layers(text_config: Any) -> frozenset[int]:
        """Decoder layers that prompts without an image skip: they have no text-only coordinate and cannot be calibrated."""
        return frozenset()

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "_shiftdc_base_forward"):  # a subclass of a calibrated class; transformers makes one when loading
            return
        stock = (c for c in cls.__mro__ if c.__module__.startswith("transformers.") and "forward" in c.__dict__)
        base: Any = next(stock, None)
        if base is None:  # a mixin
            return
        strict = getattr(base, "_keep_in_fp32_modules_strict", None) or ()
        cls._keep_in_fp32_modules_strict = {*strict, "shiftdc"}
        setattr(cls, "forward", _with_shiftdc_arguments(cls.forward, base.forward))  # noqa: B010 (mypy: a method)
        cls._shiftdc_base_forward = base.forward

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        settings = getattr(config, "shiftdc", None)
        if not isinstance(settings, dict):
            raise ValueError("config.json has no 'shiftdc' block: this checkpoint was not written by shiftdc-export.")
        if settings.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"config.shiftdc.version is {settings.get('version')!r}, expected {FORMAT_VERSION}: "
                "this modeling file belongs to another export; export the checkpoint again."
            )
        self._shiftdc_ready = False
        self._shiftdc_pieces = PromptPieces(settings["prompt"], config.image_token_id)
        layers = self.get_submodule(settings["decoder_layers"])
        hidden_size = config.get_text_config().hidden_size
        for column, index in enumerate(settings["layers"]):
            layers[index].shiftdc = ShiftDCCorrection(
                hidden_size, column, float(settings["strength"]), settings["gate"] == "one-sided"
            )
            layers[index].register_forward_hook(calibrate, with_kwargs=True)
        self.register_load_state_dict_post_hook(_recheck)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ShiftDCCorrection):  # reached for buffers that the checkpoint lacks
            for buffer in (module.direction, module.shift):
                if not getattr(buffer, "_is_hf_initialized", False):
                    buffer.fill_(torch.nan)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        where = {k: kwargs[k] for k in _FETCHING if kwargs.get(k) is not None}  # super() takes them out
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._shiftdc_load_adapter(where)
        model.shiftdc_check()
        return loaded

    def _shiftdc_load_adapter(self, where: dict[str, Any]) -> None:
        """Load the PEFT adapter of an export with `--keep-adapter`, from a folder of its own. Raises ImportError, ValueError.

        At the top transformers would take a Hub checkpoint for an adapter alone, and load the uncalibrated base model.
        """
        folder = self.config.shiftdc.get("adapter")
        if folder is None:
            return
        if not is_peft_available():
            raise ImportError("This checkpoint was calibrated together with its PEFT adapter and needs it: pip install peft.")
        loading = self.load_adapter(self.name_or_path, adapter_kwargs={"subfolder": folder, **where}, use_safetensors=True)
        if loading is None or loading.missing_keys or loading.mismatched_keys:
            raise ValueError(f"The adapter in {folder}/ is incomplete; fetch the checkpoint again, or export it again.")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        if self.config.shiftdc.get("adapter") is not None:
            raise ValueError("save_pretrained() would write the adapter without the model; export again with the adapter merged.")
        super().save_pretrained(*args, **kwargs)

    @property
    def shiftdc_corrections(self) -> list[ShiftDCCorrection]:
        """The corrections of the calibrated layers, in the order of `shiftdc_reference`'s columns."""
        layers = self.get_submodule(self.config.shiftdc["decoder_layers"])
        return [layers[i].shiftdc for i in self.config.shiftdc["layers"]]

    def shiftdc_check(self) -> None:
        """Raise ValueError unless every buffer is there, finite, and every direction of unit norm, and the adapter is there."""
        if self.config.shiftdc.get("adapter") is not None and not getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError("This checkpoint was calibrated together with its PEFT adapter: load it with from_pretrained().")
        for layer, correction in zip(self.config.shiftdc["layers"], self.shiftdc_corrections, strict=True):
            direction, shift = correction.direction, correction.shift
            if direction.is_meta:
                continue  # offloaded: checked when its layer runs on a real device
            finite = bool(torch.isfinite(direction).all() and torch.isfinite(shift))
            if not finite or abs(direction.norm().item() - 1) > 1e-3:
                raise ValueError(
                    f"The ShiftDC buffers of decoder layer {layer} are missing or damaged (expected a finite direction of norm "
                    f"1, found norm {direction.norm().item():.4g}): the model would run uncalibrated. Load a complete "
                    "checkpoint (shiftdc.safetensors must be in its index), or export it again."
                )
        self._shiftdc_ready = True

    def forward(
        self,
        *,
        shiftdc: bool | None = None,
        shiftdc_reference: torch.Tensor | None = None,
        shiftdc_correction: torch.Tensor | None = None,
        shiftdc_position: torch.Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """The base class's forward, corrected at the last prompt token of rows that hold an image.

        shiftdc_reference, shiftdc_correction: see `ShiftDCCorrection.forward`. shiftdc_position: int64 [batch], the token to
        correct (-1: none); by default the last one, or the last one before the first label. Without a reference the baked mean
        shift is used, because one forward pass cannot write a caption: use generate(), or pass `shiftdc_reference`.
        """
        if shiftdc is False:
            return super().forward(**inputs)
        if not self._shiftdc_ready:
            self.shiftdc_check()
        if shiftdc_position is None:
            shiftdc_position = self._shiftdc_last_prompt_token(inputs)
        if shiftdc_position is None:
            return super().forward(**inputs)
        settings = self.config.shiftdc
        if shiftdc_correction is None and shiftdc_reference is None and settings["reference"] != "static":
            logger.warning_once(
                f"forward() got no shiftdc_reference, so the mean shift baked at export is used instead of the "
                f"'{settings['reference']}' reference; generate() computes that reference itself."
            )
        if shiftdc_correction is None and shiftdc_reference is not None and settings["rule"] == "precomputed":
            shiftdc_correction = self._shiftdc_coordinates(inputs, shiftdc_position) - shiftdc_reference
        return super().forward(
            **inputs,
            shiftdc_position=shiftdc_position,
            shiftdc_reference=shiftdc_reference,
            shiftdc_correction=shiftdc_correction,
        )

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args: Any,
        shiftdc: bool | None = None,
        shiftdc_reference: torch.Tensor | None = None,
        shiftdc_captions: Sequence[Sequence[int] | torch.Tensor] | None = None,
        shiftdc_image: ShiftDCImage | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' generate(), calibrated. Rows without an image are those of the base model, bit for bit.

        Raises ValueError where the image rows cannot be known (`inputs_embeds` without `input_ids`, `assistant_model`) or the
        reference cannot be computed; `shiftdc=False` gives the base model in every case.
        """
        generate = functools.partial(super().generate, *(() if inputs is None else (inputs, *args)))
        if shiftdc is False:
            return generate(shiftdc=False, **kwargs)
        if not self._shiftdc_ready:
            self.shiftdc_check()
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if input_ids is None:
            raise ValueError(
                "generate() needs input_ids to see which rows hold an image; or pass shiftdc=False (no calibration)."
            )
        if kwargs.get("assistant_model") is not None:
            raise ValueError(
                "assistant_model is not supported with calibration; drop it, or pass shiftdc=False (no calibration)."
            )
        rows = self._shiftdc_image_rows(input_ids)
        if not rows.any():
            return generate(shiftdc=False, **kwargs)
        prompt = {"input_ids": input_ids, **self._shiftdc_prompt_inputs(kwargs)}
        takes_cache = self._shiftdc_takes_cache(prompt, args, kwargs)
        read = shiftdc_image
        if read is not None:
            read.check(prompt)
        elif shiftdc_reference is None and shiftdc_captions is None and self.config.shiftdc["reference"] == "caption":
            read = self._shiftdc_read(**prompt, keep=takes_cache)
        captions = shiftdc_captions if read is None else read.captions
        amounts = self._shiftdc_amounts(prompt, rows, shiftdc_reference, captions)
        shared = self._shiftdc_laid_out(read, prompt, args, kwargs) if read is not None and takes_cache else None
        if read is not None and shared is not None:
            kwargs = {k: v for k, v in kwargs.items() if k not in prompt}
            return self._shiftdc_continue(read, shared, prompt, *args, shiftdc_rows=rows, **amounts, **kwargs)
        if shiftdc_image is not None:  # which may stand for the pixels only where its cache is used
            self._shiftdc_require_pixels({k: v for k, v in prompt.items() if k not in ("input_ids", "attention_mask")})
        return generate(shiftdc_rows=rows, shiftdc_prompt_length=input_ids.shape[1], **amounts, **kwargs)

    def _shiftdc_amounts(
        self,
        prompt: dict[str, Any],
        rows: torch.Tensor,
        reference: torch.Tensor | None,
        captions: Sequence[Sequence[int] | torch.Tensor] | None,
    ) -> dict[str, torch.Tensor]:
        """What the corrections are computed from, as an argument of forward(); nothing for the baked shift."""
        if reference is None and self.config.shiftdc["reference"] == "static":
            return {}
        if reference is None:
            reference = self.shiftdc_reference(**prompt, captions=captions)
        ids = prompt["input_ids"]
        reference = self._shiftdc_validated(reference, len(ids))
        if self.config.shiftdc["rule"] == "sequential":
            return {"shiftdc_reference": reference}
        last = torch.where(rows, ids.shape[1] - 1, -1)
        return {"shiftdc_correction": self._shiftdc_coordinates(prompt, last) - reference}

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        shiftdc_rows: torch.Tensor | None = None,
        shiftdc_prompt_length: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )
        if shiftdc_rows is None or shiftdc_prompt_length is None:
            return model_inputs
        position = position_to_correct(model_inputs, past_key_values, shiftdc_rows, shiftdc_prompt_length)
        if position is not None:
            model_inputs["shiftdc_position"] = position
        else:
            for name in ("shiftdc_reference", "shiftdc_correction"):
                model_inputs.pop(name, None)
            model_inputs["shiftdc"] = False
        return model_inputs

    @torch.no_grad()
    def shiftdc_reference(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        captions: Sequence[Sequence[int] | torch.Tensor] | None = None,
        **image_inputs: Any,
    ) -> torch.Tensor:
        """Target coordinates of a batch of prompts, float32 [batch, calibrated layers]; 0 in rows without an image.

        The kind is config.shiftdc["reference"]: `caption` (the paper; the model captions the image unless `captions` are
        given), `text` (the request alone) or `blank` (the same prompt with a neutral image).
        """
        settings = self.config.shiftdc
        kind = "caption" if captions is not None else settings["reference"]
        if kind == "static":
            raise ValueError("A checkpoint with 'reference: static' has no reference pass: its shift is baked in.")
        if captions is not None and len(captions) != len(input_ids):
            raise ValueError(f"shiftdc_captions needs one caption per row: expected {len(input_ids)}, found {len(captions)}.")
        rows = self._shiftdc_image_rows(input_ids)
        if captions is None and kind == "caption" and rows.any():
            captions = self.shiftdc_captions(input_ids, attention_mask, **image_inputs)
        prompts = self._shiftdc_prompts(input_ids, attention_mask, rows)
        image_inputs = self._shiftdc_of_rows(image_inputs, rows)
        if kind == "blank":
            pixels = {k: self._shiftdc_blank(v) if k == "pixel_values" else v for k, v in image_inputs.items()}
            self._shiftdc_require_pixels(pixels)
            ids, mask = self._shiftdc_left_padded(prompts, input_ids)
            coordinates = self._shiftdc_last_coordinates(ids, mask, pixels)
        else:
            texts: Sequence[list[int] | None] = [None] * len(prompts)
            if captions is not None:
                texts = [list(map(int, c)) for c, r in zip(captions, rows.tolist(), strict=True) if r]
            pieces = self._shiftdc_pieces
            counterparts = [pieces.text_prompt(p, c) for p, c in zip(prompts, texts, strict=True)]
            coordinates = self._shiftdc_last_coordinates(*self._shiftdc_left_padded(counterparts, input_ids), {})
        reference = coordinates.new_zeros(len(input_ids), coordinates.shape[1])
        reference[rows.to(reference.device)] = coordinates
        return reference

    @torch.no_grad()
    def shiftdc_coordinates(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **image_inputs: Any
    ) -> torch.Tensor:
        """Uncorrected coordinates `x.d` of the last token of every row, float32 [batch, calibrated layers]."""
        mask = attention_mask if attention_mask is not None else self._shiftdc_unpadded(input_ids)
        return self._shiftdc_coordinates(
            {"input_ids": input_ids, "attention_mask": attention_mask, **image_inputs}, _last_true(mask)
        )

    def _shiftdc_last_coordinates(self, ids: torch.Tensor, mask: torch.Tensor, image_inputs: dict[str, Any]) -> torch.Tensor:
        last = torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
        typed = self._shiftdc_typed(ids, image_inputs)
        return self._shiftdc_coordinates({"input_ids": ids, "attention_mask": mask, **typed}, last)

    def _shiftdc_typed(self, ids: torch.Tensor, image_inputs: dict[str, Any]) -> dict[str, Any]:
        """`image_inputs` for the composed prompts `ids`."""
        return {**image_inputs, **self.shiftdc_token_inputs(ids, self.config.image_token_id, image_inputs)}

    def _shiftdc_prompts(self, ids: torch.Tensor, mask: torch.Tensor | None, rows: torch.Tensor) -> list[list[int]]:
        """The prompts of `rows`, without padding."""
        mask = mask if mask is not None else self._shiftdc_unpadded(ids)
        return [r[m.bool()].tolist() for r, m in zip(ids[rows], mask[rows], strict=True)]

    def _shiftdc_of_rows(self, image_inputs: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
        return {k: v[rows] if k in self.shiftdc_row_inputs else v for k, v in image_inputs.items()}

    def _shiftdc_blank(self, pixels: torch.Tensor) -> torch.Tensor:
        """A neutral image for every image; what is only padding (all zeros) stays padding."""
        if self.shiftdc_blank_pixel == 0:
            return torch.zeros_like(pixels)
        images = pixels.flatten(-3).ne(0).any(-1)[..., None, None, None]
        return images.to(pixels.dtype).expand_as(pixels) * self.shiftdc_blank_pixel

    def _shiftdc_coordinates(self, inputs: dict[str, Any], position: torch.Tensor) -> torch.Tensor:
        """`x.d` at `position` [batch] after every calibrated layer of an uncorrected pass through the backbone."""
        readout = ShiftDCReadout(len(self.config.shiftdc["layers"]))
        dropped = {"labels", "logits_to_keep", "past_key_values", "use_cache"}
        inputs = {k: v for k, v in inputs.items() if k not in dropped and v is not None}
        with torch.no_grad(), self._shiftdc_aside():
            self.shiftdc_backbone(self, **inputs, shiftdc_position=position, shiftdc_readout=readout)
        return readout.stacked(position.device)

    @contextmanager
    def _shiftdc_aside(self) -> Iterator[None]:
        """Passes in here leave no trace: a reply that is being decoded goes on as if they had not been."""
        kept = {name: getattr(self.model, name) for name in self.shiftdc_kept}
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(self.model, name, value)

    def _shiftdc_image_rows(self, input_ids: torch.Tensor) -> torch.Tensor:
        """bool [batch]: the rows that hold an image. pixel_values may be absent at prefill, so token ids decide.

        Raises ValueError for videos with tokens of their own, which would otherwise go uncalibrated.
        """
        video_token_id = getattr(self.config, "video_token_id", None)
        if video_token_id is not None and (input_ids == video_token_id).any():
            raise ValueError(
                "The prompt holds a video, which calibration does not know; give its frames as images, or pass shiftdc=False "
                "(no calibration)."
            )
        return (input_ids == self.config.image_token_id).any(-1)

    def _shiftdc_last_prompt_token(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """int64 [batch]: the last prompt token of rows that hold an image, -1 elsewhere; None where no row does."""
        input_ids = inputs.get("input_ids")
        if input_ids is None:
            raise ValueError(
                "forward() needs input_ids to see which rows hold an image; pass shiftdc_position= with inputs_embeds, or "
                "shiftdc=False (no calibration)."
            )
        rows = self._shiftdc_image_rows(input_ids)
        if not rows.any():
            return None
        mask, labels = inputs.get("attention_mask"), inputs.get("labels")
        if mask is None or mask.shape != input_ids.shape:
            mask = torch.ones_like(input_ids)
        if labels is not None:  # training: the prompt ends where the first label starts
            mask = mask.bool() & ((labels != -100).cumsum(-1) == 0)
        return torch.where(rows & mask.bool().any(-1), _last_true(mask), -1)

    def _shiftdc_validated(self, reference: torch.Tensor, batch: int) -> torch.Tensor:
        expected = (batch, len(self.config.shiftdc["layers"]))
        if tuple(reference.shape) != expected or not torch.isfinite(reference).all():
            raise ValueError(
                f"shiftdc_reference must be finite and of shape [batch, calibrated layers] = {list(expected)}, "
                f"found {list(reference.shape)}."
            )
        return reference.float()

    def _shiftdc_require_pixels(self, image_inputs: dict[str, Any]) -> None:
        if not any(v is not None for k, v in image_inputs.items() if k not in _TOKEN_TYPES):
            raise ValueError(
                "The prompt holds image tokens but no image was given, so no reference can be computed: pass pixel_values, "
                "shiftdc_reference= or shiftdc_captions=, or shiftdc=False (no calibration)."
            )

    def _shiftdc_prompt_inputs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The image inputs, the mask and the token types among the arguments of generate()."""
        names = set(inspect.signature(type(self)._shiftdc_base_forward).parameters) - _NOT_IMAGE_INPUTS
        return {k: v for k, v in kwargs.items() if k in names | _TOKEN_TYPES | {"attention_mask"} and v is not None}

    def _shiftdc_unpadded(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What generate() assumes without an attention mask: padding is masked if it cannot be an end of text."""
        pad = self.generation_config.pad_token_id
        if pad is None or pad in self._shiftdc_eos_ids():
            return torch.ones_like(input_ids)
        return (input_ids != pad).long()

    def _shiftdc_left_padded(self, prompts: list[list[int]], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, mask), int64 [batch, longest prompt]."""
        width = max(map(len, prompts))
        ids = [[self._shiftdc_pad_id()] * (width - len(p)) + p for p in prompts]
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        return torch.tensor(ids, device=like.device), torch.tensor(mask, device=like.device)

    def _shiftdc_eos_ids(self) -> set[int]:
        eos = self.generation_config.eos_token_id
        eos = self.config.get_text_config().eos_token_id if eos is None else eos
        return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)

    def _shiftdc_pad_id(self) -> int:
        pad = self.generation_config.pad_token_id
        return pad if pad is not None else min(self._shiftdc_eos_ids(), default=0)


def position_to_correct(
    model_inputs: dict[str, Any], past_key_values: Any, rows: torch.Tensor, prompt_length: int
) -> torch.Tensor | None:
    """int64 [batch]: the last prompt token of `rows` in this forward, -1 in other rows; None if it is not in this forward.

    Chunked prefill and use_cache=False make "the last token of this forward" wrong: it is counted from the start.
    """
    past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
    fed = model_inputs.get("input_ids")
    index = prompt_length - 1 - past
    inside = 0 <= index < (fed if fed is not None else model_inputs["inputs_embeds"]).shape[1]
    return torch.where(rows, index, -1) if inside else None


def _last_true(mask: torch.Tensor) -> torch.Tensor:
    """int64 [batch]: index of the last nonzero entry of `mask` [batch, time], whatever the padding side."""
    return (mask.long() * torch.arange(mask.shape[1], device=mask.device)).amax(-1)


def _recheck(model: Any, _incompatible: Any) -> None:
    """After load_state_dict the buffers are checked again before the next pass."""
    model._shiftdc_ready = False


def _with_shiftdc_arguments(forward: Any, base_forward: Any) -> Any:
    """`forward` under the signature of `base_forward` plus ShiftDC's arguments: generate() reads signatures."""
    base = inspect.signature(base_forward)
    own = [p for n, p in inspect.signature(forward).parameters.items() if n.startswith("shiftdc")]
    parameters = list(base.parameters.values())
    tail = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    head = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    names = [p.name for p in head[1:]]  # without self

    @functools.wraps(forward)
    def bound(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, **dict(zip(names, args, strict=False)), **kwargs)

    vars(bound)["__signature__"] = base.replace(parameters=[*head, *own, *tail])
    return bound


def register_key_conversion(cls: type, *names: str) -> None:
    """Give `cls` the checkpoint key renaming of a transformers class or model_type.

    transformers skips it for classes of other modules, which would load old checkpoints with random weights.
    """
    for name in names:
        if (mapping := get_checkpoint_conversion_mapping(name)) is not None:
            register_checkpoint_conversion_mapping(cls.__name__, mapping, overwrite=True)
            return
