"""What is noted of a KV cache and made of it, part by part; test_calls.py has whole conversations."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from other_device import other_device
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from exporter.modeling.configuration_shiftdc import ShiftDCTraits
from exporter.modeling.conversation_shiftdc import (
    UNKNOWN_CACHE,
    Held,
    OwnPrompt,
    Pass,
    Turn,
    are_equal,
    behind,
    cache_of,
    cut,
    cut_back,
    empty,
    ending_at,
    first_difference,
    held_by,
    is_cuttable,
    is_whole,
    labels_of,
    left_aligned,
    length_of,
    moved_left,
    of_the_last,
    other_arguments,
    pass_behind,
    put_together,
    remember,
    remember_reply,
    reordered,
    require_row_mask,
    sequences_of,
    turn_of,
)
from exporter.modeling.inputs_shiftdc import ImageArguments, Padding
from exporter.modeling.modeling_shiftdc import ShiftDCMixin

TRAITS = ShiftDCTraits("model.language_model.layers", 64, "image_seq_length", image_token_id=4)
IMAGES = ImageArguments(
    frozenset({"pixel_values", "image_sizes", "by_row", "token_type_ids"}), frozenset({"by_row"}),
    partial(ShiftDCMixin.shiftdc_token_inputs, TRAITS), 4, None,
)  # fmt: skip
PADDING = Padding(3, frozenset({2}))
PIXELS = torch.arange(6.0).reshape(1, 6)
OTHER = PIXELS + 1
GO_ON = (
    "This conversation cannot go on from past_key_values in forward(): an earlier correction has to be undone, which this model, "
    "cache or batch does not allow. Use generate(), or give the whole conversation and a new cache, or pass shiftdc=False (no "
    "calibration)."
)


def row(*tokens):
    return torch.tensor([tokens])


def filled(tokens, rows=1, layers=2):
    """A cache of that many tokens, of keys that tell them apart."""
    cache = DynamicCache()
    for layer in range(layers):
        keys = torch.arange(1.0, 1 + rows * tokens).reshape(rows, 1, tokens, 1) + 100 * layer
        cache.update(keys, -keys, layer)
    return cache


def held(ids, images=None, corrected=(-1,), tail=None, mask=None):
    mask = torch.ones_like(ids) if mask is None else mask
    return Held(ids, mask, {} if images is None else images, torch.tensor(corrected), tail)


def known(ids, **what):
    """A cache that holds `ids`."""
    cache = filled(ids.shape[1], len(ids))
    remember(cache, held(ids, **what))
    return cache


def message_of(run, *args, **kwargs):
    with pytest.raises(ValueError) as raised:
        run(*args, **kwargs)
    return str(raised.value)


# what a cache holds


def test_how_many_tokens_there_are():
    assert (length_of(None), length_of(DynamicCache()), length_of(filled(3))) == (0, 0, 3)


def test_what_was_noted_is_known_while_the_cache_is_as_it_was():
    ids = row(9, 8, 7)
    assert held_by(None) is None and held_by(DynamicCache()) is None and held_by(filled(3)) is None
    cache = known(ids)
    found = held_by(cache)
    assert torch.equal(found.ids, ids) and torch.equal(found.last, cache.layers[1].keys[:, :, 2])
    remember(None, found)
    remember(cache, None)
    assert held_by(cache) is None
    for change in (
        lambda c: c.crop(-1),
        lambda c: c.layers[1].keys.add_(1),
        lambda c: c.batch_repeat_interleave(2),
        lambda c: setattr(c, "layers", []),
    ):
        cache = known(ids)
        change(cache)
        assert held_by(cache) is None
    cache = known(ids)
    cache._shiftdc_held = replace(cache._shiftdc_held, last=None)
    assert held_by(cache) is None


def test_the_last_token_s_keys_are_those_of_the_last_layer_that_has_any():
    cache = filled(3, layers=2)
    cache.layers += [DynamicLayer(), SimpleNamespace(keys=torch.ones(1, 3, 1)), SimpleNamespace(), DynamicLayer()]
    cache.layers[-1].keys = torch.empty(1, 1, 0, 1)
    remember(cache, held(row(9, 8, 7)))
    last = cache._shiftdc_held.last
    assert last.tolist() == [[[103.0]]]
    cache.layers[1].keys[:, :, 2] = 0
    assert last.tolist() == [[[103.0]]]  # a copy
    static = SimpleNamespace(get_seq_length=lambda: 2, layers=cache.layers[:1])
    remember(static, held(row(9, 8)))
    assert static._shiftdc_held.last.tolist() == [[[2.0]]]  # of columns that are filled
    window = SimpleNamespace(get_seq_length=lambda: 7, layers=cache.layers[:1])
    remember(window, held(row(9, 8)))
    assert window._shiftdc_held.last.tolist() == [[[3.0]]]
    remember(no_layers := SimpleNamespace(get_seq_length=lambda: 2), held(row(9, 8)))
    assert no_layers._shiftdc_held.last is None


def test_which_caches_can_be_cut():
    assert is_cuttable(filled(2)) and is_cuttable(DynamicCache())
    mixed = filled(2)
    mixed.layers.append(DynamicSlidingWindowLayer(sliding_window=4))
    assert not is_cuttable(mixed)
    cache = filled(5)
    cut(cache, 2)
    assert cache.get_seq_length() == 2 and cache.layers[1].keys.flatten().tolist() == [101, 102]
    cut(cache, 2)
    assert cache.get_seq_length() == 2


def test_a_cache_is_emptied_to_be_filled_anew():
    cache = filled(3)
    empty(cache)
    assert length_of(cache) == 0 and all(layer.is_initialized is False and not layer.keys.numel() for layer in cache.layers)
    cache.update(torch.ones(2, 1, 1, 1), torch.ones(2, 1, 1, 1), 0)
    assert cache.get_seq_length() == 1
    done = []
    full = SimpleNamespace(layers=[object()], get_seq_length=lambda: 0 if done else 3, reset=lambda: done.append(1))
    empty(full)
    assert done == [1]
    stuck = SimpleNamespace(layers=[object()], get_seq_length=lambda: 3, reset=lambda: None)
    assert message_of(empty, stuck) == (
        "A SimpleNamespace cannot be filled anew, as this conversation needs it: give the whole conversation and a new cache, or "
        "pass shiftdc=False (no calibration)."
    )


# a call of generate()


def prompt(ids, mask=None, **images):
    return IMAGES.prompt(ids, mask, images)


def test_a_reply_comes_behind_the_caller_s_own_ids():
    ids, own = row(9, 8, 7, 6), row(7, 6)
    out = torch.tensor([[9, 8, 7, 6, 1, 2], [9, 8, 7, 6, 3, 4]])
    same = Turn(ids, prompt(ids))
    assert same.answered(out) is out and same.whole_answer(out) is out
    turn = Turn(own, prompt(ids))
    assert turn.answered(out).tolist() == [[7, 6, 1, 2], [7, 6, 3, 4]]
    whole = GenerateDecoderOnlyOutput(sequences=out, scores="s")
    assert turn.answered(whole) is whole and whole.sequences.tolist() == [[7, 6, 1, 2], [7, 6, 3, 4]]
    short = torch.tensor([[7, 6, 1], [7, 6, 2]])
    assert turn.whole_answer(short).tolist() == [[9, 8, 7, 6, 1], [9, 8, 7, 6, 2]]
    assert turn.whole_answer(GenerateDecoderOnlyOutput(sequences=short)).tolist() == [[9, 8, 7, 6, 1], [9, 8, 7, 6, 2]]
    two = Turn(torch.tensor([[7], [8]]), prompt(torch.tensor([[5, 7], [6, 8]])))
    out = torch.tensor([[5, 7, 1], [5, 7, 2], [6, 8, 3], [6, 8, 4]])
    assert two.answered(out).tolist() == [[7, 1], [7, 2], [8, 3], [8, 4]]
    assert two.whole_answer(out[:, 1:]).tolist() == out.tolist()


def test_what_a_call_gives_back():
    tensor, cache, other = row(1), DynamicCache(), DynamicCache()
    out = GenerateDecoderOnlyOutput(sequences=tensor, past_key_values=other)
    assert sequences_of(tensor) is tensor and sequences_of(out) is tensor
    assert cache_of(tensor, None) is None and cache_of(out, None) is other
    assert cache_of(out, cache) is cache  # also an empty one, which is false


def test_a_call_without_a_cache_is_its_own_conversation():
    ids, mask = row(4, 9), row(1, 1)
    for cache in (None, DynamicCache()):
        given = {"past_key_values": cache, "attention_mask": mask, "pixel_values": PIXELS, "temperature": 1}
        turn = turn_of(ids, given, IMAGES)
        assert turn.own is ids and turn.prompt.ids is ids and turn.prompt.mask is mask and turn.held is None
        assert turn.prompt.images == {"pixel_values": PIXELS} and turn.cache is cache and turn.prompt.rows.tolist() == [True]
    assert turn_of(ids, {}, IMAGES).prompt.mask is None


def test_new_tokens_go_on_behind_what_the_cache_holds():
    cache = known(row(4, 9, 8), images={"pixel_values": PIXELS}, tail=row(7))
    new = row(5, 6)
    for width, ids in ((6, [4, 9, 8, 7, 5, 6]), (5, [4, 9, 8, 5, 6])):
        turn = turn_of(new, {"past_key_values": cache, "attention_mask": torch.ones(1, width)}, IMAGES)
        assert turn.own is new and turn.prompt.ids.tolist() == [ids] and turn.prompt.mask.shape == (1, width)
        assert turn.prompt.images == {"pixel_values": PIXELS} and turn.cache is cache and turn.held is held_by(cache)
    turn = turn_of(new, {"past_key_values": cache, "attention_mask": row(1, 1, 1, 1, 1, 0)}, IMAGES, as_cached=True)
    assert turn.prompt.ids.tolist() == [[4, 9, 8, 5, 6]] and turn.prompt.mask.tolist() == [[1, 1, 1, 1, 0]]
    with_image = turn_of(row(4, 6), {"past_key_values": cache, "attention_mask": torch.ones(1, 6), "pixel_values": OTHER}, IMAGES)
    assert torch.equal(with_image.prompt.images["pixel_values"], torch.cat([PIXELS, OTHER]))


def test_whole_conversations_are_taken_as_they_are():
    cache = known(row(4, 9, 8), images={"pixel_values": PIXELS})
    whole = row(4, 9, 8, 5, 6)
    for mask in (None, torch.ones_like(whole), row(0, 1, 1, 1, 1)):
        turn = turn_of(whole, {"past_key_values": cache, "attention_mask": mask}, IMAGES)
        assert turn.own is whole and turn.prompt.ids is whole and turn.prompt.images == {"pixel_values": PIXELS}
        assert torch.equal(turn.prompt.mask, torch.ones_like(whole) if mask is None else mask)
    turn = turn_of(whole, {"past_key_values": cache, "pixel_values": OTHER}, IMAGES)
    assert turn.prompt.images == {"pixel_values": OTHER}
    other = row(5, 9, 8, 5, 6)
    given = {"past_key_values": cache, "attention_mask": torch.ones_like(other)}
    assert message_of(turn_of, other, given, IMAGES) == (
        "The input_ids do not begin as the conversation in past_key_values does: give those of the whole conversation, or new "
        "tokens alone with the attention_mask of the whole conversation, or a new cache."
    )
    behind_image = row(4, 9, 7, 5, 6)  # other text than the cache has is read anew
    assert turn_of(behind_image, {**given, "attention_mask": torch.ones_like(other)}, IMAGES).prompt.ids is behind_image
    second = known(row(9, 4, 8), images={"pixel_values": PIXELS})
    assert "do not begin" in message_of(
        turn_of, row(9, 5, 8, 1), {"past_key_values": second, "attention_mask": torch.ones(1, 4)}, IMAGES
    )
    text = known(row(9, 8))
    assert turn_of(row(7, 7, 7), {"past_key_values": text, "attention_mask": torch.ones(1, 3)}, IMAGES).prompt.images == {}


def test_token_types_are_made_anew_for_the_whole_conversation():
    cache = known(row(4, 9), images={"pixel_values": PIXELS, "token_type_ids": row(1, 0)})
    turn = turn_of(row(8, 7), {"past_key_values": cache, "attention_mask": torch.ones(1, 4)}, IMAGES)
    assert turn.prompt.images["token_type_ids"].tolist() == [[1, 0, 0, 0]]
    bare = known(row(9, 9))
    given = {"past_key_values": bare, "attention_mask": torch.ones(1, 4), "token_type_ids": row(1, 0), "pixel_values": PIXELS}
    assert turn_of(row(4, 7), given, IMAGES).prompt.images["token_type_ids"].tolist() == [[0, 0, 1, 0]]


def test_conversations_that_cannot_be_known():
    ids = row(9, 8)
    assert message_of(turn_of, ids, {"past_key_values": filled(2)}, IMAGES) == UNKNOWN_CACHE
    assert UNKNOWN_CACHE == (
        "past_key_values holds tokens that this model does not know of, which may be an image: fill a cache by this model's own "
        "generate() or forward(), give the whole conversation and a new cache, or pass shiftdc=False (no calibration)."
    )
    cache = known(row(4, 9))
    cache._shiftdc_held = replace(cache._shiftdc_held, images=None)
    given = {"past_key_values": cache, "attention_mask": torch.ones(1, 4)}
    assert message_of(turn_of, ids, given, IMAGES) == (
        "The images of several turns cannot be put in order here: give the input_ids and the images of the whole conversation, "
        "and a new cache."
    )
    whole = row(4, 9, 8)
    given = {"past_key_values": cache, "attention_mask": torch.ones(1, 3), "pixel_values": PIXELS}
    assert turn_of(whole, given, IMAGES).prompt.images == {"pixel_values": PIXELS}


@pytest.mark.parametrize(
    ("ids", "mask", "tail", "whole"),
    [
        (row(9, 8, 7), None, None, True),
        (row(9, 8), None, None, True),
        (row(9, 8, 7), 3, None, True),
        (row(7, 7, 7), 3, None, True),
        (row(7), 3, None, False),
        (row(7), 4, row(6), False),
        (row(7), 3, row(6), False),
        (row(7), 4, None, "4"),
        (row(7), 2, None, "2"),
        (row(7, 7), None, None, "none"),
        (row(9), None, None, "none"),
    ],
)
def test_whether_ids_are_whole(ids, mask, tail, whole):
    before = held(row(9, 8), tail=tail)
    given = None if mask is None else torch.ones(1, mask)
    if isinstance(whole, bool):
        assert is_whole(ids, given, before) is whole
    else:
        assert message_of(is_whole, ids, given, before) == (
            f"attention_mask must be as long as the whole conversation, that is the 2 tokens in past_key_values and the "
            f"{ids.shape[1]} in input_ids, found {whole}; or give the ids of the whole conversation."
        )


def test_another_number_of_rows_is_refused():
    assert message_of(is_whole, row(9, 8), None, held(torch.ones(2, 2))) == (
        "past_key_values holds 2 rows, found 1 in input_ids: give a new cache."
    )


def test_what_goes_behind_what():
    before = held(row(9, 8), tail=row(7))
    ids, mask = behind(before, row(6), torch.ones(1, 4), False)
    assert ids.tolist() == [[9, 8, 7, 6]] and mask.tolist() == [[1, 1, 1, 1]]
    assert behind(before, row(6), torch.ones(1, 3), False)[0].tolist() == [[9, 8, 6]]
    masked = held(row(9, 8), tail=row(7), mask=row(0, 1))
    ids, mask = behind(masked, row(6, 5), row(1, 1, 1, 0, 1), True)
    assert ids.tolist() == [[9, 8, 6, 5]] and mask.tolist() == [[0, 1, 0, 1]]
    assert behind(held(row(9, 8)), row(6), torch.ones(1, 4), False)[0].tolist() == [[9, 8, 6]]


def test_padding_on_the_right_goes_to_the_left():
    ids = torch.tensor([[4, 9, 3], [9, 8, 7]])
    for mask in (torch.tensor([[1, 1, 0], [1, 1, 1]]), None):
        turn = Turn(ids, prompt(ids, mask, pixel_values=PIXELS, token_type_ids=torch.tensor([[1, 0, 0], [0, 0, 0]])))
        found = left_aligned(turn, IMAGES, PADDING)
        assert found.own is ids and found.prompt.ids.tolist() == [[3, 4, 9], [9, 8, 7]]
        assert found.prompt.mask.tolist() == [[0, 1, 1], [1, 1, 1]] and found.prompt.rows.tolist() == [True, False]
        assert found.prompt.images["pixel_values"] is PIXELS
        assert found.prompt.images["token_type_ids"].tolist() == [[0, 1, 0], [0, 0, 0]]
        assert message_of(left_aligned, replace(turn, held=held(ids)), IMAGES, PADDING) == (
            "A conversation in past_key_values goes on with padding on the left; pad on the left."
        )
    hidden = Turn(ids, prompt(ids, torch.tensor([[1, 1, 1], [1, 0, 0]])))  # other tokens than padding
    assert left_aligned(hidden, IMAGES, PADDING).prompt.ids.tolist() == [[4, 9, 3], [8, 7, 9]]
    left = Turn(ids, prompt(ids.flip(1), torch.tensor([[0, 1, 1], [1, 1, 1]])))
    assert left_aligned(left, IMAGES, PADDING) is left


def test_what_else_a_call_is_given():
    ids, own = row(4, 9), row(9)
    given = {
        "attention_mask": 1, "past_key_values": 2, "input_ids": 3, "pixel_values": PIXELS, "temperature": 5, "position_ids": None,
    }  # fmt: skip
    streamer = SimpleNamespace()
    same = Turn(ids, prompt(ids, pixel_values=PIXELS))
    found = other_arguments(same, {**given, "streamer": streamer, "position_ids": 7})
    assert found == {"temperature": 5, "streamer": streamer, "position_ids": 7}
    turn = Turn(own, prompt(ids, pixel_values=PIXELS))
    assert other_arguments(turn, given) == {"temperature": 5, "position_ids": None}
    wrapped = other_arguments(turn, {**given, "streamer": streamer})["streamer"]
    assert type(wrapped) is OwnPrompt and wrapped.streamer is streamer and wrapped.own is own
    assert other_arguments(turn, {**given, "streamer": None})["streamer"] is None
    assert message_of(other_arguments, turn, {**given, "position_ids": 7}) == (
        "position_ids cannot be given with a conversation in past_key_values or with padding on the right: leave them out, they "
        "follow from attention_mask."
    )


def test_a_streamer_is_shown_the_caller_s_own_ids():
    seen = []
    streamer = OwnPrompt(SimpleNamespace(put=lambda v: seen.append(v.tolist()), end=lambda: seen.append("end")), row(9))
    for value in (row(4, 9), row(5), row(6)):
        streamer.put(value)
    streamer.end()
    assert seen == [[[9]], [[5]], [[6]], "end"]


def turn_in(cache, ids, mask=None, **images):
    return Turn(ids, prompt(ids, mask, **images), cache, held_by(cache))


@pytest.mark.parametrize(
    ("before", "ids", "mask", "shares", "kept"),
    [
        ({}, row(4, 9, 8, 7, 6), None, True, 4),
        ({}, row(4, 9, 8, 7), None, True, 3),  # one token is left to predict from
        ({}, row(4, 9, 5, 7, 6), None, True, 2),
        ({}, row(4, 9, 8, 7, 6), row(1, 0, 1, 1, 1), True, 1),
        ({"corrected": (2,)}, row(4, 9, 8, 7, 6), None, True, 2),
        ({"corrected": (-1,)}, row(4, 9, 8, 7, 6), None, True, 4),
        ({"corrected": (0,)}, row(4, 9, 8, 7, 6), None, True, 0),
        ({}, row(4, 9, 8, 7, 4), None, True, 0),  # an image that is to be read
        ({}, row(5, 9, 8, 7, 6), None, True, 0),
        ({}, row(4, 9, 8, 7, 6), None, False, 0),
    ],
)
def test_what_a_turn_can_go_on_from(before, ids, mask, shares, kept):
    cache = known(row(4, 9, 8, 7), images={"pixel_values": PIXELS}, **before)
    read = cut_back(turn_in(cache, ids, mask, pixel_values=PIXELS), IMAGES, shares)
    assert cache.get_seq_length() == kept and held_by(cache) is None and cache._shiftdc_held is None
    assert read == ({} if kept else {"pixel_values": PIXELS})


def test_other_images_are_read_anew():
    cache = known(row(4, 9, 8), images={"pixel_values": PIXELS})
    assert cut_back(turn_in(cache, row(4, 9, 8, 7), pixel_values=OTHER), IMAGES, True) == {"pixel_values": OTHER}
    assert cache.get_seq_length() == 0
    cache = known(row(4, 9, 8))
    cache._shiftdc_held = replace(cache._shiftdc_held, images=None)
    assert cut_back(turn_in(cache, row(4, 9, 8, 7), pixel_values=PIXELS), IMAGES, True) == {"pixel_values": PIXELS}
    cache = known(row(4, 9, 8), images={"pixel_values": PIXELS, "token_type_ids": row(1, 0, 0)})
    given = {"pixel_values": PIXELS, "token_type_ids": row(1, 0, 0, 0)}  # as long as the prompt, and made of it
    assert cut_back(turn_in(cache, row(4, 9, 8, 7), **given), IMAGES, True) == {} and cache.get_seq_length() == 3
    without = Turn(row(4, 9), prompt(row(4, 9), pixel_values=PIXELS))
    assert cut_back(without, IMAGES, True) == {"pixel_values": PIXELS}
    assert cut_back(replace(without, cache=filled(2)), IMAGES, True) == {"pixel_values": PIXELS}
    window = known(row(4, 9, 8), images={"pixel_values": PIXELS})
    window.layers.append(DynamicSlidingWindowLayer(sliding_window=4))
    turn = turn_in(window, row(4, 9, 8, 7), pixel_values=PIXELS)
    assert turn.held is not None and cut_back(turn, IMAGES, True) == {"pixel_values": PIXELS} and not window.get_seq_length()


def test_what_a_cache_holds_behind_a_reply():
    ids = torch.tensor([[3, 4, 9], [4, 9, 8]])
    turn = Turn(ids, prompt(ids, None, pixel_values=PIXELS))
    sequences = torch.cat([ids, torch.tensor([[7, 6], [5, 2]])], dim=1)
    cache = filled(4, rows=2)
    remember_reply(cache, sequences, turn, PADDING, torch.tensor([True, False]))
    found = held_by(cache)
    assert found.ids.tolist() == [[3, 4, 9, 7], [4, 9, 8, 5]] and found.mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert found.corrected.tolist() == [2, -1] and found.tail.tolist() == [[6], [2]]
    assert found.images == {"pixel_values": PIXELS}
    masked = replace(turn, prompt=prompt(ids, torch.tensor([[0, 0, 1], [1, 1, 1]])))
    remember_reply(cache, sequences[:, :4], masked, PADDING)
    found = held_by(cache)
    assert found.mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]] and found.corrected.tolist() == [-1, -1] and found.tail is None
    remember_reply(cache, torch.cat([sequences, ids], dim=1), turn, PADDING)
    assert held_by(cache).tail is None  # more than one token is not in the cache
    remember_reply(None, sequences, turn, PADDING)


@pytest.mark.parametrize(
    ("cache", "rows", "width"),
    [
        (filled(4, rows=1), 2, 5),
        (filled(4, rows=2), 4, 5),
        (filled(4, rows=2), 2, 3),
        (DynamicCache(), 2, 5),
        (filled(4, rows=4), 4, 5),
    ],
    ids=["fewer rows", "more replies", "more tokens", "empty", "beams"],
)
def test_a_cache_of_something_else_than_these_rows_is_unknown(cache, rows, width):
    ids = torch.ones(2, 2, dtype=torch.long)
    cache._shiftdc_held = "something"
    remember_reply(cache, torch.ones(rows, width, dtype=torch.long), Turn(ids, prompt(ids)), PADDING)
    assert cache._shiftdc_held is None


# a call of forward()


def test_a_first_pass():
    ids = row(4, 9, 8)
    for mask in (None, row(0, 1, 1), "unreadable", torch.ones(1, 1, 3, 3), row(1, 1)):
        step = pass_behind(
            None, inputs := {"input_ids": ids, "attention_mask": mask, "pixel_values": PIXELS, "labels": 1}, IMAGES
        )
        assert step.inputs is inputs and step.prompt.ids is ids and step.past == 0 and step.corrected.tolist() == [-1]
        assert step.prompt.mask.tolist() == (
            [[0, 1, 1]] if torch.is_tensor(mask) and mask.tolist() == [[0, 1, 1]] else [[1, 1, 1]]
        )
        assert (
            step.prompt.images == {"pixel_values": PIXELS} and step.knows_images and step.position is None and step.shown is None
        )
    longer = pass_behind(None, {"input_ids": ids, "attention_mask": row(0, 0, 1, 1)}, IMAGES)
    assert longer.prompt.mask.tolist() == [[0, 1, 1]]


def test_a_later_pass():
    before = held(row(4, 9), {"pixel_values": PIXELS}, corrected=(1,), mask=row(0, 1))
    for mask, whole in ((None, [0, 1, 1, 1]), (row(1, 0), [0, 1, 1, 0]), (row(1, 1, 1, 0), [1, 1, 1, 0])):
        step = pass_behind(before, inputs := {"input_ids": row(8, 7), "attention_mask": mask}, IMAGES)
        assert step.inputs is inputs
        assert step.prompt.ids.tolist() == [[4, 9, 8, 7]] and step.past == 2 and step.corrected.tolist() == [1]
        assert step.prompt.mask.tolist() == [whole] and step.prompt.images == {"pixel_values": PIXELS} and step.knows_images
    step = pass_behind(before, {"input_ids": row(4, 7), "pixel_values": OTHER, "token_type_ids": row(1, 0)}, IMAGES)
    assert torch.equal(step.prompt.images["pixel_values"], torch.cat([PIXELS, OTHER]))
    assert step.prompt.images["token_type_ids"].tolist() == [[1, 0, 1, 0]]
    typed = replace(before, images={"pixel_values": PIXELS, "token_type_ids": row(1, 0)})
    assert pass_behind(typed, {"input_ids": row(8)}, IMAGES).prompt.images["token_type_ids"].tolist() == [[1, 0, 0]]
    unknown = pass_behind(replace(before, images=None), {"input_ids": row(8), "token_type_ids": row(0)}, IMAGES)
    assert not unknown.knows_images and unknown.prompt.images == {} and unknown.held.images is None
    assert step.held.images is step.prompt.images and step.held.corrected is step.corrected
    assert step.held.ids is step.prompt.ids and step.held.mask is step.prompt.mask


def step_of(ids, past=0, corrected=(-1,), **inputs):
    inputs = {"input_ids": ids[:, past:], **inputs}
    return Pass(inputs, prompt(ids, torch.ones_like(ids)), past, torch.tensor(corrected))


def test_positions_of_the_caller():
    ids = torch.tensor([[4, 9, 8], [4, 9, 8]])
    step = step_of(ids, 1, (0, 0)).corrected_at(position := torch.tensor([1, -1]))
    assert step.position is position and step.corrected.tolist() == [2, 0]
    assert step_of(ids, 1, (0, 0)).corrected_at(torch.tensor([0, 0])).corrected.tolist() == [1, 1]


def test_masks_that_show_padding():
    require_row_mask(None)
    require_row_mask(row(1, 1))
    for mask in (torch.ones(1, 1, 2, 2), {"full_attention": row(1)}):
        assert message_of(require_row_mask, mask) == (
            "attention_mask must be [batch, time] for forward() to see where prompts end: give such a one, or pass "
            "shiftdc_position= (the column of each prompt's last token), or shiftdc=False (no calibration)."
        )


def test_labels_of_the_whole_conversation():
    ids = row(4, 9, 8)
    assert labels_of(step_of(ids)) is None and labels_of(step_of(ids, 1)) is None
    labels = row(5, 6, 7)
    assert labels_of(step_of(ids, labels=labels)) is labels
    assert labels_of(step_of(ids, 2, labels=row(7))).tolist() == [[-100, -100, 7]]


def ended(step, found, shares=True):
    return ending_at(step, found, 4, shares)


def test_a_pass_is_corrected_where_its_prompts_end():
    ids = torch.tensor([[4, 9, 8], [9, 9, 9], [4, 9, 8]])
    step = ended(step_of(ids, corrected=(-1, -1, -1)), [2, -1, 1])
    assert (
        step.position.tolist() == [2, -1, 1] and step.corrected.tolist() == [2, -1, 1] and step.shown is None and step.past == 0
    )
    later = ended(step_of(ids, 1, (-1, -1, -1)), [2, -1, 1])
    assert later.position.tolist() == [1, -1, 0] and later.corrected.tolist() == [2, -1, 1]
    behind_it = step_of(ids, 2, (1, -1, 1))
    same = ended(behind_it, [1, -1, 1])  # in the cache, where it was corrected
    assert same.position is None and same.corrected.tolist() == [1, -1, 1] and same.inputs is behind_it.inputs
    for corrected in ((-1, -1, 1), (0, -1, 1)):
        assert message_of(ended, step_of(ids, 2, corrected), [1, -1, 1]) == (
            "The prompt in past_key_values was read without calibration: read it again, or go on with shiftdc=False (no "
            "calibration)."
        )


NO_END = (
    "Row {} holds an image and no generation prompt behind it (add_generation_prompt=True), so the end of its prompt cannot be "
    "told: pass shiftdc_position= (the column of the prompt's last token; -1 for a part of a prompt), or shiftdc=False (no "
    "calibration)."
)


@pytest.mark.parametrize("goes_on", [{"past_key_values": DynamicCache()}, {"use_cache": True}], ids=["cache", "use_cache"])
def test_the_first_part_of_a_prompt_is_shown_corrected_and_kept_uncorrected(goes_on):
    ids = torch.tensor([[4, 9, 8], [9, 9, 9], [4, 9, 8]])
    step = ended(step_of(ids, corrected=(-1, -1, -1), **goes_on), [None, -1, 1])
    assert step.shown.tolist() == [2, -1, 1] and step.position.tolist() == [-1, -1, 1] and step.corrected.tolist() == [-1, -1, 1]
    alone = ended(step_of(ids[:1], **goes_on), [None])
    assert alone.shown.tolist() == [2] and alone.position is None and alone.corrected.tolist() == [-1]
    padded = replace(step_of(ids[:1], **goes_on), prompt=prompt(ids[:1], row(1, 1, 0)))
    assert ended(padded, [None]).shown.tolist() == [1]
    assert message_of(ended, step_of(ids[:1], labels=ids[:1], **goes_on), [None]) == NO_END.format(0)
    assert message_of(ended, step_of(ids[:1], 1, **goes_on), [None]) == NO_END.format(0)


@pytest.mark.parametrize("stays", [{}, {"use_cache": False}, {"use_cache": None}, {"past_key_values": None}], ids=str)
def test_a_prompt_without_an_end_that_does_not_go_on_is_refused(stays):
    ids = torch.tensor([[4, 9], [4, 9]])
    assert message_of(ended, step_of(ids, corrected=(-1, -1), **stays), [1, None]) == NO_END.format(1)


def test_what_an_earlier_correction_has_touched_is_read_again():
    ids = torch.tensor([[4, 9, 8, 7, 6, 5], [3, 4, 8, 7, 6, 5]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    cache = filled(4, rows=2)
    positions = torch.tensor([[4, 5], [2, 3]], dtype=torch.int32)
    given = {
        "past_key_values": cache, "attention_mask": torch.ones(2, 2), "position_ids": positions, "labels": ids[:, 4:],
        "logits_to_keep": torch.tensor([0, 1]), "pixel_values": PIXELS,
    }  # fmt: skip
    start = replace(step_of(ids, 4, (2, 3), **given), prompt=prompt(ids, mask))
    step = ended(start, [5, 4])
    assert step.past == 2 and step.position.tolist() == [3, 2] and step.corrected.tolist() == [5, 4]
    assert torch.equal(step.inputs["input_ids"], ids[:, 2:]) and step.inputs["attention_mask"] is mask
    assert step.inputs["position_ids"].tolist() == [[2, 3, 4, 5], [0, 1, 2, 3]]
    assert step.inputs["position_ids"].dtype == torch.int32
    assert step.inputs["labels"].tolist() == [[-100, -100, 6, 5], [-100, -100, 6, 5]]
    assert step.inputs["logits_to_keep"].tolist() == [2, 3] and step.inputs["pixel_values"] is PIXELS
    ids[1, 1] = 9  # a row without an image
    least = ended(step_of(ids, 4, (2, -1), past_key_values=cache, logits_to_keep=1), [5, -1])
    assert set(least.inputs) == {"input_ids", "past_key_values", "logits_to_keep"} and least.inputs["logits_to_keep"] == 1
    assert least.position.tolist() == [3, -1] and least.past == 2
    one = ended(step_of(ids, 4, (2, -1), past_key_values=cache, position_ids=row(4, 5)), [5, -1])
    assert one.inputs["position_ids"].tolist() == [[2, 3, 4, 5]] * 2  # one row of positions may stand for all


@pytest.mark.parametrize(
    "case", ["another row is in the cache", "nothing is shared", "an image", "the beginning", "three axes", "a window"]
)
def test_where_a_correction_cannot_be_undone(case):
    ids = torch.tensor([[4, 9, 8, 7, 6, 5], [9, 4, 8, 7, 6, 5]])
    cache = filled(4, rows=2)
    if case == "a window":
        cache.layers.append(DynamicSlidingWindowLayer(sliding_window=4))
    corrected = {"another row is in the cache": (3, 2), "an image": (1, 1), "the beginning": (0, 3)}.get(case, (2, 2))
    given = {"position_ids": torch.ones(3, 2, 2)} if case == "three axes" else {}
    step = step_of(ids, 4, corrected, past_key_values=cache, **given)
    ends = [5, 2] if case == "another row is in the cache" else [5, 5]
    assert message_of(ended, step, ends, shares=case != "nothing is shared") == GO_ON
    assert ended(step_of(ids, 4, (2, 2), past_key_values=filled(4, rows=2)), [5, 5]).past == 2


def test_what_comes_out_is_of_the_caller_s_tokens():
    out = LlavaCausalLMOutputWithPast(
        logits=torch.arange(4).reshape(1, 4, 1), hidden_states=(torch.arange(4).reshape(1, 4, 1),) * 2
    )
    found = of_the_last(out, 3)
    assert found is out and out.logits.flatten().tolist() == [1, 2, 3]
    assert [h.flatten().tolist() for h in out.hidden_states] == [[1, 2, 3]] * 2 and type(out.hidden_states) is tuple
    assert of_the_last(LlavaCausalLMOutputWithPast(logits=torch.ones(1, 4, 1)), 2).logits.shape == (1, 2, 1)
    assert of_the_last(SimpleNamespace(logits=torch.ones(1, 4, 1)), 2).logits.shape == (1, 2, 1)


def test_what_lies_on_another_device_than_the_conversation():
    """The caller's own tensors, or those of an earlier call, may lie elsewhere than the model's."""
    ids = torch.tensor([[4, 9, 8, 7], [4, 9, 8, 7]])
    new = ids[:, 2:]
    with other_device() as device:
        cache = filled(2, rows=2)
        remember(cache, held(ids[:, :2], {"pixel_values": PIXELS}, (1, 1), mask=torch.tensor([[1, 1], [0, 1]])))
        before = held_by(cache)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)
        assert held_by(cache) is before
        turn = Turn(new, prompt(ids))
        out = torch.cat([ids, new], dim=1).to(device)
        assert turn.answered(out).cpu().tolist() == [[8, 7, 8, 7]] * 2
        assert turn.whole_answer(out[:, 2:]).cpu().tolist() == [[4, 9, 8, 7, 8, 7]] * 2
        whole, mask = behind(before, new.to(device), torch.ones(2, 4, device=device), True)
        assert whole.device == mask.device == device and whole.cpu().tolist() == ids.tolist()
        there = Turn(ids.to(device), prompt(ids.to(device), torch.ones_like(ids).to(device)))
        remember_reply(made := filled(4, rows=2), out, there, PADDING, torch.ones(2, dtype=torch.bool, device=device))
        assert made._shiftdc_held.corrected.device == device and made._shiftdc_held.corrected.cpu().tolist() == [3, 3]
        for known_of in (None, before):
            step = pass_behind(known_of, {"input_ids": new.to(device), "attention_mask": torch.ones_like(new)}, IMAGES)
            assert step.prompt.ids.device == step.prompt.mask.device == device
            assert known_of is not None or step.corrected.device == device
        at = replace(step, corrected=step.corrected.to(device)).corrected_at(torch.tensor([1, -1]))
        assert at.corrected.cpu().tolist() == [3, 1]
        start = Pass({"input_ids": ids.to(device)}, there.prompt, 0, torch.tensor([-1, -1]))
        ended_there = ended(start, [3, 2])
        assert ended_there.position.device == device and ended_there.position.cpu().tolist() == [3, 2]
        assert first_difference(ids.to(device), ids) == 4 and first_difference(ids[:, :1].to(device), ids + 1) == 0
        assert are_equal({"a": PIXELS.to(device)}, {"a": PIXELS}) and not are_equal({"a": PIXELS.to(device)}, {"a": OTHER})
        both = put_together({"a": PIXELS.to(device)}, {"a": OTHER}, 1, frozenset())["a"]
        assert both.device == device and both.cpu().tolist() == [*PIXELS.tolist(), *OTHER.tolist()]
        assert reordered(ids.to(device), torch.tensor([[3, 2, 1, 0]] * 2)).cpu().tolist() == ids.flip(1).tolist()
        begun = ended(replace(start, inputs={**start.inputs, "use_cache": True}), [None, 2])
        assert begun.shown.cpu().tolist() == [3, 2] and begun.position.cpu().tolist() == [-1, 2]


# tensors


@pytest.mark.parametrize(
    ("one", "two", "column"),
    [
        (row(1, 2, 3), row(1, 2, 3), 3),
        (row(1, 2, 3), row(1, 2), 2),
        (row(1, 2), row(1, 2, 3), 2),
        (row(1, 2, 3), row(1, 5, 5), 1),
    ],
)
def test_where_two_rows_differ(one, two, column):
    assert first_difference(one, two) == column
    assert (
        first_difference(torch.cat([row(9, 9, 9)[:, : one.shape[1]], one]), torch.cat([row(9, 9, 9)[:, : two.shape[1]], two]))
        == column
    )


def test_images_of_two_turns():
    one, two = {"pixel_values": PIXELS}, {"pixel_values": OTHER}
    both = put_together(one, two, 1, frozenset())
    assert torch.equal(both["pixel_values"], torch.cat([PIXELS, OTHER]))
    assert put_together(None, two, 1, frozenset()) is None and put_together(None, {}, 1, frozenset()) is None
    assert put_together(one, {}, 2, frozenset()) == one and put_together({}, two, 2, frozenset()) == two
    assert put_together(one, two, 2, frozenset()) is None
    assert put_together(one, two, 1, frozenset({"pixel_values"})) is None
    assert put_together({"pixel_values": [1]}, two, 1, frozenset()) is None
    assert put_together(one, {"pixel_values": [1]}, 1, frozenset()) is None
    assert put_together(one, {"other": OTHER}, 1, frozenset()) is None
    assert put_together(one, {"pixel_values": OTHER[:, 1:]}, 1, frozenset()) is None
    three = torch.cat([PIXELS, OTHER, PIXELS])
    assert put_together({"pixel_values": three}, two, 1, frozenset())["pixel_values"].shape == (4, 6)


def test_which_images_are_the_same():
    value = object()
    assert are_equal({}, {}) and are_equal({"a": PIXELS, "b": value}, {"a": PIXELS.clone(), "b": value})
    assert not are_equal({"a": PIXELS}, {"a": OTHER}) and not are_equal({"a": PIXELS}, {})
    assert not are_equal({"a": PIXELS, "b": 1}, {"a": PIXELS, "b": 2})
    assert not are_equal({"a": PIXELS}, {"a": value}) and not are_equal({"a": value}, {"a": PIXELS})


def test_padding_moves_to_the_left():
    assert moved_left(torch.tensor([[0, 1, 1], [1, 1, 1]])) is None
    mask = torch.tensor([[1, 0, 2, 0], [0, 1, 1, 1]])
    order = moved_left(mask)
    assert order.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]
    assert reordered(mask, order).tolist() == [[0, 0, 1, 2], [0, 1, 1, 1]]
    deep = torch.arange(16).reshape(2, 4, 2)
    assert reordered(deep, order)[0].tolist() == deep[0, [1, 3, 0, 2]].tolist()
