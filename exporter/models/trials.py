"""What a model family needs that only shows when the model runs: tried on the base model, and recorded in the export."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import nn
from transformers import DynamicCache

from exporter.errors import InputError
from exporter.modeling.configuration_shiftdc import ShiftDCTraits
from exporter.modeling.image_prefix_shiftdc import copied, new_cache
from exporter.modeling.inputs_shiftdc import positions_of
from exporter.models.conversation import user_turn
from exporter.models.hooks import hooked

if TYPE_CHECKING:
    from exporter.models.vlm import VLM, Inputs

#: Two requests whose prompts differ behind the image alone; the second prompt is the longer.
REQUESTS = ("What is it?", "Which colours does it have, and how many of them are there in all?")
#: What Idefics3 and others take for padding is an image of zeros: this is none, and as good as one.
NEARLY_BLANK = 1e-6
#: How far logits may be from those without a cache, in units of their own spread: of 32 bits, and of fewer.
TOLERANCE, COARSE_TOLERANCE = 1e-3, 0.1


@torch.no_grad()
def tried_traits(vlm: VLM) -> ShiftDCTraits:
    """The traits of `vlm`, with what shows when it runs. Raises InputError where the model cannot be calibrated."""
    inputs = vlm.encode([REQUESTS[0]], [_picture()])
    require_arguments(vlm, inputs)
    width, axis = token_shape(vlm, inputs)
    state, blank = tuple(backbone_state(vlm, inputs)), blank_pixel(vlm)
    positions = not state and needs_positions(vlm)
    known = replace(vlm.traits, width=width, stream_axis=axis, backbone_state=state, blank_pixel=blank, needs_positions=positions)
    return replace(known, shares_prefix=shares_prefix(vlm, known))


def require_arguments(vlm: VLM, inputs: Inputs) -> None:
    """Raise InputError where what the model's forward() is given by name does not reach its decoder layers."""
    reached: list[bool] = []
    layers = vlm.decoder_layers
    handles = [
        layer.register_forward_hook(lambda module, args, kwargs, out: reached.append("shiftdc" in kwargs), with_kwargs=True)
        for layer in layers
    ]
    try:
        vlm.model(**inputs, shiftdc=False)
    finally:
        for handle in handles:
            handle.remove()
    if not reached or not all(reached):
        raise InputError(
            f"MODEL: {type(vlm.model).__name__} does not hand its arguments on to its decoder layers, by which they learn what "
            "to correct, so it cannot be calibrated; take a model of another family."
        )


@torch.no_grad()
def skipped_layers(vlm: VLM) -> frozenset[int]:
    """Decoder layers that prompts without an image skip: they have no text-only coordinate and cannot be calibrated."""
    ran: set[int] = set()
    layers = vlm.decoder_layers
    handles = [layer.register_forward_hook(lambda *_, i=i: ran.add(i)) for i, layer in enumerate(layers)]
    try:
        vlm.backbone(vlm.encode([REQUESTS[0]]))
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(range(len(layers))) - ran


def token_shape(vlm: VLM, inputs: Inputs) -> tuple[int, int | None]:
    """(numbers that a decoder layer puts out for a token, the axis of its residual streams). Raises InputError."""
    shapes: set[tuple[int, ...]] = set()
    with hooked(list(vlm.decoder_layers), lambda number, output: shapes.add(tuple(output.shape))):
        vlm.model(**inputs)
    tokens = inputs["input_ids"].shape[1]
    known: dict[int, dict[tuple[int, int], int | None]] = {3: {(0, 1): None}, 4: {(0, 1): 2, (1, 2): 0}}
    for shape in shapes if len(shapes) == 1 else ():
        for (batch, time), axis in known.get(len(shape), {}).items():
            if (shape[batch], shape[time]) == (1, tokens):
                return shape[-1] * (1 if axis is None else shape[axis]), axis
    raise InputError(
        f"MODEL: the decoder layers of {type(vlm.model).__name__} put out {' and '.join(map(str, sorted(shapes)))} for one "
        f"prompt of {tokens} tokens, expected the same of all: as many states as tokens; take a model of another family."
    )


def backbone_state(vlm: VLM, inputs: Inputs) -> list[str]:
    """Attributes of modules that a pass leaves behind and the next one may read, as paths."""
    before = _tensors_of(vlm.model)
    vlm.model(**inputs, logits_to_keep=1)
    after = _tensors_of(vlm.model)
    return sorted(name for name, value in after.items() if value is not None and before.get(name) is not value)


def _tensors_of(model: nn.Module) -> dict[str, object]:
    """Tensors that are neither parameters nor buffers, and what is None, by path."""
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if value is None or isinstance(value, torch.Tensor)
    }


def needs_positions(vlm: VLM) -> bool:
    """Whether a prompt that is padded on the left gives other logits unless forward() is told its tokens' positions."""
    plain = vlm.encode([REQUESTS[0]])
    padded = {name: torch.nn.functional.pad(value, (3, 0)) for name, value in plain.items() if value.ndim == 2}
    told = {**padded, "position_ids": positions_of(padded["attention_mask"])}
    expected, without, given = (_text_logits(vlm, inputs) for inputs in (plain, padded, told))
    if expected is None or without is None or given is None:
        return False
    return not _are_close(vlm, without, expected) and _are_close(vlm, given, expected)


def _text_logits(vlm: VLM, inputs: Inputs) -> torch.Tensor | None:
    """None where the outer model takes no prompt without an image."""
    try:
        return vlm.model(**inputs, logits_to_keep=1).logits[:, -1]
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError):
        return None


def blank_pixel(vlm: VLM) -> float:
    """The value of every pixel of a blank image: 0, unless the model takes such an image for padding.

    Then there are tokens for an image that it drops, and it raises. A single image of zeros may be kept, so two are shown.
    """
    try:
        inputs = vlm.encode_conversations([[user_turn(REQUESTS[0], _picture(), _picture())]])
    except InputError:  # one image is all that its prompts take
        inputs = vlm.encode([REQUESTS[0]], [_picture()])
    try:
        logits = vlm.model(
            **{**inputs, **{name: torch.zeros_like(inputs[name]) for name in vlm.traits.pixel_inputs if name in inputs}}
        ).logits
    except (ValueError, RuntimeError, IndexError):
        return NEARLY_BLANK
    return 0.0 if torch.isfinite(logits[:, -1]).all() else NEARLY_BLANK


def shares_prefix(vlm: VLM, traits: ShiftDCTraits) -> bool:
    """Whether a prompt gives the same logits from the KV cache of its beginning, up to the end of the image, as without it.

    The cache is filled by another prompt that begins in the same way, and the image is not shown again.
    """
    if traits.backbone_state:  # positions that count from it would be guessed
        return False
    picture = _picture()
    first, second = (vlm.encode([request], [picture]) for request in REQUESTS)
    cache = new_cache(vlm.model.config)
    end = _end_of_image(first["input_ids"][0], traits.image_token_id)
    if cache is None or not torch.equal(first["input_ids"][0, :end], second["input_ids"][0, :end]):
        return False
    try:
        vlm.model(**first, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(end - cache.get_seq_length())
        behind = {k: second[k] for k in ("input_ids", "attention_mask")}
        found = [_next_logits(vlm, behind, copied(cache)), _next_logits(vlm, _with_gap(behind, end), copied(cache))]
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError):  # however it says that it cannot
        return False
    expected = _next_logits(vlm, second, None)
    return all(_are_close(vlm, logits, expected) for logits in found)


def _with_gap(inputs: Inputs, end: int) -> Inputs:
    """With three columns of padding behind the image, as in batches of prompts of several lengths."""
    return {name: torch.cat([v[:, :end], torch.zeros_like(v[:, :3]), v[:, end:]], dim=1) for name, v in inputs.items()}


def _end_of_image(ids: torch.Tensor, image_token_id: int) -> int:
    return int((ids == image_token_id).nonzero()[-1]) + 1


def _next_logits(vlm: VLM, inputs: Inputs, cache: DynamicCache | None) -> torch.Tensor:
    """By generate(), which knows what to give forward() behind a cache."""
    begun = {} if cache is None else {"past_key_values": cache}
    out = vlm.model.generate(
        **inputs, **begun, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return out.logits[0]


def _are_close(vlm: VLM, one: torch.Tensor, two: torch.Tensor) -> bool:
    if one.shape != two.shape:
        return False
    tolerance = TOLERANCE if vlm.model.dtype == torch.float32 else COARSE_TOLERANCE
    return bool((one - two).float().abs().max() <= tolerance * two.float().std().clamp_min(1e-6))


def _picture() -> Image.Image:
    return Image.linear_gradient("L").resize((64, 64)).convert("RGB")
