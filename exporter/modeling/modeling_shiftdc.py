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
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import is_peft_available, logging

from .modeling_shiftdc_config import FORMAT_VERSION
from .modeling_shiftdc_correction import ShiftDCCorrection, calibrate
from .modeling_shiftdc_inputs import position_to_correct
from .modeling_shiftdc_prefix import ShiftDCImage
from .modeling_shiftdc_prompts import PromptComposer, PromptFrame, TokenizerCodec
from .modeling_shiftdc_reference import ShiftDCReferenceMixin

logger = logging.get_logger(__name__)

#: Arguments of from_pretrained() that say how to fetch, for tokenizer and adapter as for the model.
_FETCHING = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies", "subfolder")


class ShiftDCMixin(ShiftDCReferenceMixin):
    """A calibrated `...ForConditionalGeneration`; put it before the transformers class in the list of bases.

    `generate()` and `forward()` take, beside what the base class takes:
        shiftdc: False gives the base model, token for token.
        shiftdc_reference: float32 [batch, calibrated layers], coordinates `r` to correct to.
        shiftdc_captions (generate only): one sequence of caption token ids per row, used instead of the model's own caption.
        shiftdc_image (generate only): what `shiftdc_image()` read of these images, used instead of reading them again.
    """

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
        self.shiftdc_tokenizer: Any = None
        self._shiftdc_composer: PromptComposer | None = None
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
        if model.config.shiftdc["reference"] in ("caption", "text"):
            model.shiftdc_use_tokenizer(model._shiftdc_load_tokenizer(where))
        model._shiftdc_load_adapter(where)
        model.shiftdc_check()
        return loaded

    @property
    def shiftdc_prompts(self) -> PromptComposer:
        """Derives caption requests and text-only counterparts from prompts, with the checkpoint's own tokenizer."""
        if self._shiftdc_composer is None:
            self.shiftdc_use_tokenizer(self._shiftdc_load_tokenizer({}))
        assert self._shiftdc_composer is not None
        return self._shiftdc_composer

    def shiftdc_use_tokenizer(self, tokenizer: Any) -> None:
        """Derive prompts with `tokenizer`, for a model that was not loaded from a folder or a repository with one."""
        self.shiftdc_tokenizer = tokenizer
        frame = PromptFrame.from_json(self.config.shiftdc["prompt"])
        self._shiftdc_composer = PromptComposer(frame, TokenizerCodec(tokenizer), self.config.image_token_id)

    def _shiftdc_load_tokenizer(self, where: dict[str, Any]) -> Any:
        """The tokenizer beside the weights. Raises ValueError."""
        try:
            return AutoTokenizer.from_pretrained(self.name_or_path, config=self.config, trust_remote_code=False, **where)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The tokenizer of {self.name_or_path!r} cannot be loaded, and captions and text-only prompts are written with "
                "it: put the checkpoint's tokenizer files beside its weights, or call shiftdc_use_tokenizer(tokenizer)."
            ) from error

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
        folder = args[0] if args else kwargs["save_directory"]
        if self.shiftdc_tokenizer is not None:  # without it the copy could not be loaded
            self.shiftdc_tokenizer.save_pretrained(folder)

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
