"""However it is called, an export answers calibrated, or with an error: nothing in silence, token for token."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess

import pytest
import torch
from interpreters import python
from naive import Naive
from tiny import encode, picture, tiny_processor
from transformers import AutoModelForImageTextToText, DynamicCache, GenerationConfig, LlavaForConditionalGeneration, StaticCache

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
    asked = torch.tensor([model.shiftdc_composer.caption_prompt(tokens)])
    caption = naive.model.generate(
        input_ids=asked, attention_mask=torch.ones_like(asked), pixel_values=pixels, max_new_tokens=8, do_sample=False
    )
    caption = [t for t in caption[0, asked.shape[1] :].tolist() if t not in (2, 3)]
    text = torch.tensor([model.shiftdc_composer.text_prompt(tokens, caption)])
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


# forward() by hand


def naive_logits(naive, model, directions, inputs, length, reference=None):
    """Logits of a pass of the stock model, corrected at token `length` - 1: by the baked shift, or towards `reference`."""
    amounts = [c.shift for c in model.shiftdc_corrections] if reference is None else None
    with naive.calibrated(LAYERS, directions, length, reference=reference, amounts=amounts, strength=STRENGTH), torch.no_grad():
        return naive.model(**inputs).logits


def answered(processor, inputs, answer=" No, I will not do that."):
    """`inputs` [1, time] with an answer behind the prompt."""
    ids = torch.cat([inputs["input_ids"], words(processor, answer)], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"]}


LABELS = {
    "none": lambda ids, prompt: None,
    "answer": lambda ids, prompt: torch.where(torch.arange(ids.shape[1]) < prompt, -100, ids),
    "every token": lambda ids, prompt: ids,
    "all but the image": lambda ids, prompt: torch.where(ids == 4, -100, ids),
    "end of the answer": lambda ids, prompt: torch.where(torch.arange(ids.shape[1]) < prompt + 2, -100, ids),
    "nothing": lambda ids, prompt: torch.full_like(ids, -100),
}


@torch.no_grad()
@pytest.mark.parametrize("labels", LABELS)
def test_prompt_and_answer_are_corrected_where_the_prompt_ends(model, naive, directions, processor, inputs, labels):
    row, length = answered(processor, inputs), inputs["input_ids"].shape[1]
    expected = naive_logits(naive, model, directions, row, length)
    given = LABELS[labels](row["input_ids"], length)
    found = model(**row, **({} if given is None else {"labels": given})).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found[0, length - 1], model(**row, shiftdc=False).logits[0, length - 1], atol=1e-2)


@torch.no_grad()
def test_a_row_that_grows_without_a_cache_is_corrected_where_its_prompt_ends(model, naive, directions, inputs):
    length = inputs["input_ids"].shape[1]
    found, expected = dict(inputs), dict(inputs)
    for _ in range(4):
        for row, logits in (
            (found, model(**found).logits),
            (expected, naive_logits(naive, model, directions, expected, length)),
        ):
            row["input_ids"] = torch.cat([row["input_ids"], logits[:, -1:].argmax(-1)], dim=1)
            row["attention_mask"] = torch.ones_like(row["input_ids"])
    assert torch.equal(found["input_ids"], expected["input_ids"])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_of_prompts_and_answers(model, processor, side):
    singles = [answered(processor, encode(processor, [r], [i])) for r, i in zip(REQUESTS, IMAGES, strict=True)]
    width = max(s["input_ids"].shape[1] for s in singles)
    gaps = [width - s["input_ids"].shape[1] for s in singles]

    def padded(name, value):
        pads = [((g, 0) if side == "left" else (0, g)) for g in gaps]
        return torch.cat([torch.nn.functional.pad(s[name], p, value=value) for s, p in zip(singles, pads, strict=True)])

    batch = {"input_ids": padded("input_ids", 3), "attention_mask": padded("attention_mask", 0)}
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    logits = model(**batch, pixel_values=torch.cat([s["pixel_values"] for s in singles])).logits
    for row, (single, gap) in enumerate(zip(singles, gaps, strict=True)):
        own = logits[row, gap:] if side == "left" else logits[row, : width - gap]
        assert torch.allclose(own, model(**single).logits[0], atol=1e-4)


@torch.no_grad()
def test_of_several_turns_the_last_prompt_is_corrected(model, naive, directions, processor, inputs):
    first = answered(processor, inputs)
    row = answered(processor, {**first, "input_ids": second_turn(processor, first["input_ids"])[1]}, " Because.")
    length = row["input_ids"].shape[1] - words(processor, " Because.").shape[1]
    expected = naive_logits(naive, model, directions, row, length)
    assert torch.allclose(model(**row).logits, expected, atol=1e-4)
    quoted = answered(processor, inputs, " I said ASSISTANT: no.")  # labels tell the answer from what it quotes
    prompt = inputs["input_ids"].shape[1]
    labels = LABELS["answer"](quoted["input_ids"], prompt)
    expected = naive_logits(naive, model, directions, quoted, prompt)
    assert torch.allclose(model(**quoted, labels=labels).logits, expected, atol=1e-4)


@torch.no_grad()
def test_a_row_without_a_generation_prompt_is_refused(model, processor, inputs):
    bare = {**inputs, "input_ids": inputs["input_ids"][:, :-3], "attention_mask": inputs["attention_mask"][:, :-3]}
    assert model.shiftdc_composer.prompt_end(bare["input_ids"][0].tolist()) is None
    next_turn = answered(processor, inputs, " No. USER: Why?")
    for row in (bare, next_turn, {**bare, "labels": bare["input_ids"]}):
        with pytest.raises(ValueError, match=r"shiftdc_position=.*shiftdc=False"):
            model(**row)
    last = torch.tensor([bare["input_ids"].shape[1] - 1])
    assert not torch.equal(model(**bare, shiftdc_position=last).logits, model(**bare, shiftdc=False).logits)
    assert torch.equal(model(**bare, shiftdc_position=torch.tensor([-1])).logits, model(**bare, shiftdc=False).logits)


def parts(inputs, at):
    """The first `at` tokens with the image, and the others with the mask of all."""
    first = {k: v[:, :at] if k in ("input_ids", "attention_mask") else v for k, v in inputs.items()}
    return first, {"input_ids": inputs["input_ids"][:, at:], "attention_mask": inputs["attention_mask"]}


@torch.no_grad()
@pytest.mark.parametrize("rule", ["sequential", "precomputed"])
@pytest.mark.parametrize("target", ["shift", "reference"])
@pytest.mark.parametrize("how", ["cache", "static", "use_cache", "position", "off"])
@pytest.mark.parametrize("at", [8, 10], ids=["behind the image", "in the text"])
def test_a_prompt_read_in_parts_is_calibrated(load, naive, directions, inputs, how, at, target, rule):
    model = load(strength=STRENGTH, rule=rule)
    length = inputs["input_ids"].shape[1]
    reference = model.shiftdc_reference(**inputs) if target == "reference" else None
    if rule == "precomputed" and target == "reference":
        clean = naive.activations(inputs)
        amounts = torch.stack([clean[i] @ directions[i] for i in LAYERS]) - reference[0]
        with naive.calibrated(LAYERS, directions, length, amounts=amounts, strength=STRENGTH):
            expected = naive.model(**inputs).logits
    else:
        expected = naive_logits(naive, model, directions, inputs, length, None if reference is None else reference[0])
    first, rest = parts(inputs, at)
    options = {
        "cache": {"past_key_values": DynamicCache()},
        "static": {"past_key_values": StaticCache(config=model.config.get_text_config(), max_cache_len=64)},
        "use_cache": {"use_cache": True},
        "position": {"shiftdc_position": torch.tensor([-1])},
        "off": {"shiftdc": False},
    }
    begun = model(**first, **options[how])
    last = torch.tensor([at - 1])
    if how in ("cache", "static", "use_cache"):  # what comes out of a first part is calibrated, too
        assert torch.equal(begun.logits, model(**first, shiftdc_position=last).logits)
    cache = begun.past_key_values
    found = model(**rest, past_key_values=cache, shiftdc_reference=reference)
    assert torch.allclose(found.logits, expected[:, at:], atol=1e-4)
    assert not torch.allclose(found.logits[0, -1], model(**inputs, shiftdc=False).logits[0, -1], atol=1e-2)
    assert cache.get_seq_length() == length
    step = {"input_ids": found.logits[:, -1:].argmax(-1), "attention_mask": torch.ones(1, length + 1, dtype=torch.long)}
    whole = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], step["input_ids"]], 1),
        "attention_mask": step["attention_mask"],
    }
    if rule == "precomputed" and target == "reference":
        with naive.calibrated(LAYERS, directions, length, amounts=amounts, strength=STRENGTH):
            expected = naive.model(**whole).logits
    else:
        expected = naive_logits(naive, model, directions, whole, length, None if reference is None else reference[0])
    assert torch.allclose(model(**step, past_key_values=cache).logits, expected[:, -1:], atol=1e-4)


@torch.no_grad()
def test_conversations_by_hand_go_on_in_their_cache(model, naive, directions, processor, inputs):
    cache = DynamicCache()
    model(**inputs, past_key_values=cache)
    row = answered(processor, inputs)
    answer = row["input_ids"][:, inputs["input_ids"].shape[1] :]
    model(input_ids=answer, attention_mask=row["attention_mask"], past_key_values=cache)
    new, whole = second_turn(processor, row["input_ids"])
    expected = naive_logits(naive, model, directions, {**row, "input_ids": whole, "attention_mask": None}, whole.shape[1])
    for options in ({"output_hidden_states": True}, {"logits_to_keep": 1}, {"position_ids": True, "labels": new}):
        kept = copy.deepcopy(cache)
        if "position_ids" in options:
            options["position_ids"] = torch.arange(whole.shape[1])[None, -new.shape[1] :]
        out = model(input_ids=new, attention_mask=torch.ones_like(whole), past_key_values=kept, **options)
        width = options.get("logits_to_keep", new.shape[1])
        assert out.logits.shape[1] == width
        assert torch.allclose(out.logits, expected[:, -width:], atol=1e-4)
        assert all(h.shape[1] == new.shape[1] for h in out.hidden_states or ())
    reply = model.generate(new, attention_mask=torch.ones_like(whole), past_key_values=cache, **GREEDY)
    pixels = inputs["pixel_values"]
    wanted = model.generate(input_ids=whole, attention_mask=torch.ones_like(whole), pixel_values=pixels, **GREEDY)
    assert new_tokens(reply, new) == new_tokens(wanted, whole)


@torch.no_grad()
def test_what_cannot_go_on_by_hand_is_refused(model, base, processor, inputs):
    first, rest = parts(inputs, 10)
    foreign = base(**first, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=OFF):
        model(**rest, past_key_values=foreign)
    whole = model(**inputs, shiftdc=False).past_key_values
    step = {"input_ids": torch.tensor([[9]]), "past_key_values": whole}
    with pytest.raises(ValueError, match="read without calibration"):
        model(**step)
    model(**step, shiftdc=False)
    bare, _ = parts(inputs, inputs["input_ids"].shape[1] - 3)
    cache = model(**bare, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=OFF):
        model(input_ids=torch.tensor([[9]]), past_key_values=cache)
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=128)
    model(**inputs, past_key_values=static)
    with pytest.raises(ValueError, match="an earlier correction has to be undone"):
        new, whole = second_turn(processor, inputs["input_ids"])
        model(input_ids=new, attention_mask=torch.ones_like(whole), past_key_values=static)
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, time\]"):
        model(**{**inputs, "attention_mask": torch.ones(1, 1, 28, 28, dtype=torch.bool)})


@torch.no_grad()
def test_packed_rows_are_refused(model, processor):
    rows = [encode(processor, [r], [i]) for r, i in zip(REQUESTS, IMAGES, strict=True)]
    ids = torch.cat([r["input_ids"] for r in rows], dim=1)
    positions = torch.cat([torch.arange(r["input_ids"].shape[1]) for r in rows])[None]
    packed = {"input_ids": ids, "pixel_values": torch.cat([r["pixel_values"] for r in rows])}
    for options in ({"position_ids": positions}, {"cu_seq_lens_q": torch.tensor([0, 28, 60])}):
        with pytest.raises(ValueError, match=r"several prompts.*shiftdc=False"):
            model(**packed, **options)
    with pytest.raises(ValueError, match=r"several prompts"):
        model.generate(**packed, position_ids=positions, **GREEDY)
    model(**packed, position_ids=positions, shiftdc=False)
    padded = encode(processor, REQUESTS, IMAGES)
    counted = (padded["attention_mask"].cumsum(-1) - 1).masked_fill(padded["attention_mask"] == 0, 1)
    model(**padded, position_ids=counted)


@torch.no_grad()
def test_the_backbone_by_hand_is_refused_unless_told(model, base, processor, inputs):
    text = encode(processor, ["Hello"], [None])
    for given in (inputs, text):
        with pytest.raises(ValueError, match=OFF):
            model.model(**given)
        found, expected = model.model(**given, shiftdc=False)[0], base.model(**given)[0]
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=OFF):
        model.model.language_model(input_ids=text["input_ids"])
    model.model.language_model(input_ids=text["input_ids"], shiftdc=False)


# generate()


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2, "num_return_sequences": 2},
     {"return_dict_in_generate": True}, {"repetition_penalty": 1.7}, {"prefill_chunk_size": 7}],
    ids=lambda o: ",".join(o) or "greedy",
)  # fmt: skip
@pytest.mark.parametrize("mixed", [False, True])
def test_padding_on_the_right_is_as_padding_on_the_left(model, processor, options, mixed):
    requests, images = [*REQUESTS, "Hello"][: 2 + mixed], [*IMAGES, None][: 2 + mixed]
    left = encode(processor, requests, images)
    processor.tokenizer.padding_side = "right"
    try:
        right = encode(processor, requests, images)
    finally:
        processor.tokenizer.padding_side = "left"
    assert right["attention_mask"][:, -1].tolist() != left["attention_mask"][:, -1].tolist()
    found, expected = (model.generate(**given, **GREEDY, **options) for given in (right, left))
    if "return_dict_in_generate" in options:
        found, expected = found.sequences, expected.sequences
    copies = options.get("num_return_sequences", 1)
    assert new_tokens(found, right["input_ids"]) == new_tokens(expected, left["input_ids"])
    assert torch.equal(found[:, : right["input_ids"].shape[1]], right["input_ids"].repeat_interleave(copies, dim=0))


def test_arguments_by_position_are_taken(model, inputs):
    config = GenerationConfig(max_new_tokens=2, pad_token_id=3, eos_token_id=2)
    expected = model.generate(**inputs, generation_config=config)
    assert expected.shape[1] == inputs["input_ids"].shape[1] + 2
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    assert torch.equal(model.generate(None, config, **inputs), expected)
    assert torch.equal(model.generate(inputs["input_ids"], config, **rest), expected)
    called = []
    model.generate(None, config, [lambda ids, scores: called.append(1) or scores], **inputs)
    assert called
    assert torch.equal(
        model.generate(None, config, shiftdc=False, **inputs), model.generate(None, config, None, **inputs, shiftdc=False)
    )
    with pytest.raises(TypeError, match="multiple values for argument 'generation_config'"):
        model.generate(None, config, **inputs, generation_config=config)
    with pytest.raises(ValueError, match="input_ids twice"):
        model.generate(inputs["input_ids"], config, **inputs)


def test_embeddings_beside_ids_that_hide_the_image_are_refused(model, base, inputs):
    embeds = base.get_input_embeddings()(inputs["input_ids"])
    hidden = torch.where(inputs["input_ids"] == 4, 9, inputs["input_ids"])
    for ids in (hidden, inputs["input_ids"]):
        with pytest.raises(ValueError, match=r"inputs_embeds may hold an image.*shiftdc=False"):
            model.generate(input_ids=ids, inputs_embeds=embeds, **GREEDY)
    with pytest.raises(ValueError, match=OFF):
        model(inputs_embeds=embeds)
    model.generate(input_ids=hidden, inputs_embeds=embeds, shiftdc=False, **GREEDY)


# the model as a value


def test_pickled_saved_and_copied_models_stay_calibrated(make_export, inputs, tmp_path):
    folder = make_export(gate="two-sided", caption_max_new_tokens=8, strength=STRENGTH).plan.output
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    expected = model.generate(**inputs, **GREEDY)
    assert not torch.equal(expected, model.generate(**inputs, **GREEDY, shiftdc=False))
    torch.save(model, tmp_path / "model.pt")
    for again in (
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
        copy.deepcopy(model),
    ):
        assert type(again) is type(model)
        assert torch.equal(again.generate(**inputs, **GREEDY), expected)
        with pytest.raises(ValueError, match=OFF):
            again.model(**inputs)
        again.shiftdc_corrections[0].direction.neg_()
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)  # nothing is shared


def test_a_pickled_model_is_read_in_another_process(make_export, inputs, tmp_path):
    """Its code lies in transformers' cache of modules, which Python must be told of."""
    folder = make_export(gate="two-sided", caption_max_new_tokens=8, strength=STRENGTH).plan.output
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    expected = model.generate(**inputs, **GREEDY)
    torch.save({"model": model, "inputs": dict(inputs)}, tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "from transformers.dynamic_module_utils import init_hf_modules\n"
        "init_hf_modules() if len(sys.argv) > 2 else None\n"
        "kept = torch.load(sys.argv[1], weights_only=False)\n"
        "print(kept['model'].generate(**kept['inputs'], max_new_tokens=6, do_sample=False).tolist())\n"
    )
    for told in (["told"], []):
        run = [*python(), "-c", code, tmp_path / "model.pt", *told]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        if told:
            assert done.stdout.strip() == str(expected.tolist()), done.stderr
        else:
            assert "No module named 'transformers_modules'" in done.stderr and not done.stdout


def test_many_replies_take_no_more_memory(model, processor):
    """Of tensors and Python's own objects; in a process of its own, because others come and go here."""
    inputs = encode(processor, ["A"], IMAGES[:1])
    one = {**inputs, "max_new_tokens": 1, "do_sample": False}

    def held():
        gc.collect()
        return len(gc.get_objects())

    for _ in range(3):
        model.generate(**one)
    before = held()
    for _ in range(10):
        model.generate(**one)
        model.generate(**one, past_key_values=DynamicCache())
        with torch.no_grad():
            model(**inputs)
    assert held() - before < 50
