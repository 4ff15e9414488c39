"""What a model family needs, found by trying its classes and its processor, before any weights are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn

from exporter.errors import InputError
from exporter.modeling.configuration_shiftdc import STOCK_CLASS_GUARD, ShiftDCTraits, TokenInput
from exporter.models.chat_template import encoded
from exporter.models.conversation import Conversation, Message, user_turn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

REQUEST = "What is it?"
#: Names under which configs and processors know the token of an image, the newest first, and that of a video.
IMAGE_TOKEN_NAMES = ("image_token_id", "image_token_index", "img_context_token_id", "image_context_token_id")
VIDEO_TOKEN_NAMES = ("video_token_id", "video_token_index")


def structural_traits(model: PreTrainedModel, processor: ProcessorMixin) -> ShiftDCTraits:
    """What shows without weights; the rest is cautious (`trials.py` measures it). Raises InputError.

    model: may lie on the meta device.
    """
    prompts = _Prompts(processor)
    image_token_id = _image_token(model.config, processor, prompts)
    video_token_id = _token_named(VIDEO_TOKEN_NAMES, model.config, processor)
    return ShiftDCTraits(
        decoder_layers=decoder_layers_of(model),
        width=model.config.get_text_config().hidden_size,
        guard_field=guard_field_of(model.config),
        image_token_id=image_token_id,
        video_token_id=None if video_token_id == image_token_id else video_token_id,
        pixel_inputs=prompts.pixel_inputs(),
        row_inputs=prompts.row_inputs(),
        token_inputs=prompts.token_inputs(),
    )


def decoder_layers_of(model: PreTrainedModel) -> str:
    """Path of the decoder layers. Raises InputError."""
    depth = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    lists = [(path, m) for path, m in lists if id(m) in inside] or lists
    shortest = sorted(lists, key=lambda found: (found[0].count("."), found[0]))
    if not shortest:
        raise InputError(
            f"MODEL: {type(model).__name__} has no list of the config's {depth} decoder layers that could be calibrated."
        )
    return shortest[0][0]


def guard_field_of(config: PreTrainedConfig) -> str:
    """A field of config.json whose values the stock config class checks, so that it cannot read a calibrated checkpoint."""
    stock: Any = next(c for c in type(config).__mro__ if c.__module__.startswith("transformers."))
    values = config.to_dict()
    fields = [n for n in getattr(stock, "__dataclass_fields__", ()) if n in values and not isinstance(values[n], (dict, str))]
    for name in [*sorted(set(fields) - _WIDELY_READ), *_LAST_RESORT]:
        try:
            stock.from_dict({**values, name: STOCK_CLASS_GUARD})
        except Exception as error:  # noqa: BLE001 (whatever the class raises; it must show the sentence)
            if STOCK_CLASS_GUARD in str(error):
                return name
    raise InputError(
        f"MODEL: {stock.__name__} checks none of its fields, so that nothing would keep the stock class, which is uncalibrated, "
        "from loading the export."
    )


#: Fields that programs other than transformers read, or that say nothing of a model.
_WIDELY_READ = {
    "tie_word_embeddings", "vocab_size", "hidden_size", "bos_token_id", "eos_token_id", "pad_token_id", "is_encoder_decoder",
    "chunk_size_feed_forward", "output_attentions", "output_hidden_states", "return_dict", "use_cache", "dtype", "id2label",
    "label2id", "architectures", "image_token_id", "image_token_index", "video_token_id",
}  # fmt: skip
_LAST_RESORT = ("image_token_index", "image_token_id", "tie_word_embeddings")


def _image_token(config: PreTrainedConfig, processor: ProcessorMixin, prompts: _Prompts) -> int:
    found = _token_named(IMAGE_TOKEN_NAMES, config, processor)
    if found is None or found not in prompts.image_ids:
        raise InputError(
            f"MODEL: the token that stands for an image cannot be told (config and processor name {found}, which is not in a "
            "prompt with an image); restore config.json and the processor's files."
        )
    return found


def _token_named(names: Sequence[str], *holders: object) -> int | None:
    for holder in holders:
        for name in names:
            if isinstance(found := getattr(holder, name, None), int):
                return found
    return None


def _picture(shade: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    picture = Image.linear_gradient("L").resize(size).convert("RGB")
    return picture.point([min(255, value // 2 + shade) for value in range(256)] * 3)


def takes_text(processor: ProcessorMixin) -> bool:
    """Whether a processor takes prompts without an image."""
    try:
        encoded(processor, [[user_turn(REQUEST)]], return_tensors="pt")
    except InputError:
        return False
    return True


class _Prompts:
    """What the processor makes of a few prompts."""

    def __init__(self, processor: ProcessorMixin):
        self.processor = processor
        self.one = self._encoded(user_turn(REQUEST, _picture(20)))
        self.other = self._encoded(user_turn(REQUEST, _picture(120)))
        self.text = self._tried([user_turn(REQUEST)])
        self.large = self._tried([user_turn(REQUEST, _picture(20, (1536, 1024)))])
        text, shown = [user_turn(REQUEST)], [user_turn(REQUEST, _picture(20))]
        twice = [user_turn(REQUEST, _picture(20), _picture(20))]
        # rows and images differ in number, so that neither is taken for the other; some processors take no such batches
        batches = ([text, shown, text], [text, shown, text, text], [twice, shown], [twice, twice, shown])
        self.mixed = [made for batch in batches if (made := self._tried(*batch)) is not None]

    @property
    def image_ids(self) -> set[int]:
        return set(self.one["input_ids"][0].tolist())

    def pixel_inputs(self) -> tuple[str, ...]:
        """Those that differ between two pictures of one size."""
        pairs = [(k, v, self.other.get(k)) for k, v in self.one.items()]
        if self.large is not None:  # cut into crops, which small ones are not
            pairs += [(k, v, None) for k, v in self.large.items() if k not in self.one]
        return tuple(sorted(k for k, v, w in pairs if v.is_floating_point() and (w is None or not _equal(v, w))))

    def row_inputs(self) -> tuple[str, ...]:
        if not self.mixed:
            return ()
        by_row = {k for k in self.one if all(k in b and len(b[k]) == len(b["input_ids"]) for b in self.mixed)}
        return tuple(sorted(k for k in by_row if not self._is_as_long_as_the_prompt(k) or self.one[k].ndim > 2))

    def token_inputs(self) -> dict[str, TokenInput]:
        """Raises InputError for one that does not follow from the tokens alone."""
        others = [n for n in self.one if n not in ("input_ids", "attention_mask") and self.one[n].ndim == 2]
        return {name: self._token_input(name) for name in others if self._is_as_long_as_the_prompt(name)}

    def _token_input(self, name: str) -> TokenInput:
        values = dict(zip(self.one["input_ids"][0].tolist(), self.one[name][0].tolist(), strict=True))
        elsewhere = int(self.one[name][0, -1])
        at = {str(token): int(value) for token, value in values.items() if value != elsewhere}
        made = torch.tensor([[at.get(str(token), elsewhere) for token in self.one["input_ids"][0].tolist()]])
        if not torch.equal(made, self.one[name].long()):
            raise InputError(f"MODEL: the processor's {name} does not follow from a prompt's tokens alone, as it would have to.")
        return TokenInput(elsewhere, at, self.text is None or name in self.text)

    def _is_as_long_as_the_prompt(self, name: str) -> bool:
        return self.one[name].shape[:2] == self.one["input_ids"].shape

    def _encoded(self, *turns: Message) -> dict[str, torch.Tensor]:
        return self._batch([list(turns)])

    def _tried(self, *conversations: Conversation) -> dict[str, torch.Tensor] | None:
        """None where the processor takes no such prompts."""
        try:
            return self._batch(list(conversations))
        except InputError:
            return None

    def _batch(self, conversations: Sequence[Conversation]) -> dict[str, torch.Tensor]:
        inputs = encoded(
            self.processor, conversations, return_tensors="pt", processor_kwargs={"padding": True, "padding_side": "left"}
        )
        return {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and k != "labels"}


def _equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.shape == two.shape and torch.equal(one, two)
