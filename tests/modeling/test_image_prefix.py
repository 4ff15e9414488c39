"""One reading of an image, part by part; test_prefix.py compares whole replies, test_cache.py the cache's layers."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from other_device import other_device
from transformers import DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer

from exporter.modeling.configuration_shiftdc import ShiftDCTraits
from exporter.modeling.image_prefix_shiftdc import (
    SPARE,
    PreallocatedLayer,
    ShiftDCImage,
    _pixels,
    behind_prefixes,
    copied,
    new_cache,
    read_images,
)
from exporter.modeling.inputs_shiftdc import ImageArguments, Padding
from exporter.modeling.modeling_shiftdc import ShiftDCMixin

TRAITS = ShiftDCTraits("model.language_model.layers", 64, "image_seq_length", image_token_id=4)
IMAGES = ImageArguments(
    frozenset({"pixel_values", "pixel_mask", "by_row", "token_type_ids"}), frozenset({"by_row"}),
    partial(ShiftDCMixin.shiftdc_token_inputs, TRAITS), 4, None,
)  # fmt: skip
PADDING = Padding(3, frozenset({2, 5}))
PIXELS = torch.arange(6.0).reshape(2, 3)
#: A prompt is [1, 4, ...]; for its caption 8 stands behind the image.
COMPOSER = SimpleNamespace(caption_prompt=lambda p: [*p[:2], 8], image_prefix=lambda p: p[:2] if p[0] == 1 else [])
BOTH = torch.tensor([[3, 1, 4, 9], [1, 4, 7, 7]])


def prompt(ids=BOTH, mask=None, **images):
    return IMAGES.prompt(ids, mask, {"pixel_values": PIXELS, **images})


def states(tokens, batch=2):
    return torch.randn(batch, 1, tokens, 2), torch.randn(batch, 1, tokens, 2)


def of_tokens(tokens, batch=2):
    cache = DynamicCache()
    cache.layers = [PreallocatedLayer()]
    cache.layers[0].update(*states(tokens, batch))
    return cache


def message_of(run, *args, **kwargs):
    with pytest.raises(ValueError) as raised:
        run(*args, **kwargs)
    return str(raised.value)


class Writes:
    """generate() of a base class that writes these replies, and fills the cache that it is given."""

    def __init__(self, *replies):
        self.replies, self.given = replies, {}

    def __call__(self, **given):
        self.given = given
        ids = given["input_ids"]
        if "past_key_values" in given:
            given["past_key_values"].layers[0].update(*states(ids.shape[1] + 1, len(ids)))
        return torch.cat([ids, torch.tensor(self.replies)], dim=1)


def test_captions_are_greedy_and_end_where_a_text_ends():
    generate = Writes([20, 2, 3], [21, 5, 22])
    read = read_images(prompt(), COMPOSER, IMAGES, PADDING, None, generate)
    assert read.captions == [[20], [21, 22]] and read.prefixes == [[], []] and read.cache is None
    assert read.images == {"pixel_values": PIXELS}
    given = generate.given
    assert given.pop("input_ids").tolist() == [[1, 4, 8], [1, 4, 8]]
    assert given.pop("attention_mask").tolist() == [[1, 1, 1], [1, 1, 1]] and given.pop("pixel_values") is PIXELS
    assert given == {
        "use_cache": True, "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False,
    }  # fmt: skip


def test_the_cache_of_what_stands_before_the_question_is_kept():
    generate, cache = Writes([20], [21]), of_tokens(0)
    cache.layers = [PreallocatedLayer()]
    read = read_images(prompt(token_type_ids=BOTH), COMPOSER, IMAGES, PADDING, cache, generate)
    assert read.prefixes == [[1, 4], [1, 4]] and read.cache is cache and cache.get_seq_length() == 2
    assert generate.given["past_key_values"] is cache
    assert generate.given["token_type_ids"].tolist() == [[0, 1, 0], [0, 1, 0]]


def test_caption_requests_of_several_lengths_are_padded_behind_the_image():
    longer = SimpleNamespace(caption_prompt=lambda p: [*p[:2], *p[2:], 8], image_prefix=lambda p: p[:2])
    read_images(prompt(), longer, IMAGES, PADDING, of_tokens(0), generate := Writes([20], [21]))
    assert generate.given["input_ids"].tolist() == [[1, 4, 3, 9, 8], [1, 4, 7, 7, 8]]
    assert generate.given["attention_mask"].tolist() == [[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]


def test_prompts_on_another_device():
    read = ShiftDCImage([[], []], {"pixel_values": PIXELS}, [[1, 4], [1, 4]], of_tokens(2))
    with other_device() as device:
        there = IMAGES.prompt(BOTH.to(device), None, {"pixel_values": PIXELS.to(device)})
        read.check(there)
        moved = behind_prefixes(read, there, PADDING, fixed_columns=False)
        assert [t.device for t in moved] == [device, device]
        given = []
        with pytest.raises(StopIteration):
            read_images(there, COMPOSER, IMAGES, PADDING, None, lambda **k: given.append(k) or next(iter(())))
        assert [given[0][name].device for name in ("input_ids", "attention_mask", "pixel_values")] == [device] * 3


def test_of_some_prompts_no_cache_is_kept():
    ids = torch.tensor([[9, 4, 7], [1, 4, 7]])  # the first has no prefix
    read = read_images(prompt(ids), COMPOSER, IMAGES, PADDING, of_tokens(0), generate := Writes([20], [21]))
    assert read.cache is None and read.prefixes == [[], []] and "past_key_values" not in generate.given
    ids = torch.tensor([[1, 9, 7], [1, 4, 7]])  # the first has no image
    mixed = IMAGES.prompt(ids, None, {"pixel_values": PIXELS[:1], "by_row": torch.tensor([6, 7])})
    read = read_images(mixed, COMPOSER, IMAGES, PADDING, of_tokens(0), generate := Writes([21]))
    assert read.captions == [[], [21]] and read.cache is None and read.prefixes == [[]]
    assert generate.given["by_row"].tolist() == [7] and generate.given["input_ids"].tolist() == [[1, 4, 8]]


def test_an_image_token_without_an_image_is_refused():
    bare = IMAGES.prompt(BOTH, None, {})
    assert "no image was given" in message_of(read_images, bare, COMPOSER, IMAGES, PADDING, None, None)


def test_pixels_tell_images_apart():
    mask = torch.ones(2)
    given = {"pixel_values": PIXELS, "pixel_mask": mask, "pixel_none": None, "image_sizes": mask}
    assert _pixels(given) == {"pixel_values": PIXELS, "pixel_mask": mask}
    read = ShiftDCImage([[1], [2]], {"pixel_values": PIXELS}, [[1, 4], [1, 4]])
    read.check(prompt())
    read.check(prompt(pixel_mask=mask))  # nothing is known of it
    read.check(IMAGES.prompt(BOTH, None, {}))
    other = IMAGES.prompt(BOTH, None, {"pixel_values": PIXELS + 1})
    assert message_of(read.check, other) == (
        "shiftdc_image is of other images (pixel_values differ): call shiftdc_image(**inputs) for these."
    )
    assert message_of(read.check, prompt(BOTH[:1])) == ("shiftdc_image is of 2 prompts, found 1: call shiftdc_image(**inputs).")


def test_what_stands_behind_the_prefixes():
    read = ShiftDCImage([[], []], {}, [[1, 4], [1]], of_tokens(2))
    assert read.rest([[1, 4, 9], [1, 7, 7]]) == [[9], [7, 7]]
    for prompts in ([[1, 5, 9], [1, 7]], [[1, 4], [1, 7]], [[1, 4, 9], [1]], [[1, 4, 9]], [[1, 4, 9], [1, 7], [1, 7]]):
        assert read.rest(prompts) is None
    assert ShiftDCImage([[], []], {}, [[1, 4], [1]]).rest([[1, 4, 9], [1, 7, 7]]) is None


def test_a_prompt_in_the_columns_of_a_cache():
    read = ShiftDCImage([[], []], {}, [[1, 4], [1, 4]], of_tokens(2))
    assert behind_prefixes(read, prompt(torch.tensor([[1, 5, 9], [1, 4, 7]])), PADDING, False) is None
    shown = prompt()
    ids, mask = behind_prefixes(read, shown, PADDING, fixed_columns=False)
    assert ids.tolist() == [[1, 4, 3, 9], [1, 4, 7, 7]] and mask.tolist() == [[1, 1, 0, 1], [1, 1, 1, 1]]
    assert behind_prefixes(read, shown, PADDING, fixed_columns=True) is None
    even = prompt(torch.tensor([[1, 4, 9], [1, 4, 7]]))
    ids, _ = behind_prefixes(read, even, PADDING, fixed_columns=True)
    assert torch.equal(ids, even.ids)


def test_every_reply_has_a_cache_of_its_own():
    read = ShiftDCImage([[]], {}, [[1, 4]], of_tokens(2))
    own = read.own_cache()
    assert own is not read.cache and torch.equal(own.layers[0].keys, read.cache.layers[0].keys)
    assert ShiftDCImage([[]], {}, [[1, 4]]).own_cache() is None


def test_which_models_get_a_cache_with_room():
    sizes = {"num_hidden_layers": 3, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 10}
    cache = new_cache(LlamaConfig(**sizes))
    assert [type(layer) for layer in cache.layers] == [PreallocatedLayer] * 3
    assert len({id(layer) for layer in cache.layers}) == 3
    assert new_cache(MistralConfig(**sizes, sliding_window=4)) is None


def test_a_copy_holds_the_same_tokens():
    cache = of_tokens(3)
    cache.layers.append(PreallocatedLayer())
    own = copied(cache)
    first, second = own.layers
    assert first.keys is cache.layers[0].keys and first.values is cache.layers[0].values and first.is_initialized is True
    assert (first.dtype, first.device) == (torch.float32, torch.device("cpu")) and first.buffers == {}
    assert not second.is_initialized and second.get_seq_length() == 0
    with_values = first.update(*(new := states(1)))
    assert torch.equal(with_values[1], torch.cat([cache.layers[0].values, new[1]], dim=2))


def test_room_is_made_once_for_many_tokens():
    layer = PreallocatedLayer()
    keys, values = layer.update(*(first := states(4)), {"cache_position": 1}, other=2)
    assert torch.equal(keys, first[0]) and torch.equal(values, first[1]) and keys is layer.keys and values is layer.values
    assert set(layer.buffers) == {"keys", "values"}
    assert all(b.shape == (2, 1, 4 + SPARE, 2) and b.dtype == torch.float32 for b in layer.buffers.values())
    kept = dict(layer.buffers)
    layer.update(*states(SPARE))  # just fits
    assert all(layer.buffers[name] is kept[name] for name in kept)
    layer.update(*states(1))
    assert all(layer.buffers[name] is not kept[name] for name in kept)
    assert layer.buffers["keys"].shape[2] == 4 + SPARE + 1 + SPARE and torch.equal(layer.keys[:, :, :4], first[0])


@pytest.mark.parametrize("change", ["moved", "other rows", "cropped"])
def test_tokens_that_other_methods_replaced_are_copied(change):
    layer, like = PreallocatedLayer(), DynamicLayer()
    first, second = states(4), states(1)
    for one in (layer, like):
        one.update(*first)
        if change == "moved":
            one.keys, one.values = one.keys.clone(), one.values.clone()
        elif change == "other rows":
            one.keys, one.values = one.keys[:1], one.values[:1]
        else:
            one.crop(-2)
        new = second if change != "other rows" else tuple(s[:1] for s in second)
        one.update(*new)
    assert torch.equal(layer.keys, like.keys) and torch.equal(layer.values, like.values)


@pytest.mark.parametrize(
    ("written", "again", "same"), [(False, False, True), (True, True, True), (True, False, False), (False, True, True)]
)
def test_what_inference_mode_wrote_is_written_in_it_alone(written, again, same):
    layer = PreallocatedLayer()
    with torch.inference_mode(written):
        layer.update(*states(4))
    place = layer.keys.data_ptr()
    with torch.inference_mode(again), torch.no_grad():
        layer.update(*states(1))
    assert (layer.keys.data_ptr() == place) is same
