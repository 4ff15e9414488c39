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
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import is_peft_available, logging

from .modeling_shiftdc_config import FORMAT_VERSION
from .modeling_shiftdc_conversation import OwnPrompt, Turn, first_difference, remember
from .modeling_shiftdc_correction import ShiftDCCorrection, calibrate
from .modeling_shiftdc_forward import ShiftDCForwardMixin
from .modeling_shiftdc_inputs import by_name, position_to_correct
from .modeling_shiftdc_prefix import ShiftDCImage
from .modeling_shiftdc_prompts import PromptComposer, PromptFrame, TokenizerCodec
from .modeling_shiftdc_reference import ShiftDCReferenceMixin

logger = logging.get_logger(__name__)

#: Arguments of from_pretrained() that say how to fetch, for tokenizer and adapter as for the model.
_FETCHING = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies", "subfolder")
#: Held by generate() of families that leave something in the model from one pass to the next (`shiftdc_kept`).
_ALONE = threading.RLock()
#: The classes of which this process has made a model.
_MADE: set[type] = set()


class ShiftDCMixin(ShiftDCReferenceMixin, ShiftDCForwardMixin):
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
        cls._shiftdc_base_generate = base.generate

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
        _MADE.add(type(self))
        self._shiftdc_ready = False
        self.shiftdc_tokenizer: Any = None
        self._shiftdc_composer: PromptComposer | None = None
        layers = self.get_submodule(settings["decoder_layers"])
        hashes = settings.get("buffers_sha256")
        if not isinstance(hashes, list) or len(hashes) != len(settings["layers"]):
            raise ValueError(
                "config.shiftdc.buffers_sha256 must have the SHA-256 of the buffers of each calibrated layer; fetch the "
                "checkpoint again, or export it again."
            )
        hidden_size = config.get_text_config().hidden_size
        strength, one_sided = float(settings["strength"]), settings["gate"] == "one-sided"
        for column, (index, sha256) in enumerate(zip(settings["layers"], hashes, strict=True)):
            layers[index].shiftdc = ShiftDCCorrection(hidden_size, column, strength, one_sided, index, sha256)
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
        model.shiftdc_use_tokenizer(model._shiftdc_load_tokenizer(where))
        model._shiftdc_load_adapter(where)
        model.shiftdc_check()
        return loaded

    @property
    def shiftdc_composer(self) -> PromptComposer:
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

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: without the hooks that transformers adds in a pass, cannot be pickled, and adds again in the next one."""
        for module in self.modules():
            hooks = module._forward_hooks
            for number in [n for n, h in hooks.items() if getattr(h, "__module__", "") == "transformers.utils.output_capturing"]:
                del hooks[number]
            if getattr(module, "_output_capturing_hooks_installed", False):
                vars(module)["_output_capturing_hooks_installed"] = False
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if type(self) not in _MADE:
            with torch.device("meta"):  # transformers notes what a class can return when one is made for the first time
                type(self)(self.config)

    @property
    def shiftdc_corrections(self) -> list[ShiftDCCorrection]:
        """The corrections of the calibrated layers, in the order of `shiftdc_reference`'s columns."""
        layers = self.get_submodule(self.config.shiftdc["decoder_layers"])
        return [layers[i].shiftdc for i in self.config.shiftdc["layers"]]

    def shiftdc_check(self) -> None:
        """Raise ValueError unless every buffer is there and the one that the config records, and the adapter is there."""
        if self.config.shiftdc.get("adapter") is not None and not getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError("This checkpoint was calibrated together with its PEFT adapter: load it with from_pretrained().")
        for correction in self.shiftdc_corrections:
            correction.check()
        self._shiftdc_ready = True

    def forward(
        self,
        *,
        shiftdc: bool | None = None,
        shiftdc_reference: torch.Tensor | None = None,
        shiftdc_correction: torch.Tensor | None = None,
        shiftdc_position: torch.Tensor | None = None,
        shiftdc_unrecorded: bool = False,
        **inputs: Any,
    ) -> Any:
        """The base class's forward, corrected where the last generation prompt of rows that hold an image ends.

        shiftdc_reference, shiftdc_correction: see `ShiftDCCorrection.forward`. shiftdc_position: int64 [batch], the token to
        correct (-1: none), for prompts without a generation prompt. Without a reference the baked mean shift is used, because one
        forward pass cannot write a caption: use generate(), or pass `shiftdc_reference`. A prompt may be read in parts, by
        `past_key_values`. shiftdc_unrecorded: generate() itself keeps account of the cache.

        Raises ValueError where the prompt's end cannot be told, or what `past_key_values` holds.
        """
        if shiftdc is not False and not self._shiftdc_ready:
            self.shiftdc_check()
        amounts = {"shiftdc_reference": shiftdc_reference, "shiftdc_correction": shiftdc_correction}
        if not shiftdc_unrecorded:
            return self._shiftdc_recorded(inputs, shiftdc, shiftdc_position, amounts)
        return self._shiftdc_pass(inputs, None if shiftdc is False else shiftdc_position, amounts)

    def _shiftdc_pass(
        self,
        inputs: dict[str, Any],
        position: torch.Tensor | None,
        amounts: dict[str, torch.Tensor | None],
        prompt: dict[str, Any] | None = None,
    ) -> Any:
        """One pass of the base class, corrected at `position` (None: nowhere). prompt: the inputs, where a cache has a part."""
        if position is None:
            return super().forward(**inputs, shiftdc=False)
        settings = self.config.shiftdc
        reference, correction = amounts["shiftdc_reference"], amounts["shiftdc_correction"]
        if correction is None and reference is None and settings["reference"] != "static":
            logger.warning_once(
                f"forward() got no shiftdc_reference, so the mean shift baked at export is used instead of the "
                f"'{settings['reference']}' reference; generate() computes that reference itself."
            )
        if correction is None and reference is not None and settings["rule"] == "precomputed":
            whole = prompt or inputs
            past = whole["input_ids"].shape[1] - inputs["input_ids"].shape[1] if prompt else 0
            correction = self._shiftdc_coordinates(whole, torch.where(position < 0, position, position + past)) - reference
        return super().forward(**inputs, shiftdc_position=position, shiftdc_reference=reference, shiftdc_correction=correction)

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

        Raises ValueError where the image rows cannot be known (`inputs_embeds`, `assistant_model`, a cache that this model did
        not fill) or the reference cannot be computed; `shiftdc=False` gives the base model in every case.
        """
        kwargs = by_name(type(self)._shiftdc_base_generate, (inputs, *args), kwargs)
        given = [v for v in (kwargs.pop("inputs", None), kwargs.pop("input_ids", None)) if v is not None]
        if len(given) > 1:
            raise ValueError("generate() got input_ids twice: give them as the first argument or as input_ids=.")
        with self._shiftdc_alone():
            if shiftdc is False:
                return self._shiftdc_uncalibrated(*given, **kwargs)
            if not self._shiftdc_ready:
                self.shiftdc_check()
            self._shiftdc_refuse(given, kwargs)
            turn = self._shiftdc_turn(given[0], kwargs)
            rows = self._shiftdc_image_rows(turn.ids)
            self._shiftdc_require_tokens(rows, turn.images)
            if not rows.any():
                return self._shiftdc_uncalibrated(*given, **kwargs)
            self._shiftdc_refuse_packed(kwargs, turn.mask)
            turn = self._shiftdc_left_aligned(turn)
            kwargs = self._shiftdc_without_prompt(turn, kwargs)
            return self._shiftdc_reply(turn, rows, shiftdc_reference, shiftdc_captions, shiftdc_image, kwargs)

    @contextmanager
    def _shiftdc_alone(self) -> Iterator[None]:
        """In families that keep positions in the model one reply is written at a time, whatever the number of threads."""
        if not self.shiftdc_kept:
            yield
        else:
            with _ALONE:
                yield

    def _shiftdc_refuse(self, given: list[torch.Tensor], kwargs: dict[str, Any]) -> None:
        if not given:
            raise ValueError(
                "generate() needs input_ids to see which rows hold an image; or pass shiftdc=False (no calibration)."
            )
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "inputs_embeds may hold an image that input_ids do not show; give input_ids and pixels, or pass shiftdc=False "
                "(no calibration)."
            )
        if kwargs.get("assistant_model") is not None:
            raise ValueError(
                "assistant_model is not supported with calibration; drop it, or pass shiftdc=False (no calibration)."
            )

    def _shiftdc_uncalibrated(self, ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """The base class's generate() with the caller's own arguments."""
        cache, turn = kwargs.get("past_key_values"), None
        if ids is not None:
            try:
                turn = self._shiftdc_turn(ids, kwargs, as_cached=True)
            except ValueError:  # what the cache will hold is not known
                turn = None
        if turn is not None and turn.held is not None and first_difference(turn.ids, turn.held.ids) < turn.held.ids.shape[1]:
            turn = None  # the base class goes on from other tokens than these
        remember(cache, None)
        named = {} if ids is None else {"input_ids": ids}
        out = super().generate(**named, **kwargs, shiftdc=False)
        if turn is None:
            remember(_cache_of(cache, out), None)
        else:
            self._shiftdc_remember_reply(turn.whole_answer(out), turn, _cache_of(cache, out))
        return out

    def _shiftdc_without_prompt(self, turn: Turn, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of generate() beside those that `turn` has."""
        rest = {k: v for k, v in kwargs.items() if k not in turn.prompt and k not in ("past_key_values", "attention_mask")}
        if turn.ids is not turn.own and rest.get("position_ids") is not None:
            raise ValueError(
                "position_ids cannot be given with a conversation in past_key_values or with padding on the right: leave them "
                "out, they follow from attention_mask."
            )
        if turn.ids is not turn.own and rest.get("streamer") is not None:
            rest["streamer"] = OwnPrompt(rest["streamer"], turn.own)
        return rest

    def _shiftdc_reply(
        self,
        turn: Turn,
        rows: torch.Tensor,
        reference: torch.Tensor | None,
        captions: Sequence[Sequence[int] | torch.Tensor] | None,
        image: ShiftDCImage | None,
        kwargs: dict[str, Any],
    ) -> Any:
        """The reply to `turn`, calibrated in `rows`; kwargs: the arguments of generate() beside those of the prompt."""
        prompt, read = turn.prompt, image
        takes_cache = turn.cache is None and self._shiftdc_takes_cache(prompt, kwargs)
        if read is not None:
            read.check(prompt)
        elif reference is None and captions is None and self.config.shiftdc["reference"] == "caption":
            read = self._shiftdc_read(**prompt, keep=takes_cache)
        captions = captions if read is None else read.captions
        amounts = self._shiftdc_amounts(prompt, rows, reference, captions)
        shared = self._shiftdc_laid_out(read, prompt, kwargs) if read is not None and takes_cache else None
        if read is not None and shared is not None:
            cache = read.cache if image is None else read.own_cache()
            out = self._shiftdc_continue(shared, prompt, past_key_values=cache, shiftdc_rows=rows, **amounts, **kwargs)
            return turn.answered(out)
        if image is not None:  # which may stand for the pixels only where its cache is used
            self._shiftdc_require_pixels(turn.images)
        images = self._shiftdc_placed(turn)
        length = turn.ids.shape[1]
        out = super().generate(**turn.arguments, **images, shiftdc_rows=rows, shiftdc_prompt_length=length, **amounts, **kwargs)
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        self._shiftdc_remember_reply(sequences, turn, _cache_of(turn.cache, out), rows)
        return turn.answered(out)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as are the other entries to continuous batching."""
        raise ValueError(
            "Continuous batching (generate_batch, cache_implementation='paged', transformers serve --continuous-batching) reads "
            "many prompts as one row without their images, which calibration does not know: call generate(), or load the base "
            "model for it."
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

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
        if model_inputs.get("shiftdc") is False or shiftdc_rows is not None:
            model_inputs["shiftdc_unrecorded"] = True
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
    for correction in model.shiftdc_corrections:
        correction.checked = False


def _cache_of(cache: Any, out: Any) -> Any:
    """The cache that a call of generate() was given, else the one that it gives back."""
    return cache if cache is not None else getattr(out, "past_key_values", None)


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
