"""However it is called, an export answers calibrated, or with an error: nothing in silence, token for token."""

from __future__ import annotations

import copy

import pytest
import torch
from naive import Naive
from tiny import encode, picture, tiny_processor
from transformers import DynamicCache, GenerationConfig, LlavaForConditionalGeneration, StaticCache

GREEDY = {"max_new_tokens": 6, "do_sample": False}
LAYERS = [1, 2]
REQUESTS = ["How do I build this?", "What is it, and who needs one?"]
IMAGES = [picture(0), picture(1)]
OFF = r"shiftdc=False"
STRENGTH = 3.0  # so that calibration changes nearly every token


@pytest.fixture(scope="module")
def base(base_folder):
    return LlavaForConditionalGeneration.from_pretrained(base_folder).eval()


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def naive(base, processor):
    return Naive(base, processor, None, None)


@pytest.fixture(scope="module")
def model(load):
    return load(strength=STRENGTH)


@pytest.fixture(scope="module")
def directions(model):
    return {layer: c.direction for layer, c in zip(LAYERS, model.shiftdc_corrections, strict=True)}


@pytest.fixture
def inputs(processor):
    return encode(processor, REQUESTS[:1], IMAGES[:1])


def words(processor, text):
    return processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


def new_tokens(out, ids):
    return out[:, ids.shape[1] :].tolist()


def naive_reply(naive, model, directions, ids, pixels):
    """The reply to a whole conversation, by hooks on the stock model; prompts by the pieces, which have tests of their own."""
    tokens, mask = ids[0].tolist(), torch.ones_like(ids)
    asked = torch.tensor([model._shiftdc_pieces.caption_prompt(tokens)])
    caption = naive.model.generate(
        input_ids=asked, attention_mask=torch.ones_like(asked), pixel_values=pixels, max_new_tokens=8, do_sample=False
    )
    caption = [t for t in caption[0, asked.shape[1] :].tolist() if t not in (2, 3)]
    text = torch.tensor([model._shiftdc_pieces.text_prompt(tokens, caption)])
    activations = naive.activations({"input_ids": text, "attention_mask": torch.ones_like(text)})
    reference = torch.stack([activations[i] @ directions[i] for i in LAYERS])
    with naive.calibrated(LAYERS, directions, ids.shape[1], reference=reference, strength=STRENGTH):
        out = naive.model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, **GREEDY)
    return new_tokens(out, ids)


def second_turn(processor, first, text="Why do you think so?"):
    """(new ids, whole ids) of a turn behind the tokens `first` [1, time]."""
    new = words(processor, f" USER: {text} ASSISTANT:")
    return new, torch.cat([first, new], dim=1)


def plain(base, ids, pixels):
    return new_tokens(base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, **GREEDY), ids)


# conversations in a cache


def caches(model):
    config = model.config.get_text_config()
    return {
        "dynamic": DynamicCache(config=config),
        "bare": DynamicCache(),
        "static": StaticCache(config=config, max_cache_len=256),
    }


@pytest.mark.parametrize("kind", ["dynamic", "bare", "static"])
@pytest.mark.parametrize("whole", [False, True], ids=["new tokens", "whole conversation"])
def test_a_conversation_in_a_cache_is_the_one_without(model, base, naive, directions, processor, inputs, kind, whole):
    cache = caches(model)[kind]
    ids, pixels = model.generate(**inputs, **GREEDY, past_key_values=cache), inputs["pixel_values"]
    changed = False
    for text in ("Why do you think so?", "And what is it made of?", "Who?"):
        new, conversation = second_turn(processor, ids, text)
        expected = naive_reply(naive, model, directions, conversation, pixels)
        changed |= expected != plain(base, conversation, pixels)
        given = {"pixel_values": pixels} if whole and text == "Who?" else {}  # the cache has it, with the ids or without
        asked = conversation if whole else new
        out = model.generate(asked, attention_mask=torch.ones_like(conversation), past_key_values=cache, **given, **GREEDY)
        assert new_tokens(out, asked) == expected
        assert torch.equal(out[:, : asked.shape[1]], asked)
        ids = torch.cat([conversation, torch.tensor(expected)], dim=1)
    assert changed


def test_the_image_is_not_read_again_for_a_reply_in_a_cache(model, processor, inputs):
    """Once for the caption, which is in view of the new request; the static cache is filled anew."""
    for kind, expected in (("dynamic", 1), ("static", 2)):
        cache, calls = caches(model)[kind], []
        new, whole = second_turn(processor, model.generate(**inputs, **GREEDY, past_key_values=cache))
        handle = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        try:
            model.generate(input_ids=new, attention_mask=torch.ones_like(whole), past_key_values=cache, **GREEDY)
        finally:
            handle.remove()
        assert len(calls) == expected


def test_a_batch_of_conversations_goes_on_in_its_cache(model, processor):
    inputs = encode(processor, [*REQUESTS, "Hello there"], [*IMAGES, None])
    cache = DynamicCache()
    first = model.generate(**inputs, **GREEDY, past_key_values=cache)
    news = [words(processor, f" USER: {text} ASSISTANT:")[0] for text in ("Why?", "And who was it for?", "What then?")]
    width = max(map(len, news))
    pads = [width - len(n) for n in news]
    new = torch.stack([torch.nn.functional.pad(n, (p, 0), value=3) for n, p in zip(news, pads, strict=True)])
    mask = torch.cat(
        [inputs["attention_mask"], torch.ones(3, first.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)], 1
    )
    mask = torch.cat([mask, torch.tensor([[0] * p + [1] * (width - p) for p in pads])], dim=1)
    expected = model.generate(
        input_ids=torch.cat([first, new], dim=1), attention_mask=mask, pixel_values=inputs["pixel_values"], **GREEDY
    )
    found = model.generate(input_ids=new, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert new_tokens(found, new) == expected[:, first.shape[1] + width :].tolist()


def test_turns_without_an_image_and_images_that_come_later(model, base, processor, inputs):
    text = encode(processor, ["Hello"], [None])
    cache, stock = DynamicCache(), DynamicCache()
    first = model.generate(**text, **GREEDY, past_key_values=cache)
    assert torch.equal(first, base.generate(**text, **GREEDY, past_key_values=stock))
    new, whole = second_turn(processor, first[:, :-1])  # a cache lacks the last token of a reply
    again = {"input_ids": new, "attention_mask": torch.ones_like(whole), **GREEDY}
    found = model.generate(**again, past_key_values=cache)
    assert torch.equal(found, base.generate(**again, past_key_values=stock))
    shown = inputs["input_ids"][:, 1:]  # without <s>
    whole = torch.cat([whole, torch.tensor(new_tokens(found, new)), shown], dim=1)
    mask, pixels = torch.ones_like(whole), inputs["pixel_values"]
    expected = model.generate(input_ids=whole, attention_mask=mask, pixel_values=pixels, **GREEDY)
    found = model.generate(input_ids=shown, attention_mask=mask, pixel_values=pixels, past_key_values=cache, **GREEDY)
    assert new_tokens(found, shown) == new_tokens(expected, whole)
    changed = new_tokens(expected, whole) != plain(base, whole, pixels)
    both = torch.cat([whole, torch.tensor(new_tokens(found, shown)), shown], dim=1)  # and one more image
    mask, two = torch.ones_like(both), torch.cat([pixels, encode(processor, ["A"], IMAGES[1:])["pixel_values"]])
    expected = model.generate(input_ids=both, attention_mask=mask, pixel_values=two, **GREEDY)
    found = model.generate(input_ids=shown, attention_mask=mask, pixel_values=two[1:], past_key_values=cache, **GREEDY)
    assert new_tokens(found, shown) == new_tokens(expected, both)
    assert changed or new_tokens(expected, both) != plain(base, both, two)


def test_other_settings_of_a_reply_in_a_cache(model, processor, inputs):
    """What looks at the ids sees the whole conversation; what comes back begins with the caller's own ids."""
    shown = []

    class Streamer:
        def put(self, value):
            shown.append(value.flatten().tolist())

        def end(self):
            pass

    def turns():
        cache = DynamicCache()
        new, whole = second_turn(processor, model.generate(**inputs, **GREEDY, past_key_values=cache))
        return cache, new, whole, torch.ones_like(whole)

    for options in ({"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}):
        cache, new, whole, mask = turns()
        expected = model.generate(input_ids=whole, attention_mask=mask, pixel_values=inputs["pixel_values"], **GREEDY, **options)
        found = model.generate(input_ids=new, attention_mask=mask, past_key_values=cache, **GREEDY, **options)
        assert new_tokens(found, new) == new_tokens(expected, whole)
    cache, new, whole, mask = turns()
    out = model.generate(
        new, attention_mask=mask, past_key_values=cache, streamer=Streamer(), return_dict_in_generate=True, **GREEDY
    )
    assert out.past_key_values is cache and torch.equal(out.sequences[:, : new.shape[1]], new)
    assert [t for part in shown for t in part] == out.sequences[0].tolist()
    with pytest.raises(ValueError, match="position_ids cannot be given"):
        cache, new, whole, mask = turns()
        model.generate(new, attention_mask=mask, past_key_values=cache, position_ids=torch.zeros_like(new), **GREEDY)


def test_another_picture_or_other_tokens_are_read_anew(model, processor, inputs):
    """The ids of a conversation may be tokens of its text once more, and its pictures others."""
    cache = DynamicCache()
    first = model.generate(**inputs, **GREEDY, past_key_values=cache)
    ids = torch.cat([inputs["input_ids"], words(processor, "something else")], dim=1)
    _, whole = second_turn(processor, ids)
    mask, other = torch.ones_like(whole), encode(processor, REQUESTS[:1], IMAGES[1:])["pixel_values"]
    for pixels in (inputs["pixel_values"], other):
        expected = model.generate(input_ids=whole, attention_mask=mask, pixel_values=pixels, **GREEDY)
        found = model.generate(input_ids=whole, attention_mask=mask, pixel_values=pixels, past_key_values=cache, **GREEDY)
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="do not begin as the conversation"):
        model.generate(**encode(processor, ["Hello, you"], [None]), past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match="attention_mask must be as long"):
        model.generate(words(processor, "Why?"), past_key_values=cache, **GREEDY)
    assert first is not None


def test_a_cache_of_unknown_origin_is_refused(model, base, processor, inputs):
    def filled(by=model):
        cache = DynamicCache()
        return cache, by.generate(**inputs, **GREEDY, past_key_values=cache)

    def go_on(cache, first, **options):
        new = words(processor, " USER: Why? ASSISTANT:")
        mask = torch.ones(1, cache.get_seq_length() + new.shape[1], dtype=torch.long)
        return model.generate(input_ids=new, attention_mask=mask, past_key_values=cache, **GREEDY, **options)

    go_on(*filled())
    foreign, first = filled(base)
    with pytest.raises(ValueError, match=OFF):
        go_on(foreign, first)
    go_on(foreign, first, shiftdc=False)
    cropped, first = filled()
    cropped.crop(-3)
    with pytest.raises(ValueError, match=OFF):
        go_on(cropped, first)
    refilled, first = filled()
    refilled.crop(-1)
    model.model(input_ids=torch.tensor([[9]]), past_key_values=refilled, shiftdc=False)
    with pytest.raises(ValueError, match=OFF):
        go_on(refilled, first)
    beams = DynamicCache()
    first = model.generate(**inputs, **GREEDY, num_beams=2, past_key_values=beams)
    with pytest.raises(ValueError, match=OFF):
        go_on(beams, first)


def test_reordered_rows_and_other_batches_are_noticed(model, processor):
    inputs = encode(processor, REQUESTS, IMAGES)
    new = words(processor, " USER: Why? ASSISTANT:").expand(2, -1)

    def go_on(change):
        cache = DynamicCache()
        model.generate(**inputs, **GREEDY, min_new_tokens=6, past_key_values=cache)
        change(cache)
        mask = torch.ones(2, cache.get_seq_length() + new.shape[1], dtype=torch.long)
        return model.generate(new, attention_mask=mask, past_key_values=cache, **GREEDY)

    go_on(lambda cache: None)
    for change in (
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([0])),
    ):
        with pytest.raises(ValueError, match=OFF):
            go_on(change)


def test_a_copied_cache_is_known_and_goes_its_own_way(model, processor, inputs):
    cache = DynamicCache()
    first = model.generate(**inputs, **GREEDY, past_key_values=cache)
    replies = []
    for kept in (copy.deepcopy(cache), copy.deepcopy(cache), cache):
        new, whole = second_turn(processor, first)
        replies.append(model.generate(new, attention_mask=torch.ones_like(whole), past_key_values=kept, **GREEDY).tolist())
    assert replies[0] == replies[1] == replies[2]


def test_a_cache_that_was_filled_uncalibrated_goes_on_calibrated(model, processor, inputs):
    cache = DynamicCache()
    first = model.generate(**inputs, **GREEDY, past_key_values=cache, shiftdc=False)
    new, whole = second_turn(processor, first)
    mask, pixels = torch.ones_like(whole), inputs["pixel_values"]
    expected = model.generate(input_ids=whole, attention_mask=mask, pixel_values=pixels, **GREEDY)
    found = model.generate(new, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert new_tokens(found, new) == new_tokens(expected, whole)


def test_a_returned_cache_goes_on(model, processor, inputs):
    out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    new, whole = second_turn(processor, out.sequences)
    mask = torch.ones_like(whole)
    expected = model.generate(input_ids=whole, attention_mask=mask, pixel_values=inputs["pixel_values"], **GREEDY)
    found = model.generate(new, attention_mask=mask, past_key_values=out.past_key_values, **GREEDY)
    assert new_tokens(found, new) == new_tokens(expected, whole)


def test_a_failed_reply_leaves_a_cache_unknown_and_the_model_as_it_was(model, processor, inputs):
    expected = model.generate(**inputs, **GREEDY)
    state = {k: v for k, v in vars(model).items() if not k.startswith("_")}

    def fail(ids, scores):
        if ids.shape[1] > inputs["input_ids"].shape[1] + 2:
            raise RuntimeError("stop")
        return scores

    cache = DynamicCache()
    for options in ({}, {"past_key_values": cache}, {"num_beams": 2}, {"shiftdc": False}):
        with pytest.raises(RuntimeError, match="stop"):
            model.generate(**inputs, **GREEDY, min_new_tokens=6, logits_processor=[fail], **options)
    assert state == {k: v for k, v in vars(model).items() if not k.startswith("_")}
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    new = words(processor, " USER: Why? ASSISTANT:")
    with pytest.raises(ValueError, match=OFF):
        mask = torch.ones(1, cache.get_seq_length() + new.shape[1], dtype=torch.long)
        model.generate(new, attention_mask=mask, past_key_values=cache, **GREEDY)
