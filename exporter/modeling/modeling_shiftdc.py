# SPDX-License-Identifier: Apache-2.0
# From shiftdc-export 0.1.0, https://github.com/shiftdc/shiftdc-export
# Method: Zou et al., "Understanding and Rectifying Safety Perception Distortion in VLMs", arXiv:2502.13095
"""ShiftDC inside a vision-language model: what every family shares.

An image moves the activations of a harmful request toward "safe". With a unit direction `d` of a decoder layer, from unsafe
to safe, Eq. 7 of the paper replaces the coordinate `x.d` of the image prompt by the coordinate `r` of its text-only counterpart:
`x' = x - strength * (x.d - r) d`, at the last prompt token of rows that hold an image, once, while the prompt is read.
`gate: one-sided` corrects `max(0, x.d - r)` only, so that no input is ever moved toward "safe".

`ShiftDCCorrection.forward` is the equation, `ShiftDCMixin.generate` what happens in which order, and the block at the top of
`ShiftDCMixin` what a class may need of its own (modeling_shiftdc_mllama.py, modeling_shiftdc_blip.py). All other classes are made
here, on demand, of transformers' own (`calibrated_class`). The other files, in the order in which generate() needs them:
settings (configuration_shiftdc.py), a batch of prompts (inputs_shiftdc.py), what was said before, in a KV cache
(conversation_shiftdc.py), captions (image_prefix_shiftdc.py), and prompts without an image (prompts_shiftdc.py).
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput, is_peft_available, logging

from .configuration_shiftdc import ShiftDCSettings, ShiftDCTraits, TokenInput, config_class, stock_class
from .conversation_shiftdc import (
    UNKNOWN_CACHE,
    Pass,
    Turn,
    cache_of,
    cut,
    cut_back,
    ending_at,
    first_difference,
    held_by,
    labels_of,
    left_aligned,
    length_of,
    of_the_last,
    other_arguments,
    pass_behind,
    remember,
    remember_reply,
    require_row_mask,
    sequences_of,
    turn_of,
)
from .image_prefix_shiftdc import ShiftDCImage, behind_prefixes, new_cache, read_images, reads_padding, takes_cache
from .inputs_shiftdc import (
    TOKEN_TYPES,
    UNMARKED_IMAGE,
    Arguments,
    ImageArguments,
    Images,
    Padding,
    Prompt,
    by_name,
    image_arguments,
    last_true,
    left_padded,
    position_to_correct,
    positions_of,
    prompt_ends,
    refuse_packed_rows,
    require_input_ids,
    require_pixels,
)
from .prompts_shiftdc import PromptComposer, PromptFrame, TokenizerCodec

if TYPE_CHECKING:  # what the mixin is mixed into
    from typing import Self

    from transformers import PreTrainedModel as _Model
    from transformers import PreTrainedTokenizerBase
else:
    _Model = object

logger = logging.get_logger(__name__)

#: Arguments of from_pretrained() that say how to fetch, for tokenizer and adapter as for the model.
_FETCHING = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies", "subfolder")
#: Held by generate() of classes that leave something in the model from one pass to the next (`backbone_state`).
_ALONE = threading.RLock()
#: The classes of which this process has made a model.
_MADE: set[type] = set()


# The correction of one decoder layer


def buffers_sha256(direction: torch.Tensor, shift: torch.Tensor) -> str:
    """Of the float32 little-endian bytes of a layer's direction and shift, as config.json records it."""
    numbers = torch.cat([direction.detach().flatten(), shift.detach().flatten()]).float().cpu()
    return hashlib.sha256(numbers.numpy().astype("<f4").tobytes()).hexdigest()


class ShiftDCCorrection(nn.Module):
    """Direction and mean shift of one decoder layer, and the correction along them.

    Buffers (float32, whatever the model's dtype): `direction` [width], unit norm, from unsafe to safe; `shift` [], the mean of
    `(x_image - x_text).d` over the calibration set. Both are NaN until loaded. layer, sha256: the decoder layer's index, and
    what the config says of its buffers.
    """

    direction: torch.Tensor
    shift: torch.Tensor

    def __init__(
        self,
        width: int,
        column: int,
        strength: float,
        one_sided: bool,
        layer: int,
        sha256: str,
        stream_axis: int | None = None,
    ):
        super().__init__()
        self.stream_axis = stream_axis
        self.layer = layer
        self.sha256 = sha256
        self.checked = False
        self.column = column  # of shiftdc_reference and shiftdc_correction
        self.strength = strength
        self.one_sided = one_sided
        self.register_buffer("direction", torch.full((width,), torch.nan, dtype=torch.float32))
        self.register_buffer("shift", torch.full((), torch.nan, dtype=torch.float32))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ShiftDCCorrection:
        """`.to()`, `.half()` and the like move the buffers and leave them float32."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    @torch.compiler.disable
    def check(self) -> None:
        """Raise ValueError unless the buffers are there, finite, the direction of unit norm, and those of the config.

        Offloaded buffers (on the meta device) are checked when their layer runs.
        """
        if self.direction.is_meta:
            return
        norm = self.direction.norm().item()
        if not (torch.isfinite(self.direction).all() and torch.isfinite(self.shift)) or abs(norm - 1) > 1e-3:
            raise ValueError(
                f"The ShiftDC buffers of decoder layer {self.layer} are missing or damaged (expected a finite direction of norm "
                f"1, found norm {norm:.4g}): the model would run uncalibrated. Load a complete "
                "checkpoint (shiftdc.safetensors must be in its index), or export it again."
            )
        found = buffers_sha256(self.direction, self.shift)
        if found != self.sha256:
            raise ValueError(
                f"The ShiftDC buffers of decoder layer {self.layer} are not those that config.json records (expected SHA-256 "
                f"{self.sha256}, found {found}): the model would be calibrated by another direction. Fetch the checkpoint again, "
                "or export it again."
            )
        self.checked = True

    def gate(self, excess: torch.Tensor) -> torch.Tensor:
        return excess.clamp_min(0) if self.one_sided else excess

    def forward(
        self,
        hidden: torch.Tensor,
        position: torch.Tensor,
        reference: torch.Tensor | None = None,
        correction: torch.Tensor | None = None,
        readout: ShiftDCReadout | None = None,
    ) -> torch.Tensor | None:
        """`x' = x - strength * (x.d - r) d` at one token of a row (arXiv:2502.13095, Eq. 7); all other numbers bit for bit.

        Args:
            hidden (`torch.Tensor` of shape `(batch, time, width)`):
                What the decoder layer puts out, as `token_states` gives it, in any dtype; computed in float32.
            position (`torch.LongTensor` of shape `(batch,)`):
                The token to correct; -1 leaves the row alone.
            reference (`torch.FloatTensor` of shape `(batch, calibrated layers)`, *optional*):
                Coordinates `r` to correct to.
            correction (`torch.FloatTensor` of shape `(batch, calibrated layers)`, *optional*):
                Amounts `x.d - r` that were computed beforehand (`rule: precomputed`). Without either, the baked mean shift.
            readout (`ShiftDCReadout`, *optional*):
                Takes the coordinates `x.d`; nothing is changed then.

        Returns:
            `torch.Tensor` of the shape and dtype of `hidden`; None with a `readout`.
        """
        if not self.checked:
            self.check()
        position = position.to(hidden.device)
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        token = position.clamp_min(0)
        x = hidden[rows, token].float()
        direction = self.direction.to(hidden.device)
        if readout is not None:
            readout.coordinates[self.column] = x @ direction
            return None
        if correction is not None:
            amount = correction.to(x)[:, self.column]
        elif reference is not None:
            amount = x @ direction - reference.to(x)[:, self.column]
        else:
            amount = self.shift.to(x).expand(len(x))
        moved = (x - self.strength * self.gate(amount)[:, None] * direction).to(hidden.dtype)
        kept = hidden[rows, token]
        # zero amounts keep the row's own bits: -0.0 - 0.0 would lose a sign, and strength 0 is the base model exactly
        change = (position >= 0) & (self.gate(amount) != 0) & (self.strength != 0)
        return hidden.index_put((rows, token), torch.where(change[:, None], moved, kept))


def token_states(output: torch.Tensor, stream_axis: int | None) -> torch.Tensor:
    """What a decoder layer puts out, as [batch, time, width]: of several residual streams all, side by side."""
    return output if stream_axis is None else output.movedim(stream_axis, 2).flatten(2)


def as_output(states: torch.Tensor, like: torch.Tensor, stream_axis: int | None) -> torch.Tensor:
    """What `token_states` was made from, in the shape of `like`."""
    return states if stream_axis is None else states.unflatten(2, (like.shape[stream_axis], -1)).movedim(2, stream_axis)


class ShiftDCReadout:
    """Collects `x.d` of one position per row. A plain object: accelerate passes it from device to device untouched.

    ends_pass: the pass ends, by `ShiftDCReadError`, at the last calibrated layer, behind which there is nothing to read.
    """

    def __init__(self, layers: int, ends_pass: bool):
        self.coordinates: list[torch.Tensor | None] = [None] * layers
        self.ends_pass = ends_pass

    @property
    def is_complete(self) -> bool:
        return all(c is not None for c in self.coordinates)

    def stacked(self, device: torch.device) -> torch.Tensor:
        """[batch, layers], float32."""
        return torch.stack([c.to(device) for c in self.coordinates if c is not None], dim=1)


class ShiftDCReadError(Exception):
    """Ends a pass of which every coordinate has been read."""


def calibrate(
    layer: Any, args: tuple[object, ...], kwargs: Arguments, output: torch.Tensor | tuple
) -> torch.Tensor | tuple | None:
    """Forward hook of a calibrated decoder layer."""
    position = kwargs.get("shiftdc_position")
    if position is None:
        if kwargs.get("shiftdc") is False:
            return None
        raise ValueError(
            "A calibrated decoder layer was run without the calibrated model around it, which knows the rows that hold an image: "
            "call the model's own generate() or forward(), or pass shiftdc=False (no calibration), also for text alone."
        )
    hidden = output[0] if isinstance(output, tuple) else output
    readout, axis = kwargs.get("shiftdc_readout"), layer.shiftdc.stream_axis
    states = token_states(hidden, axis)
    corrected = layer.shiftdc(states, position, kwargs.get("shiftdc_reference"), kwargs.get("shiftdc_correction"), readout)
    if readout is not None and readout.ends_pass and readout.is_complete and not torch.compiler.is_compiling():
        raise ShiftDCReadError
    if corrected is None:
        return None
    corrected = as_output(corrected, hidden, axis)
    return (corrected, *output[1:]) if isinstance(output, tuple) else corrected


# The model


class ShiftDCMixin(_Model):
    """A calibrated `...ForConditionalGeneration`; put it before the transformers class in the list of bases."""

    # What a class may need of its own; what was measured of it is in `ShiftDCTraits`

    #: Whether a conversation may go on in `past_key_values`.
    shiftdc_continues_caches = True

    @staticmethod
    def shiftdc_token_inputs(traits: ShiftDCTraits, ids: torch.Tensor, given: Images) -> Images:
        """Inputs as long as the prompt, for prompts `ids` [batch, time] that were composed here; `given`: the original ones.

        Prompts with an image have those that the original has, prompts without one those that the processor gives them. Of
        those that no processor was seen to give, 1 marks a token of an image.
        """
        marks = TokenInput(0, {str(traits.image_token_id): 1}, in_text=False)
        known = {**dict.fromkeys(TOKEN_TYPES, marks), **traits.token_inputs}
        wanted = {n: t for n, t in known.items() if n in given or (t.in_text and not given)}
        made = {name: torch.full_like(ids, told.elsewhere) for name, told in wanted.items()}
        for name, told in wanted.items():
            for token, value in told.at.items():
                made[name][ids == int(token)] = value
        return made

    @staticmethod
    def shiftdc_unmarked_image(traits: ShiftDCTraits, rows: torch.Tensor, images: Images) -> bool:
        """Whether an image is shown to a row of which `rows` [batch] says that it holds none: it would go uncalibrated."""
        pixels = (v for k, v in images.items() if k in traits.pixel_inputs or k.startswith("pixel_values"))
        return not rows.any() and any(v is not None for v in pixels)

    @staticmethod
    def shiftdc_backbone(model: _Model, **inputs: object) -> None:
        """One pass of `model` (this class, or the transformers class) through its decoder layers, without cache."""
        inner = getattr(model, "model", None)
        if inner is not None and _takes(type(inner).forward, inputs):
            inner(**inputs, use_cache=False)
        else:
            stock: Any = next(c for c in type(model).__mro__ if c.__module__.startswith("transformers."))
            stock.forward(model, **inputs, use_cache=False, logits_to_keep=1)

    # Loading

    def __init_subclass__(cls, **kwargs: object):
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "_shiftdc_base_forward"):  # a subclass of a calibrated class; transformers makes one when loading
            return
        base: Any = next((c for c in cls.__mro__ if c.__module__.startswith("transformers.") and "forward" in c.__dict__), None)
        if base is None:  # a mixin
            return
        cls._keep_in_fp32_modules_strict = {*(base._keep_in_fp32_modules_strict or ()), "shiftdc"}
        setattr(cls, "forward", _with_shiftdc_arguments(cls.forward, base.forward))  # noqa: B010 (mypy: a method)
        cls._shiftdc_base_forward = base.forward
        cls._shiftdc_base_generate = base.generate
        cls._shiftdc_image_names = image_arguments(base.forward)

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        settings = ShiftDCSettings.of(config)
        _MADE.add(type(self))
        self._shiftdc_ready = False
        self.shiftdc_tokenizer: PreTrainedTokenizerBase | None = None
        self._shiftdc_composer: PromptComposer | None = None
        layers = self.get_submodule(settings.traits.decoder_layers)
        width, axis, one_sided = settings.traits.width, settings.traits.stream_axis, settings.gate == "one-sided"
        for column, (index, sha256) in enumerate(zip(settings.layers, settings.buffers_sha256, strict=True)):
            layers[index].shiftdc = ShiftDCCorrection(width, column, float(settings.strength), one_sided, index, sha256, axis)
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
    def from_pretrained(cls, *args: object, **kwargs: Any) -> Self:
        """transformers' from_pretrained(), then the tokenizer and the adapter beside the weights, and a check of the directions.

        Args:
            args, kwargs:
                As of the base class.

        Returns:
            The model; with `output_loading_info=True` also what transformers says of loading it.

        Raises ValueError or ImportError where the model would run uncalibrated.
        """
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

    def shiftdc_use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Derive prompts with `tokenizer`, for a model that was not loaded from a folder or a repository with one.

        Args:
            tokenizer (`PreTrainedTokenizerBase`):
                The checkpoint's own.
        """
        self.shiftdc_tokenizer = tokenizer
        frame = PromptFrame.from_json(self._shiftdc_settings.prompt)
        self._shiftdc_composer = PromptComposer(frame, TokenizerCodec(tokenizer), self._shiftdc_traits.image_token_id)

    def _shiftdc_load_tokenizer(self, where: Arguments) -> PreTrainedTokenizerBase:
        """The tokenizer beside the weights. Raises ValueError."""
        try:
            return AutoTokenizer.from_pretrained(self.name_or_path, config=self.config, trust_remote_code=False, **where)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The tokenizer of {self.name_or_path!r} cannot be loaded, and captions and text-only prompts are written with "
                "it: put the checkpoint's tokenizer files beside its weights, or call shiftdc_use_tokenizer(tokenizer)."
            ) from error

    def _shiftdc_load_adapter(self, where: Arguments) -> None:
        """Load the PEFT adapter of an export with `--keep-adapter`, from a folder of its own. Raises ImportError, ValueError.

        At the top transformers would take a Hub checkpoint for an adapter alone, and load the uncalibrated base model.
        """
        folder = self._shiftdc_settings.adapter
        if folder is None:
            return
        if not is_peft_available():
            raise ImportError("This checkpoint was calibrated together with its PEFT adapter and needs it: pip install peft.")
        loading = self.load_adapter(self.name_or_path, adapter_kwargs={"subfolder": folder, **where}, use_safetensors=True)
        if loading is None or loading.missing_keys or loading.mismatched_keys:
            raise ValueError(f"The adapter in {folder}/ is incomplete; fetch the checkpoint again, or export it again.")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """transformers' save_pretrained(), with the tokenizer."""
        if self._shiftdc_settings.adapter is not None:
            raise ValueError("save_pretrained() would write the adapter without the model; export again with the adapter merged.")
        super().save_pretrained(*args, **kwargs)
        folder = args[0] if args else kwargs["save_directory"]
        if self.shiftdc_tokenizer is not None:  # without it the copy could not be loaded
            self.shiftdc_tokenizer.save_pretrained(folder)

    def __getstate__(self) -> dict[str, object]:
        """For pickle: without the hooks that transformers adds in a pass, cannot be pickled, and adds again in the next one."""
        for module in self.modules():
            hooks = module._forward_hooks
            for number in [n for n, h in hooks.items() if getattr(h, "__module__", "") == "transformers.utils.output_capturing"]:
                del hooks[number]
            vars(module).pop("_output_capturing_hooks_installed", None)
        return self.__dict__

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        if type(self) not in _MADE:
            with torch.device("meta"):  # transformers notes what a class can return when one is made for the first time
                type(self)(self.config)

    @property
    def shiftdc_corrections(self) -> list[ShiftDCCorrection]:
        """The corrections of the calibrated layers, in the order of `shiftdc_reference`'s columns."""
        settings = self._shiftdc_settings
        layers = self.get_submodule(settings.traits.decoder_layers)
        return [layers[i].shiftdc for i in settings.layers]

    def shiftdc_check(self) -> None:
        """Raise ValueError unless every buffer is there and the one that the config records, and the adapter is there."""
        if self._shiftdc_settings.adapter is not None and not self._hf_peft_config_loaded:
            raise ValueError("This checkpoint was calibrated together with its PEFT adapter: load it with from_pretrained().")
        for correction in self.shiftdc_corrections:
            correction.check()
        self._shiftdc_ready = True

    # What calls have in common

    @property
    def _shiftdc_settings(self) -> ShiftDCSettings:
        return ShiftDCSettings.of(self.config)

    @property
    def _shiftdc_traits(self) -> ShiftDCTraits:
        return self._shiftdc_settings.traits

    @property
    def _shiftdc_images(self) -> ImageArguments:
        traits = self._shiftdc_traits
        return ImageArguments(
            self._shiftdc_image_names, frozenset(traits.row_inputs), functools.partial(self.shiftdc_token_inputs, traits),
            traits.image_token_id, traits.video_token_id,
        )  # fmt: skip

    @property
    def _shiftdc_padding(self) -> Padding:
        ends = self.generation_config.eos_token_id
        ends = self.config.get_text_config().eos_token_id if ends is None else ends
        listed = () if ends is None else (ends,) if isinstance(ends, int) else ends
        return Padding(self.generation_config.pad_token_id, frozenset(listed))

    def _shiftdc_prompt(self, ids: torch.Tensor, mask: torch.Tensor | None, images: Images) -> Prompt:
        """Raises ValueError for videos and sounds."""
        prompt = self._shiftdc_images.prompt(ids, mask, {k: v for k, v in images.items() if v is not None})
        self._shiftdc_images.refuse_other_media(prompt)
        return prompt

    def _shiftdc_shows_image(self, prompt: Prompt) -> bool:
        """Whether any row holds an image. Raises ValueError where that is not to be seen in the ids."""
        self._shiftdc_images.refuse_other_media(prompt)
        if self.shiftdc_unmarked_image(self._shiftdc_traits, prompt.rows, prompt.images):
            raise ValueError(UNMARKED_IMAGE)
        return bool(prompt.rows.any())

    @contextmanager
    def _shiftdc_preserving_state(self) -> Iterator[None]:
        """Passes in here leave no trace: a reply that is being decoded goes on as if they had not been."""
        places = [path.rpartition(".")[::2] for path in self._shiftdc_traits.backbone_state]
        kept = [(module, name, getattr(module, name)) for module, name in ((self.get_submodule(m), n) for m, n in places)]
        try:
            yield
        finally:
            for module, name, value in kept:
                setattr(module, name, value)

    # Generation

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args: object,
        shiftdc: bool | None = None,
        shiftdc_reference: torch.Tensor | None = None,
        shiftdc_captions: Sequence[Sequence[int] | torch.Tensor] | None = None,
        shiftdc_image: ShiftDCImage | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | ModelOutput:
        """transformers' generate(), calibrated. Rows without an image are those of the base model, bit for bit.

        Args:
            inputs (`torch.LongTensor` of shape `(batch, time)`, *optional*):
                The prompts' token ids, also as `input_ids=`.
            args, kwargs:
                All other arguments as of the base class, `pixel_values` among them.
            shiftdc (`bool`, *optional*):
                `False` gives the base model, token for token.
            shiftdc_reference (`torch.FloatTensor` of shape `(batch, calibrated layers)`, *optional*):
                Coordinates `r` to correct to, as `shiftdc_reference()` returns them.
            shiftdc_captions (`Sequence[Sequence[int]]`, *optional*):
                One sequence of caption token ids per row, used instead of the model's own captions.
            shiftdc_image (`ShiftDCImage`, *optional*):
                What `shiftdc_image()` read of these images, used instead of reading them again.

        Returns:
            `torch.LongTensor` of shape `(batch, time + new tokens)`, or a `ModelOutput` with `return_dict_in_generate=True`.

        Raises ValueError where the image rows cannot be known (`inputs_embeds`, `assistant_model`, a cache that this model did
        not fill) or the reference cannot be computed; `shiftdc=False` gives the base model in every case.
        """
        kwargs = by_name(type(self)._shiftdc_base_generate, (inputs, *args), kwargs)
        given = [v for v in (kwargs.pop("inputs", None), kwargs.pop("input_ids", None)) if v is not None]
        if len(given) > 1:
            raise ValueError("generate() got input_ids twice: give them as the first argument or as input_ids=.")
        ids = given[0] if given else None
        with self._shiftdc_one_at_a_time():
            if shiftdc is False:
                return self._shiftdc_uncalibrated(ids, kwargs)
            if not self._shiftdc_ready:
                self.shiftdc_check()

            # what is asked: the whole conversation, and the rows of it that hold an image
            turn = self._shiftdc_turn(require_input_ids(ids, kwargs), kwargs)
            if not self._shiftdc_shows_image(turn.prompt):
                return self._shiftdc_uncalibrated(ids, kwargs)
            refuse_packed_rows(kwargs, turn.prompt.mask)
            turn = left_aligned(turn, self._shiftdc_images, self._shiftdc_padding)
            prompt, options = turn.prompt, other_arguments(turn, kwargs)

            # the image, read once for its caption and, where that gives the same tokens, for the reply
            sharing = self._shiftdc_sharing(turn, options)
            read = shiftdc_image
            if read is not None:
                read.check(prompt)
            elif shiftdc_reference is None and shiftdc_captions is None and self._shiftdc_settings.reference == "caption":
                read = self._shiftdc_read(prompt, keep=sharing is not None)
            captions = shiftdc_captions if read is None else read.captions

            # what to correct to: the coordinates of the text-only counterpart
            amounts = self._shiftdc_amounts(prompt, shiftdc_reference, captions)

            # the reply, behind the image's cache or from the beginning
            options |= {**amounts, "shiftdc_rows": prompt.rows}
            if read is not None and sharing is not None:
                moved = behind_prefixes(read, prompt, self._shiftdc_padding, fixed_columns=reads_padding(*sharing))
                if moved is not None:
                    cache = read.cache if shiftdc_image is None else read.own_cache()
                    return turn.answered(self._shiftdc_behind_prefixes(prompt, *moved, cache, options))
            if shiftdc_image is not None:  # which may stand for the pixels only where its cache is used
                require_pixels(prompt.images)
            return turn.answered(self._shiftdc_reply(turn, options))

    @contextmanager
    def _shiftdc_one_at_a_time(self) -> Iterator[None]:
        """In families that keep positions in the model one reply is written at a time, whatever the number of threads."""
        if not self._shiftdc_traits.backbone_state:
            yield
        else:
            with _ALONE:
                yield

    def _shiftdc_uncalibrated(self, ids: torch.Tensor | None, kwargs: Arguments) -> torch.Tensor | ModelOutput:
        """The base class's generate() with the caller's own arguments."""
        cache, turn = kwargs.get("past_key_values"), None
        if ids is not None:
            try:
                turn = self._shiftdc_turn(ids, kwargs, as_cached=True)
            except ValueError:  # what the cache will hold is not known
                turn = None
        held = None if turn is None else turn.held
        if turn is not None and held is not None and first_difference(turn.prompt.ids, held.ids) < held.ids.shape[1]:
            turn = None  # the base class goes on from other tokens than these
        remember(cache, None)
        out = super().generate(input_ids=ids, **kwargs, shiftdc=False)
        if turn is not None:
            remember_reply(cache_of(out, cache), turn.whole_answer(out), turn, self._shiftdc_padding)
        return out

    def _shiftdc_turn(self, ids: torch.Tensor, kwargs: Arguments, as_cached: bool = False) -> Turn:
        """The whole conversation that a call of generate() goes on with. Raises ValueError where that cannot be known."""
        self._shiftdc_refuse_cache(kwargs.get("past_key_values"))
        return turn_of(ids, kwargs, self._shiftdc_images, as_cached)

    def _shiftdc_refuse_cache(self, cache: Cache | None) -> None:
        if not self.shiftdc_continues_caches and length_of(cache):
            raise ValueError(
                f"{type(self).__name__} does not go on from past_key_values with calibration: give the whole prompt and a new "
                "cache, or pass shiftdc=False (no calibration)."
            )

    def _shiftdc_sharing(self, turn: Turn, options: Arguments) -> tuple[GenerationConfig, set[str]] | None:
        """The settings of a call of generate() and the names of its other arguments; None where it reads its image itself."""
        if turn.cache is not None or self._shiftdc_settings.rule != "sequential" or not self._shiftdc_keeps_cache():
            return None
        given = {k: v for k, v in options.items() if v is not None}
        config, others = self._prepare_generation_config(given.pop("generation_config", None), **given)
        return (config, set(others)) if takes_cache(config, others) else None

    def _shiftdc_keeps_cache(self) -> bool:
        return self._shiftdc_traits.shares_prefix and self.generation_config.cache_implementation is None

    @torch.no_grad()
    def _shiftdc_read(self, prompt: Prompt, keep: bool) -> ShiftDCImage:
        """The captions of a batch of prompts; keep: with the cache, where the family and these prompts allow it."""
        if not prompt.rows.any():
            return ShiftDCImage([[] for _ in prompt.ids], {}, [])
        cache = new_cache(self.config) if keep and self._shiftdc_keeps_cache() else None
        length = self._shiftdc_settings.caption_max_new_tokens
        generate = functools.partial(super().generate, shiftdc=False, max_new_tokens=length)
        with self._shiftdc_preserving_state():
            return read_images(prompt, self.shiftdc_composer, self._shiftdc_images, self._shiftdc_padding, cache, generate)

    def _shiftdc_amounts(
        self,
        prompt: Prompt,
        reference: torch.Tensor | None,
        captions: Sequence[Sequence[int] | torch.Tensor] | None,
    ) -> dict[str, torch.Tensor]:
        """What the corrections are computed from, as an argument of forward(); nothing for the baked shift."""
        settings = self._shiftdc_settings
        if reference is None and settings.reference == "static":
            return {}
        if reference is None:
            reference = self._shiftdc_reference_of(prompt, captions)
        expected = (len(prompt.ids), len(settings.layers))
        if tuple(reference.shape) != expected or not torch.isfinite(reference).all():
            raise ValueError(
                f"shiftdc_reference must be finite and of shape [batch, calibrated layers] = {list(expected)}, "
                f"found {list(reference.shape)}."
            )
        reference = reference.float()
        if settings.rule == "sequential":
            return {"shiftdc_reference": reference}
        last = torch.where(prompt.rows, prompt.ids.shape[1] - 1, -1)
        return {"shiftdc_correction": self._shiftdc_coordinates(prompt.arguments, last) - reference}

    def _shiftdc_behind_prefixes(
        self, prompt: Prompt, ids: torch.Tensor, mask: torch.Tensor, cache: Cache | None, options: Arguments
    ) -> torch.Tensor:
        """The reply from a cache of the prefixes; ids, mask: the prompt in the columns of the cache."""
        length = ids.shape[1]
        out = super().generate(input_ids=ids, attention_mask=mask, past_key_values=cache, shiftdc_prompt_length=length, **options)
        return torch.cat([prompt.ids.to(out.device), out[:, length:]], dim=1)

    def _shiftdc_reply(self, turn: Turn, options: Arguments) -> torch.Tensor | ModelOutput:
        """The reply to the whole conversation, from the part of it that the caller's cache holds uncorrected."""
        prompt, given = turn.prompt, {"input_ids": turn.prompt.ids}
        images = cut_back(turn, self._shiftdc_images, self._shiftdc_traits.shares_prefix)
        if prompt.mask is not None:
            given["attention_mask"] = prompt.mask
        if turn.cache is not None:
            given["past_key_values"] = turn.cache
        out = super().generate(**given, **images, shiftdc_prompt_length=prompt.ids.shape[1], **options)
        remember_reply(cache_of(out, turn.cache), sequences_of(out), turn, self._shiftdc_padding, prompt.rows)
        return out

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        shiftdc_rows: torch.Tensor | None = None,
        shiftdc_prompt_length: int | None = None,
        **kwargs: Any,
    ) -> Arguments:
        """The base class's arguments of forward() for one step, with the token to correct where the step reads it."""
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

    def generate_batch(self, *args: object, **kwargs: object) -> None:
        """Refused, as are the other entries to continuous batching."""
        raise ValueError(
            "Continuous batching (generate_batch, cache_implementation='paged', transformers serve --continuous-batching) reads "
            "many prompts as one row without their images, which calibration does not know: call generate(), or load the base "
            "model for it."
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    # Captions, coordinates and references, which generate() makes itself

    @torch.no_grad()
    def shiftdc_image(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **image_inputs: Any
    ) -> ShiftDCImage:
        """Read the images of a batch of prompts once, for many questions: `generate(**inputs, shiftdc_image=...)`.

        A caption in view of the request stays the one of the request here; `caption_style: describe` or `naming` at export
        makes captions that serve every question.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, time)`):
                The prompts.
            attention_mask (`torch.LongTensor` of shape `(batch, time)`, *optional*):
                0 at padding.
            image_inputs:
                What else the processor gives, `pixel_values` among it.

        Returns:
            [`ShiftDCImage`]

        Raises ValueError where the checkpoint's reference is no caption.
        """
        if self._shiftdc_settings.reference != "caption":
            raise ValueError("shiftdc_image() is for checkpoints with 'reference: caption'; the others write no caption.")
        return self._shiftdc_read(self._shiftdc_prompt(input_ids, attention_mask, image_inputs), keep=True)

    @torch.no_grad()
    def shiftdc_captions(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **image_inputs: Any
    ) -> list[list[int]]:
        """The model's own captions, greedy and uncalibrated (arXiv:2502.13095, section 4).

        Args:
            input_ids, attention_mask, image_inputs:
                As of `shiftdc_image()`.

        Returns:
            `list[list[int]]`: token ids, one list per row; empty in rows without an image.
        """
        return self._shiftdc_read(self._shiftdc_prompt(input_ids, attention_mask, image_inputs), keep=False).captions

    @torch.no_grad()
    def shiftdc_reference(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        captions: Sequence[Sequence[int] | torch.Tensor] | None = None,
        **image_inputs: Any,
    ) -> torch.Tensor:
        """Coordinates `r` to correct a batch of prompts to, of the kind that the checkpoint was made for.

        Args:
            input_ids, attention_mask, image_inputs:
                As of `shiftdc_image()`.
            captions (`Sequence[Sequence[int]]`, *optional*):
                Caption token ids, one sequence per row; the kind is then `caption`.

        Returns:
            `torch.FloatTensor` of shape `(batch, calibrated layers)`; 0 in rows without an image.
        """
        return self._shiftdc_reference_of(self._shiftdc_prompt(input_ids, attention_mask, image_inputs), captions)

    @torch.no_grad()
    def shiftdc_coordinates(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **image_inputs: Any
    ) -> torch.Tensor:
        """Uncorrected coordinates `x.d` of the last token of every row.

        Args:
            input_ids, attention_mask, image_inputs:
                As of `shiftdc_image()`.

        Returns:
            `torch.FloatTensor` of shape `(batch, calibrated layers)`.
        """
        mask = attention_mask if attention_mask is not None else self._shiftdc_padding.mask(input_ids)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **image_inputs}
        return self._shiftdc_coordinates(inputs, last_true(mask))

    @torch.no_grad()
    def _shiftdc_reference_of(self, prompt: Prompt, captions: Sequence[Sequence[int] | torch.Tensor] | None) -> torch.Tensor:
        """float32 [batch, calibrated layers]; 0 in rows without an image."""
        kind = "caption" if captions is not None else self._shiftdc_settings.reference
        if kind == "static":
            raise ValueError("A checkpoint with 'reference: static' has no reference pass: its shift is baked in.")
        if captions is not None and len(captions) != len(prompt.ids):
            raise ValueError(f"shiftdc_captions needs one caption per row: expected {len(prompt.ids)}, found {len(captions)}.")
        if not prompt.rows.any():
            return torch.zeros(len(prompt.ids), len(self._shiftdc_settings.layers), device=prompt.ids.device)
        if captions is None and kind == "caption":
            captions = self._shiftdc_read(prompt, keep=False).captions
        prompts = self._shiftdc_padding.token_lists(prompt)
        if kind == "blank":
            images = self._shiftdc_images.of_rows(prompt.images, prompt.rows)
            images = {k: self._shiftdc_blank(v) if k in self._shiftdc_traits.pixel_inputs else v for k, v in images.items()}
            require_pixels(images)
            coordinates = self._shiftdc_last_coordinates(prompts, prompt.ids.device, images)
        else:
            texts: Sequence[list[int] | None] = [None] * len(prompts)
            if captions is not None:
                texts = [list(map(int, c)) for c, r in zip(captions, prompt.rows.tolist(), strict=True) if r]
            composer = self.shiftdc_composer
            counterparts = [composer.text_prompt(p, c) for p, c in zip(prompts, texts, strict=True)]
            coordinates = self._shiftdc_last_coordinates(counterparts, prompt.ids.device, {})
        reference = coordinates.new_zeros(len(prompt.ids), coordinates.shape[1])
        reference[prompt.rows] = coordinates
        return reference

    def _shiftdc_blank(self, pixels: torch.Tensor) -> torch.Tensor:
        """A neutral image for every image; what is only padding (all zeros) stays padding."""
        blank = self._shiftdc_traits.blank_pixel
        if blank == 0:
            return torch.zeros_like(pixels)
        if pixels.ndim < 4:  # patches: none is padding
            return torch.full_like(pixels, blank)
        images = pixels.flatten(-3).ne(0).any(-1)[..., None, None, None]
        return images.to(pixels.dtype).expand_as(pixels) * blank

    def _shiftdc_last_coordinates(self, prompts: list[list[int]], device: torch.device, images: Images) -> torch.Tensor:
        """`x.d` of the last token of prompts that were composed here."""
        ids, mask = left_padded(prompts, self._shiftdc_padding.filler, device)
        last = torch.full((len(ids),), ids.shape[1] - 1, device=device)
        made = self._shiftdc_images.for_tokens(ids, images)
        return self._shiftdc_coordinates({"input_ids": ids, "attention_mask": mask, **images, **made}, last)

    @torch.no_grad()
    def _shiftdc_coordinates(self, inputs: Arguments, position: torch.Tensor) -> torch.Tensor:
        """`x.d` at `position` [batch] after every calibrated layer of an uncorrected pass through the backbone."""
        dispatched = hasattr(self, "hf_device_map")  # accelerate's hooks must see the whole pass
        readout = ShiftDCReadout(len(self._shiftdc_settings.layers), ends_pass=not dispatched)
        dropped = {"labels", "logits_to_keep", "past_key_values", "use_cache"}
        inputs = {k: v for k, v in inputs.items() if k not in dropped and v is not None}
        if self._shiftdc_traits.needs_positions and inputs.get("attention_mask") is not None:
            inputs.setdefault("position_ids", positions_of(inputs["attention_mask"]))
        with self._shiftdc_preserving_state(), suppress(ShiftDCReadError):
            self.shiftdc_backbone(self, **inputs, shiftdc_position=position, shiftdc_readout=readout)
        return readout.stacked(position.device)

    # One pass

    def forward(
        self,
        *,
        shiftdc: bool | None = None,
        shiftdc_reference: torch.Tensor | None = None,
        shiftdc_correction: torch.Tensor | None = None,
        shiftdc_position: torch.Tensor | None = None,
        shiftdc_unrecorded: bool = False,
        **inputs: Any,
    ) -> ModelOutput:
        """The base class's forward, corrected where the last generation prompt of rows that hold an image ends.

        A prompt may be read in parts, by `past_key_values`.

        Args:
            inputs:
                All other arguments as of the base class, by name or by position.
            shiftdc (`bool`, *optional*):
                `False` gives the base model.
            shiftdc_reference (`torch.FloatTensor` of shape `(batch, calibrated layers)`, *optional*):
                Coordinates `r` to correct to. Without them the mean shift baked at export is used, because one forward pass
                cannot write a caption: use generate(), or `shiftdc_reference()`.
            shiftdc_correction (`torch.FloatTensor` of shape `(batch, calibrated layers)`, *optional*):
                Amounts `x.d - r` that were computed beforehand.
            shiftdc_position (`torch.LongTensor` of shape `(batch,)`, *optional*):
                The token to correct (-1: none), for prompts without a generation prompt.
            shiftdc_unrecorded (`bool`, *optional*):
                generate() sets it, which itself keeps account of the cache.

        Returns:
            The base class's output.

        Raises ValueError where the prompt's end cannot be told, or what `past_key_values` holds.
        """
        if shiftdc is not False and not self._shiftdc_ready:
            self.shiftdc_check()
        position = None if shiftdc is False else shiftdc_position
        correct = functools.partial(self._shiftdc_pass, reference=shiftdc_reference, correction=shiftdc_correction)
        if shiftdc_unrecorded:
            return correct(inputs, position)

        # what was read before
        cache, ids = inputs.get("past_key_values"), inputs.get("input_ids")
        told = shiftdc is False or position is not None
        if shiftdc is not False:
            self._shiftdc_refuse_cache(cache)
        held, past = held_by(cache), length_of(cache)
        if ids is None and not told:
            raise ValueError(
                "forward() needs input_ids to see which rows hold an image; pass shiftdc_position= with inputs_embeds, or "
                "shiftdc=False (no calibration)."
            )
        if past and held is None and not told:
            raise ValueError(UNKNOWN_CACHE)
        if ids is None or (past and held is None):
            remember(cache, None)
            out = correct(inputs, position)
            remember(cache_of(out, None), None)
            return out

        # where the prompt ends
        step = pass_behind(held, inputs, self._shiftdc_images)
        if position is not None:
            step = step.corrected_at(position)
        elif not told:
            step = self._shiftdc_located(step)

        # the pass, and what the cache holds behind it
        remember(cache, None)
        if step.past < past:
            cut(cache, step.past)
        out = correct(step.inputs, step.position, whole=step.prompt if step.past else None)
        left = cache_of(out, None)
        if step.shown is not None:
            out = correct({**step.inputs, "past_key_values": None, "use_cache": False}, step.shown)
            out.past_key_values = left
        remember(left, step.held)
        return of_the_last(out, ids.shape[1]) if step.past < past else out

    def _shiftdc_located(self, step: Pass) -> Pass:
        """`step` with the positions to correct. Raises ValueError where they cannot be told."""
        prompt = step.prompt
        if not self._shiftdc_shows_image(prompt):
            return step
        assert prompt.mask is not None
        require_row_mask(step.inputs.get("attention_mask"))
        refuse_packed_rows(step.inputs, prompt.mask)
        ends = prompt_ends(self.shiftdc_composer, prompt.ids, prompt.mask, prompt.rows, labels_of(step))
        return ending_at(step, ends, self._shiftdc_traits.image_token_id, self._shiftdc_traits.shares_prefix)

    def _shiftdc_pass(
        self,
        inputs: Arguments,
        position: torch.Tensor | None,
        reference: torch.Tensor | None,
        correction: torch.Tensor | None,
        whole: Prompt | None = None,
    ) -> ModelOutput:
        """One pass of the base class, corrected at `position` (None: nowhere). whole: the prompt, where a cache has a part."""
        if position is None:
            return super().forward(**inputs, shiftdc=False)
        settings = self._shiftdc_settings
        if correction is None and reference is None and settings.reference != "static":
            logger.warning_once(
                f"forward() got no shiftdc_reference, so the mean shift baked at export is used instead of the "
                f"'{settings.reference}' reference; generate() computes that reference itself."
            )
        if correction is None and reference is not None and settings.rule == "precomputed":
            past = whole.ids.shape[1] - inputs["input_ids"].shape[1] if whole is not None else 0
            given, at = inputs if whole is None else whole.arguments, torch.where(position < 0, position, position + past)
            correction = self._shiftdc_coordinates(given, at) - reference
        return super().forward(**inputs, shiftdc_position=position, shiftdc_reference=reference, shiftdc_correction=correction)


def _recheck(model: ShiftDCMixin, _incompatible: object) -> None:
    """After load_state_dict the buffers are checked again before the next pass."""
    model._shiftdc_ready = False
    for correction in model.shiftdc_corrections:
        correction.checked = False


def _with_shiftdc_arguments(
    forward: Callable[..., ModelOutput], base_forward: Callable[..., ModelOutput]
) -> Callable[..., ModelOutput]:
    """`forward` under the signature of `base_forward` plus ShiftDC's arguments: generate() reads signatures."""
    base = inspect.signature(base_forward)
    own = [p for n, p in inspect.signature(forward).parameters.items() if n.startswith("shiftdc")]
    parameters = list(base.parameters.values())
    tail = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    head = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    names = [p.name for p in head[1:]]  # without self

    @functools.wraps(forward)
    def bound(self: ShiftDCMixin, *args: object, **kwargs: object) -> ModelOutput:
        return forward(self, **dict(zip(names, args, strict=False)), **kwargs)

    vars(bound)["__signature__"] = base.replace(parameters=[*head, *own, *tail])
    return bound


@functools.cache
def _parameters(forward: Callable[..., object]) -> frozenset[str]:
    """The names of a forward()'s parameters."""
    return frozenset(inspect.signature(forward).parameters)


def _takes(forward: Callable[..., object], inputs: Arguments) -> bool:
    """Whether a forward() has parameters for all inputs but those of ShiftDC, which go on to the decoder layers."""
    return {n for n in inputs if not n.startswith("shiftdc")} <= _parameters(forward)


@functools.cache
def calibrated_class(stock: Any, own: type[ShiftDCMixin] = ShiftDCMixin, module: str = __name__) -> type[ShiftDCMixin]:
    """The calibrated counterpart of a `...ForConditionalGeneration` of transformers.

    own: the mixin. module: where the class can be found by its name.
    """
    # GenerationMixin is named, so that transformers makes no class of its own of this one, which could not be pickled
    values = {"config_class": config_class(stock.config_class), "__module__": module}
    made = type(f"ShiftDC{stock.__name__}", (own, stock, GenerationMixin), values)
    _register_key_conversion(made, stock.__name__, stock.config_class.model_type)
    return made


def _register_key_conversion(cls: type, *names: str) -> None:
    """Give `cls` the checkpoint key renaming of a transformers class or model_type.

    transformers skips it for classes of other modules, which would load old checkpoints with random weights.
    """
    for name in names:
        if (mapping := get_checkpoint_conversion_mapping(name)) is not None:
            register_checkpoint_conversion_mapping(cls.__name__, mapping, overwrite=True)
            return


def __getattr__(name: str) -> type[ShiftDCMixin]:
    """`ShiftDCLlavaForConditionalGeneration` for transformers' `LlavaForConditionalGeneration`, and so on."""
    return calibrated_class(stock_class(name, __name__))
