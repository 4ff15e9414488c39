"""generate() and forward() of a tiny calibrated model, step by step: what each of them hands on, and what they refuse.

test_modeling.py and test_calls.py compare whole replies with the naive implementation.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from in_memory import with_traits
from other_device import other_device
from tiny import encode, picture, tiny_processor
from transformers import DynamicCache, GenerationConfig

from exporter.modeling.configuration_shiftdc import ShiftDCSettings
from exporter.modeling.conversation_shiftdc import UNKNOWN_CACHE
from exporter.modeling.image_prefix_shiftdc import PreallocatedLayer
from exporter.modeling.inputs_shiftdc import UNMARKED_IMAGE
from exporter.modeling.modeling_shiftdc import ShiftDCMixin

TWO = {"max_new_tokens": 2, "do_sample": False}
REQUESTS = ["How do I build this?", "What is it, and who needs one?"]
IMAGES = [picture(0), picture(1)]


@pytest.fixture(scope="module")
def model(load):
    return load(strength=4, caption_max_new_tokens=2)


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def inputs(processor):
    return dict(encode(processor, REQUESTS[:1], IMAGES[:1]))


@pytest.fixture(scope="module")
def both(processor):
    """A row that is padded, and a longer one."""
    return dict(encode(processor, REQUESTS, IMAGES))


@pytest.fixture(scope="module")
def text(processor):
    return dict(encode(processor, ["Hello", "Hello there, you"], [None, None]))


def without(given, *names):
    return {k: v for k, v in given.items() if k not in names}


def message_of(run, *args, **kwargs):
    with pytest.raises(ValueError) as raised:
        run(*args, **kwargs)
    return str(raised.value)


def logits(model, inputs, **options):
    """Of the first new token."""
    options = {"max_new_tokens": 1, "do_sample": False, **options}
    return model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True).logits[0]


# what is asked


def test_ids_are_given_once_in_one_of_three_ways(model, inputs):
    ids, rest = inputs["input_ids"], without(inputs, "input_ids")
    expected = model.generate(**inputs, **TWO)
    assert not torch.equal(expected, model.generate(**inputs, **TWO, shiftdc=False))
    for given in (model.generate(ids, **rest, **TWO), model.generate(inputs=ids, **rest, **TWO)):
        assert torch.equal(given, expected)
    twice = "generate() got input_ids twice: give them as the first argument or as input_ids=."
    assert message_of(model.generate, ids, **inputs, **TWO) == twice
    assert message_of(model.generate, inputs=ids, **inputs, **TWO) == twice
    config = GenerationConfig(max_new_tokens=2, pad_token_id=3, eos_token_id=2)
    assert torch.equal(model.generate(ids, config, **rest), expected)


def test_prompts_without_an_image_are_the_base_model_s(model, text, inputs):
    stock = type(model)._shiftdc_base_generate
    for given in (text, inputs):
        expected = stock(model, **given, **TWO, shiftdc=False)
        assert torch.equal(model.generate(**given, **TWO, shiftdc=False), expected)
        assert torch.equal(model.generate(given["input_ids"], **without(given, "input_ids"), **TWO, shiftdc=False), expected)
        assert torch.equal(model.generate(**given, **TWO), expected) == (given is text)
    unmasked = model.generate(text["input_ids"][1:], **TWO)
    assert torch.equal(unmasked, model.generate(text["input_ids"][1:], attention_mask=text["attention_mask"][1:], **TWO))
    embeds = model.get_input_embeddings()(text["input_ids"])
    found = model.generate(inputs_embeds=embeds, attention_mask=text["attention_mask"], **TWO, shiftdc=False)
    assert torch.equal(found, model.generate(**text, **TWO)[:, text["input_ids"].shape[1] :])


def test_nothing_runs_before_the_buffers_are_checked(model, inputs, text):
    broken = copy.deepcopy(model)
    broken.shiftdc_corrections[0].direction.neg_()
    for given in (inputs, text):
        broken._shiftdc_ready = False
        assert "layer 1 are not those" in message_of(broken.generate, **given, **TWO)
        assert "layer 1 are not those" in message_of(broken, **given)
    broken.generate(**inputs, **TWO, shiftdc=False)
    broken(**inputs, shiftdc=False)
    assert not broken._shiftdc_ready
    broken.shiftdc_corrections[0].direction.neg_()
    broken.generate(**inputs, **TWO)
    assert broken._shiftdc_ready


VIDEO = (
    "The prompt holds a video, which calibration does not know; give its frames as images, or pass shiftdc=False (no "
    "calibration)."
)


def test_videos_are_refused(model, inputs, monkeypatch):
    last = int(inputs["input_ids"][0, -1])
    monkeypatch.setattr(model.config, "shiftdc", with_traits(model.config.shiftdc, video_token_id=last))
    for call in (model.generate, model.shiftdc_captions, model, model.shiftdc_image):
        assert message_of(call, **inputs) == VIDEO


def test_images_that_no_token_stands_for_are_refused(model, text, inputs):
    shown = {**text, "pixel_values": inputs["pixel_values"]}
    for call in (model.generate, model):
        assert message_of(call, **shown) == UNMARKED_IMAGE


def test_several_prompts_in_a_row_are_refused(model, both):
    ids = both["input_ids"]
    mask = both["attention_mask"]
    counted = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)  # as transformers counts
    for positions, refused in ((counted, False), (torch.arange(ids.shape[1]) % 9, True)):
        given = {**both, "position_ids": positions.expand_as(ids)}
        if refused:
            assert "several prompts" in message_of(model.generate, **given, **TWO)
            assert "several prompts" in message_of(model, **given)
        else:
            assert torch.allclose(logits(model, given), logits(model, both), atol=1e-4)
            assert torch.allclose(model(**given).logits[:, -1], model(**both).logits[:, -1], atol=1e-4)


def test_padding_on_the_right_with_its_mask_and_without(model, both):
    width = both["input_ids"].shape[1]
    gap = width - int(both["attention_mask"][0].sum())
    assert gap > 0
    right = {**both, **{k: torch.cat([both[k][:1].roll(-gap, 1), both[k][1:]]) for k in ("input_ids", "attention_mask")}}
    expected = logits(model, both)
    assert torch.allclose(logits(model, right), expected, atol=1e-4)
    assert torch.allclose(logits(model, without(right, "attention_mask")), expected, atol=1e-4)
    found = model.generate(**right, **TWO)
    assert torch.equal(found[:, :width], right["input_ids"])


# captions and references


def test_captions_and_references_of_a_padded_batch_are_those_of_its_rows(model, both, text):
    captions, reference = model.shiftdc_captions(**both), model.shiftdc_reference(**both)
    for row in (0, 1):
        kept = both["attention_mask"][row].bool()
        alone = {"input_ids": both["input_ids"][row : row + 1, kept], "pixel_values": both["pixel_values"][row : row + 1]}
        assert model.shiftdc_captions(**alone) == captions[row : row + 1]
        assert torch.allclose(model.shiftdc_reference(**alone), reference[row : row + 1], atol=1e-4)
    coordinates = model.shiftdc_coordinates(**both)
    assert coordinates.shape == (2, 2) and not torch.allclose(coordinates, reference)
    assert torch.allclose(model.shiftdc_reference(**both, captions=captions), reference, atol=1e-4)
    assert model.shiftdc_captions(**text) == [[], []]
    for given in ({}, {"captions": [[], []]}):
        assert model.shiftdc_reference(**text, **given).tolist() == [[0, 0], [0, 0]]


def test_what_the_mask_hides_is_not_there(model, both):
    """Other tokens than padding, which a mask alone can hide."""
    mask = both["attention_mask"].clone()
    mask[1, :2] = 0
    hidden = {**both, "attention_mask": mask}
    padded = {"input_ids": both["input_ids"].masked_fill(mask == 0, 3), "pixel_values": both["pixel_values"]}
    assert not torch.allclose(logits(model, hidden)[1], logits(model, both)[1], atol=1e-4)
    for options in ({}, {"use_cache": False}, {"past_key_values": True}, {"shiftdc": False}):
        found, expected = (
            logits(model, given, **{k: DynamicCache() if k == "past_key_values" else v for k, v in options.items()})
            for given in (hidden, padded)
        )
        assert torch.allclose(found, expected, atol=1e-4)
    assert model.shiftdc_captions(**hidden) == model.shiftdc_captions(**padded) != model.shiftdc_captions(**both)
    read = model.shiftdc_image(**hidden)
    assert (read.captions, read.prefixes) == ((other := model.shiftdc_image(**padded)).captions, other.prefixes)
    assert torch.allclose(model.shiftdc_reference(**hidden), model.shiftdc_reference(**padded), atol=1e-4)


def test_padding_that_may_end_a_text_is_told_by_the_mask_alone(model, both, monkeypatch):
    expected, coordinates = logits(model, both), model.shiftdc_coordinates(**both)
    tokens = model.generate(**both, **TWO)[:, both["input_ids"].shape[1] :]
    monkeypatch.setattr(model.generation_config, "pad_token_id", 2)
    mask = both["attention_mask"]
    given = {**both, "input_ids": both["input_ids"].masked_fill(mask == 0, 2)}
    for options in ({}, {"use_cache": False}, {"past_key_values": DynamicCache()}):
        assert torch.allclose(logits(model, given, **options), expected, atol=1e-4)
    assert torch.equal(model.generate(**given, **TWO)[:, mask.shape[1] :], tokens)  # behind the cache of what it has read
    gap = int((mask[0] == 0).sum())
    right = {k: torch.cat([v[:1].roll(-gap, 1), v[1:]]) if k != "pixel_values" else v for k, v in given.items()}
    assert torch.allclose(model.shiftdc_coordinates(**right), coordinates, atol=1e-4)


@pytest.mark.parametrize("reference", ["static", "blank", "text"])
def test_given_captions_win_over_the_kind_of_reference(load, model, inputs, reference):
    other, captions = load(strength=4, reference=reference), [[90, 91]]
    assert torch.equal(other.shiftdc_reference(**inputs, captions=captions), model.shiftdc_reference(**inputs, captions=captions))


def test_captions_are_as_long_as_the_config_says_and_the_base_model_s_own(load, inputs):
    for length in (2, 5):
        model = load(strength=4, caption_max_new_tokens=length)
        (caption,) = model.shiftdc_captions(**inputs)
        asked = torch.tensor([model.shiftdc_composer.caption_prompt(inputs["input_ids"][0].tolist())])
        expected = type(model)._shiftdc_base_generate(
            model, input_ids=asked, pixel_values=inputs["pixel_values"], max_new_tokens=length, do_sample=False, shiftdc=False
        )
        assert caption == [t for t in expected[0, asked.shape[1] :].tolist() if t not in (2, 3)] and caption


def test_what_each_kind_of_reference_is_the_coordinate_of(load, processor):
    mixed = dict(encode(processor, [REQUESTS[0], "Hello", REQUESTS[1]], [IMAGES[0], None, IMAGES[1]]))
    prompts = [mixed["input_ids"][row, mixed["attention_mask"][row].bool()].tolist() for row in (0, 2)]
    composer = load(strength=4).shiftdc_composer
    pixels = {"pixel_values": torch.zeros_like(mixed["pixel_values"])}
    for kind in ("caption", "text", "blank"):
        model = load(strength=4, reference=kind, caption_max_new_tokens=2)
        captions = [c for c in model.shiftdc_captions(**mixed) if c] if kind == "caption" else [None, None]
        asked = prompts if kind == "blank" else [composer.text_prompt(p, c) for p, c in zip(prompts, captions, strict=True)]
        expected = model._shiftdc_last_coordinates(asked, torch.device("cpu"), pixels if kind == "blank" else {})
        found = model.shiftdc_reference(**mixed)
        assert torch.allclose(found[[0, 2]], expected, atol=1e-4) and found[1].tolist() == [0, 0]
    assert "no image was given" in message_of(
        load(strength=4, reference="blank").shiftdc_reference, **without(mixed, "pixel_values")
    )


def test_given_captions_are_used_by_row(model, processor, both):
    mixed = dict(encode(processor, [REQUESTS[0], "Hello", REQUESTS[1]], [IMAGES[0], None, IMAGES[1]]))
    captions = [torch.tensor([90, 91]), [5], [92]]
    found = model.shiftdc_reference(**mixed, captions=captions)
    assert found[1].tolist() == [0, 0]
    singles = [model.shiftdc_reference(**encode(processor, [r], [i]), captions=[c]) for r, i, c in
               zip(REQUESTS, IMAGES, (captions[0], captions[2]), strict=True)]  # fmt: skip
    assert torch.allclose(found[[0, 2]], torch.cat(singles), atol=1e-4)
    expected = logits(model, mixed, shiftdc_reference=found)
    assert torch.allclose(logits(model, mixed, shiftdc_captions=captions), expected, atol=1e-4)
    assert message_of(model.generate, **mixed, shiftdc_captions=captions[:2]) == (
        "shiftdc_captions needs one caption per row: expected 3, found 2."
    )


def test_a_static_reference_has_no_pass(load, inputs):
    model = load(strength=4, reference="static")
    assert message_of(model.shiftdc_reference, **inputs) == (
        "A checkpoint with 'reference: static' has no reference pass: its shift is baked in."
    )
    assert message_of(model.shiftdc_image, **inputs) == (
        "shiftdc_image() is for checkpoints with 'reference: caption'; the others write no caption."
    )
    prompt = model._shiftdc_images.prompt(inputs["input_ids"], None, {})
    assert model._shiftdc_amounts(prompt, None, None) == {}
    given = torch.zeros(1, 2)
    assert torch.equal(model._shiftdc_amounts(prompt, given, None)["shiftdc_reference"], given)


@pytest.mark.parametrize("rule", ["sequential", "precomputed"])
def test_what_corrections_are_computed_from(load, processor, rule):
    model = load(strength=4, rule=rule, caption_max_new_tokens=2)
    mixed = dict(encode(processor, [REQUESTS[0], "Hello"], [IMAGES[0], None]))
    prompt = model._shiftdc_images.prompt(mixed["input_ids"], mixed["attention_mask"], {"pixel_values": mixed["pixel_values"]})
    reference = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = model._shiftdc_amounts(prompt, reference.double(), None)
    (name, amounts) = found.popitem()
    assert amounts.dtype == torch.float32 and not found
    if rule == "sequential":
        assert name == "shiftdc_reference" and torch.equal(amounts, reference)
    else:
        assert name == "shiftdc_correction"
        assert torch.allclose(amounts[0], model.shiftdc_coordinates(**mixed)[0] - reference[0], atol=1e-4)
    captions = [[90], []]
    own = model._shiftdc_amounts(prompt, None, captions)[name]
    expected = model._shiftdc_amounts(prompt, model.shiftdc_reference(**mixed, captions=captions), None)[name]
    assert torch.allclose(own, expected, atol=1e-4)


@pytest.mark.parametrize(
    "reference",
    [torch.zeros(1, 3), torch.zeros(2, 2), torch.tensor([[1.0, torch.inf]]), torch.tensor([[torch.nan, 1.0]])],
    ids=["layers", "rows", "infinite", "no number"],
)
def test_a_reference_of_other_rows_or_layers_or_no_numbers(model, inputs, reference):
    assert message_of(model.generate, **inputs, **TWO, shiftdc_reference=reference) == (
        f"shiftdc_reference must be finite and of shape [batch, calibrated layers] = [1, 2], found {list(reference.shape)}."
    )


def blank(pixel):
    return SimpleNamespace(_shiftdc_traits=SimpleNamespace(blank_pixel=pixel))


@pytest.mark.parametrize("mean", [0.0, -0.5])
def test_a_neutral_image_for_every_image_and_none_for_padding(mean):
    pixels = torch.ones(2, 3, 3, 4, 4)
    pixels[0, 2] = 0
    pixels[1, 0, :2] = 0
    found = ShiftDCMixin._shiftdc_blank(blank(mean), pixels)
    expected = torch.full_like(pixels, mean)
    expected[0, 2] = 0
    assert torch.equal(found, expected) and found.dtype == pixels.dtype
    assert ShiftDCMixin._shiftdc_blank(blank(mean), pixels.half()).dtype == torch.float16
    assert not ShiftDCMixin._shiftdc_blank(blank(-0.5), torch.zeros(1, 3, 4, 4)).any()
    for value in (0.0, 1e-6):  # patches, as Qwen has them
        patches = ShiftDCMixin._shiftdc_blank(blank(value), torch.ones(5, 6))
        assert torch.equal(patches, torch.full((5, 6), value))


def test_coordinates_of_prompts_that_are_composed_here(model, inputs):
    prompts = [[1, 9, 10], [1, 9, 10, 11, 12]]
    found = model._shiftdc_last_coordinates(prompts, torch.device("cpu"), {})
    for row, prompt in enumerate(prompts):
        assert torch.allclose(found[row], model.shiftdc_coordinates(torch.tensor([prompt]))[0], atol=1e-4)
    ids = inputs["input_ids"][0].tolist()
    shown = model._shiftdc_last_coordinates([ids], torch.device("cpu"), {"pixel_values": inputs["pixel_values"]})
    assert torch.allclose(shown, model.shiftdc_coordinates(**inputs), atol=1e-4)


def test_token_inputs_are_made_for_prompts_that_are_composed_here(model, monkeypatch):
    given = {}
    monkeypatch.setattr(type(model), "_shiftdc_image_names", frozenset({"token_type_ids"}))
    monkeypatch.setattr(type(model), "_shiftdc_coordinates", lambda self, inputs, last: given.update(inputs, last=last))
    model._shiftdc_last_coordinates([[9, 4], [4]], torch.device("cpu"), {"token_type_ids": torch.tensor([[1]])})
    assert {k: v.tolist() for k, v in given.items()} == {
        "input_ids": [[9, 4], [3, 4]], "attention_mask": [[1, 1], [0, 1]], "token_type_ids": [[0, 1], [0, 1]], "last": [1, 1],
    }  # fmt: skip


# the reply


def calls_of_the_base_class(model, monkeypatch):
    """Arguments of every call of the base class's generate()."""
    calls = []
    stock = type(model)._shiftdc_base_generate
    base = next(c for c in type(model).__mro__ if vars(c).get("generate") is stock)
    monkeypatch.setattr(base, "generate", lambda self, *a, **k: calls.append(k) or stock(self, *a, **k))
    return calls


def test_the_image_is_read_once_where_the_reply_may_go_on_from_its_cache(model, inputs, monkeypatch):
    calls = calls_of_the_base_class(model, monkeypatch)
    expected = model.generate(**inputs, **TWO, shiftdc_captions=model.shiftdc_captions(**inputs))
    for options, shares in (
        ({}, True),
        ({"num_beams": 1, "streamer": None}, True),
        ({"output_logits": False, "logits_processor": []}, True),
        ({"use_cache": False}, False),
        ({"past_key_values": DynamicCache()}, False),
        ({"generation_config": GenerationConfig(max_new_tokens=2, pad_token_id=3, eos_token_id=2)}, True),
        ({"generation_config": GenerationConfig(max_new_tokens=2, pad_token_id=3, eos_token_id=2, use_cache=False)}, False),
    ):
        calls.clear()
        given = {"max_new_tokens": 2} if "generation_config" in options else TWO
        assert torch.equal(model.generate(**inputs, **given, **options), expected)
        caption, reply = calls
        assert ("pixel_values" in caption, "pixel_values" in reply) == (True, not shares)
        assert caption["shiftdc"] is False and caption["max_new_tokens"] == 2 and "shiftdc" not in reply
        assert reply["shiftdc_prompt_length"] == inputs["input_ids"].shape[1] and reply["shiftdc_rows"].tolist() == [True]
    monkeypatch.setattr(model.generation_config, "cache_implementation", "static")
    calls.clear()
    model.generate(**inputs, **TWO)
    assert "pixel_values" in calls[1]


def test_a_reply_that_counts_columns_reads_its_image_itself_where_rows_differ(model, both, inputs, monkeypatch):
    calls = calls_of_the_base_class(model, monkeypatch)
    for given, options, shares in (
        (both, {}, True),
        (both, {"repetition_penalty": 1.5}, False),
        (inputs, {"repetition_penalty": 1.5}, True),
    ):
        calls.clear()
        model.generate(**given, **TWO, **options)
        assert ("pixel_values" not in calls[1]) is shares


def test_a_conversation_goes_on_in_its_cache(model, inputs, processor, monkeypatch):
    cache = DynamicCache()
    first = model.generate(**inputs, **TWO, min_new_tokens=2, past_key_values=cache)
    new = processor.tokenizer(" USER: Why? ASSISTANT:", add_special_tokens=False, return_tensors="pt")["input_ids"]
    whole = torch.cat([first, new], dim=1)
    mask = torch.ones_like(whole)
    expected = model.generate(whole, attention_mask=mask, pixel_values=inputs["pixel_values"], **TWO)
    calls = calls_of_the_base_class(model, monkeypatch)
    found = model.generate(new, attention_mask=mask, past_key_values=cache, **TWO)
    assert ["pixel_values" in c for c in calls] == [True, False]  # for the caption, which is in view of the request
    assert torch.equal(found[:, new.shape[1] :], expected[:, whole.shape[1] :])
    assert torch.equal(found[:, : new.shape[1]], new)


def test_images_that_were_read_before_are_not_read_again(model, inputs, processor):
    read = model.shiftdc_image(**inputs)
    assert read.cache is not None and read.prefixes and read.captions == model.shiftdc_captions(**inputs)
    expected = model.generate(**inputs, **TWO)
    length = read.cache.get_seq_length()
    for given in (inputs, without(inputs, "pixel_values"), inputs):
        assert torch.equal(model.generate(**given, **TWO, shiftdc_image=read), expected)
        assert read.cache.get_seq_length() == length
    other = dict(encode(processor, REQUESTS[:1], IMAGES[1:]))
    assert "is of other images" in message_of(model.generate, **other, **TWO, shiftdc_image=read)
    bare = without(inputs, "pixel_values")
    assert "no image was given" in message_of(model.generate, **bare, **TWO, use_cache=False, shiftdc_image=read)
    assert torch.equal(model.generate(**inputs, **TWO, use_cache=False, shiftdc_image=read), expected)


def test_where_nothing_is_kept_of_an_image(model, inputs, text, monkeypatch):
    nothing = model.shiftdc_image(**text)
    assert (nothing.captions, nothing.images, nothing.prefixes, nothing.cache) == ([[], []], {}, [], None)
    kept = model.shiftdc_image(**inputs).cache
    assert {type(layer) for layer in kept.layers} == {PreallocatedLayer}
    prompt = model._shiftdc_prompt(inputs["input_ids"], None, {"pixel_values": inputs["pixel_values"]})
    assert model._shiftdc_read(prompt, keep=False).cache is None
    calls = calls_of_the_base_class(model, monkeypatch)
    model.shiftdc_captions(**inputs)
    assert "past_key_values" not in calls[0]
    monkeypatch.setattr(model.config, "shiftdc", with_traits(model.config.shiftdc, shares_prefix=False))
    assert model.shiftdc_image(**inputs).cache is None


def test_of_rows_without_an_image_nothing_is_kept(model, processor):
    mixed = dict(encode(processor, [REQUESTS[0], "Hello"], [IMAGES[0], None]))
    read = model.shiftdc_image(**mixed)
    assert read.cache is None and read.captions[0] and read.captions[1] == []


def test_the_baked_shift_and_a_given_reference_need_no_caption(load, inputs, monkeypatch):
    for model, options in (
        (load(strength=4, reference="static"), {}),
        (load(strength=4, reference="text"), {}),
        (load(strength=4, caption_max_new_tokens=2), {"shiftdc_reference": torch.zeros(1, 2)}),
        (load(strength=4, caption_max_new_tokens=2), {"shiftdc_captions": [[90]]}),
    ):
        calls = calls_of_the_base_class(model, monkeypatch)
        model.generate(**inputs, **TWO, **options)
        assert len(calls) == 1
        monkeypatch.undo()


def test_the_precomputed_rule_reads_the_image_for_every_pass(load, inputs, monkeypatch):
    model = load(strength=4, rule="precomputed", caption_max_new_tokens=2)
    calls = calls_of_the_base_class(model, monkeypatch)
    model.generate(**inputs, **TWO)
    assert ["pixel_values" in c for c in calls] == [True, True] and "past_key_values" not in calls[0]


def test_a_family_without_shared_prefixes_reads_the_image_twice(model, inputs, monkeypatch):
    expected = model.generate(**inputs, **TWO)
    monkeypatch.setattr(model.config, "shiftdc", with_traits(model.config.shiftdc, shares_prefix=False))
    calls = calls_of_the_base_class(model, monkeypatch)
    assert torch.equal(model.generate(**inputs, **TWO), expected)
    assert ["pixel_values" in c for c in calls] == [True, True]


def test_a_family_that_goes_on_in_no_cache(model, inputs, monkeypatch):
    cache = DynamicCache()
    first = model.generate(**inputs, **TWO, past_key_values=cache)
    monkeypatch.setattr(type(model), "shiftdc_continues_caches", False)
    sentence = (
        "ShiftDCLlavaForConditionalGeneration does not go on from past_key_values with calibration: give the whole prompt and a "
        "new cache, or pass shiftdc=False (no calibration)."
    )
    more = {"input_ids": torch.cat([first, first[:, -1:]], dim=1), "pixel_values": inputs["pixel_values"]}
    mask = {"attention_mask": torch.ones_like(more["input_ids"])}
    assert message_of(model.generate, **more, **mask, **TWO, past_key_values=cache) == sentence
    step = {"input_ids": first[:, -1:], "past_key_values": cache}
    assert message_of(model, **step) == sentence
    model(**step, shiftdc=False)
    model.generate(**inputs, **TWO, past_key_values=DynamicCache())
    model(**inputs, past_key_values=DynamicCache())


def test_state_of_the_backbone_is_put_back(model, monkeypatch):
    monkeypatch.setattr(model.config, "shiftdc", with_traits(model.config.shiftdc, backbone_state=["model.deltas"]))
    model.model.deltas = "before"
    try:
        with pytest.raises(RuntimeError, match="stop"), model._shiftdc_preserving_state():
            model.model.deltas = "within"
            raise RuntimeError("stop")
        assert model.model.deltas == "before"
    finally:
        del model.model.deltas


def test_a_step_is_told_where_to_correct(model, inputs):
    rows, ids = torch.tensor([True]), inputs["input_ids"]
    reference, length = torch.zeros(1, 2), ids.shape[1]
    given = {
        "shiftdc_rows": rows,
        "shiftdc_prompt_length": length,
        "shiftdc_reference": reference,
        "shiftdc_correction": reference,
    }

    def prepared(ids, cache=None, **options):
        return model.prepare_inputs_for_generation(ids, past_key_values=cache, attention_mask=torch.ones_like(ids), **options)

    first = prepared(ids, pixel_values=inputs["pixel_values"], is_first_iteration=True, **given)
    assert first["shiftdc_position"].tolist() == [length - 1] and first["shiftdc_unrecorded"] is True
    assert first["shiftdc_reference"] is reference and first["shiftdc_correction"] is reference and "shiftdc" not in first
    cache = DynamicCache()
    model.model(input_ids=ids, past_key_values=cache, shiftdc=False)
    longer = torch.cat([ids, ids[:, :1]], dim=1)
    later = prepared(longer, cache, next_sequence_length=1, **given)
    assert later["shiftdc"] is False and later["shiftdc_unrecorded"] is True and later["input_ids"].shape == (1, 1)
    assert not {"shiftdc_position", "shiftdc_reference", "shiftdc_correction"} & later.keys()
    off = prepared(ids, shiftdc=False)
    assert off["shiftdc"] is False and off["shiftdc_unrecorded"] is True and "shiftdc_position" not in off
    for options in ({}, {"shiftdc_prompt_length": length}):
        plain = prepared(ids, **options)
        assert not {"shiftdc_position", "shiftdc_unrecorded"} & plain.keys()
    half = prepared(ids, shiftdc_rows=rows)
    assert half["shiftdc_unrecorded"] is True and "shiftdc_position" not in half
    embeds = model.get_input_embeddings()(ids)
    by_embeds = prepared(ids, inputs_embeds=embeds, is_first_iteration=True, shiftdc_rows=rows, shiftdc_prompt_length=length)
    assert torch.equal(by_embeds["inputs_embeds"], embeds) and by_embeds["shiftdc_position"].tolist() == [length - 1]


def test_continuous_batching_is_refused_in_one_sentence(model):
    expected = (
        "Continuous batching (generate_batch, cache_implementation='paged', transformers serve --continuous-batching) reads many "
        "prompts as one row without their images, which calibration does not know: call generate(), or load the base "
        "model for it."
    )
    for call in (model.generate_batch, model.init_continuous_batching, model.continuous_batching_context_manager):
        assert message_of(call, [[1]]) == message_of(call, inputs=[[1]]) == expected


def test_what_a_cache_of_an_uncalibrated_reply_holds(model, text, inputs, processor):
    for given, options in ((text, {}), (inputs, {"shiftdc": False})):
        cache = DynamicCache()
        out = model.generate(**given, **TWO, min_new_tokens=2, past_key_values=cache, **options)
        held = cache._shiftdc_held
        assert torch.equal(held.ids, out[:, :-1]) and torch.equal(held.tail, out[:, -1:])
        assert held.corrected.tolist() == [-1] * len(out)
        assert torch.equal(held.mask[:, : given["input_ids"].shape[1]], given["attention_mask"])
        returned = model.generate(**given, **TWO, min_new_tokens=2, return_dict_in_generate=True, **options)
        assert torch.equal(returned.past_key_values._shiftdc_held.ids, held.ids)
        if given is inputs:
            assert torch.equal(held.images["pixel_values"], inputs["pixel_values"])
    unknown = DynamicCache()
    model.model(input_ids=text["input_ids"], past_key_values=unknown, shiftdc=False)
    longer = torch.cat([text["input_ids"], text["input_ids"][:, -1:]], dim=1)
    model.generate(longer, attention_mask=torch.ones_like(longer), past_key_values=unknown, **TWO, shiftdc=False)
    assert unknown._shiftdc_held is None
    known = DynamicCache()
    model.generate(**text, **TWO, past_key_values=known)
    other = torch.cat([text["input_ids"] + 1, text["input_ids"]], dim=1)  # the base class goes on behind what the cache holds
    model.generate(other, attention_mask=torch.ones_like(other), past_key_values=known, **TWO, shiftdc=False)
    assert known._shiftdc_held is None


def test_an_uncalibrated_conversation_goes_on_in_its_cache(model, text):
    """What the base class reads is noted, which is neither the last token of a reply nor what a failed call was given."""
    new = text["input_ids"][:, -2:]
    for width in (3, 4):  # without the last token of the reply, or with it
        cache = DynamicCache()
        first = model.generate(**text, **TWO, min_new_tokens=2, past_key_values=cache)
        mask = torch.cat([text["attention_mask"], torch.ones(2, width, dtype=torch.long)], dim=1)
        second = model.generate(new, attention_mask=mask, **TWO, min_new_tokens=2, past_key_values=cache)
        held = cache._shiftdc_held
        assert torch.equal(held.ids, torch.cat([first[:, :-1], second[:, :-1]], dim=1))
        assert held.ids.shape == held.mask.shape and held.ids.shape[1] == cache.get_seq_length()
        assert torch.equal(held.mask[:, : text["input_ids"].shape[1]], text["attention_mask"])

    def fail(ids, scores):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        mask = torch.cat([held.mask, torch.ones(2, 2, dtype=torch.long)], dim=1)
        model.generate(new, attention_mask=mask, **TWO, past_key_values=cache, logits_processor=[fail])
    assert cache._shiftdc_held is None


def test_padding_is_noted_where_no_mask_is_given(model, text):
    cache = DynamicCache()
    model.generate(text["input_ids"], **TWO, past_key_values=cache)
    assert torch.equal(cache._shiftdc_held.mask[:, :-1], text["attention_mask"])


def test_what_a_cache_of_a_calibrated_reply_holds(model, both):
    cache = DynamicCache()
    out = model.generate(**both, **TWO, min_new_tokens=2, past_key_values=cache)
    held = cache._shiftdc_held
    length = both["input_ids"].shape[1]
    assert torch.equal(held.ids, out[:, :-1]) and held.corrected.tolist() == [length - 1] * 2
    returned = model.generate(**both, **TWO, min_new_tokens=2, return_dict_in_generate=True)
    assert torch.equal(returned.past_key_values._shiftdc_held.ids, held.ids)
    assert torch.equal(returned.sequences, out)


# one pass


@torch.no_grad()
def test_a_pass_is_corrected_where_it_is_told(model, inputs):
    plain, found = model(**inputs, shiftdc=False).logits, model(**inputs).logits
    assert torch.equal(plain[:, :-1], found[:, :-1]) and not torch.equal(plain[:, -1], found[:, -1])
    at = torch.tensor([10])
    told = model(**inputs, shiftdc_position=at).logits
    assert torch.equal(plain[:, :10], told[:, :10]) and not torch.equal(plain[:, 10], told[:, 10])
    assert torch.equal(model(**inputs, shiftdc_position=at, shiftdc=False).logits, plain)
    assert torch.equal(model(**inputs, shiftdc_position=at, shiftdc_unrecorded=True).logits, told)
    amounts = torch.full((1, 2), 2.0)
    assert not torch.equal(model(**inputs, shiftdc_correction=amounts).logits, found)
    assert not torch.equal(model(**inputs, shiftdc_reference=amounts).logits, found)
    assert torch.equal(
        model(**inputs, shiftdc_reference=amounts, shiftdc_correction=amounts).logits,
        model(**inputs, shiftdc_correction=amounts).logits,
    )
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    assert message_of(model, inputs_embeds=embeds) == (
        "forward() needs input_ids to see which rows hold an image; pass shiftdc_position= with inputs_embeds, or shiftdc=False "
        "(no calibration)."
    )
    at = torch.tensor([2])
    assert not torch.equal(
        model(inputs_embeds=embeds, shiftdc_position=at).logits, model(inputs_embeds=embeds, shiftdc=False).logits
    )
    cache = DynamicCache()
    model(inputs_embeds=embeds, past_key_values=cache, shiftdc_position=at)
    assert cache._shiftdc_held is None
    returned = model(inputs_embeds=embeds, use_cache=True, shiftdc=False).past_key_values
    assert returned._shiftdc_held is None


@torch.no_grad()
def test_a_pass_behind_what_is_not_known(model, inputs):
    def filled():
        cache = DynamicCache()
        model.model(input_ids=inputs["input_ids"][:, :3], past_key_values=cache, shiftdc=False)
        return cache

    step = {"input_ids": torch.tensor([[9, 10]])}
    assert message_of(model, **step, past_key_values=filled()) == UNKNOWN_CACHE
    plain = model(**step, past_key_values=(cache := filled()), shiftdc=False).logits
    assert cache._shiftdc_held is None and cache.get_seq_length() == 5
    told = model(**step, past_key_values=(cache := filled()), shiftdc_position=torch.tensor([1])).logits
    assert cache._shiftdc_held is None and not torch.equal(plain[:, 1], told[:, 1]) and torch.equal(plain[:, 0], told[:, 0])


def words(processor, text):
    return processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


@torch.no_grad()
def test_a_later_turn_by_hand_undoes_the_correction_of_the_first(model, inputs, processor):
    cache = DynamicCache()
    first = model(**inputs, past_key_values=cache)
    new = words(processor, " No. USER: Why? ASSISTANT:")
    whole = torch.cat([inputs["input_ids"], new], dim=1)
    row = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    found = model(input_ids=new, attention_mask=row["attention_mask"], past_key_values=cache)
    expected = model(**row, pixel_values=inputs["pixel_values"]).logits
    assert found.logits.shape[1] == new.shape[1] and torch.allclose(found.logits, expected[:, -new.shape[1] :], atol=1e-4)
    assert torch.equal(cache._shiftdc_held.ids, whole) and cache._shiftdc_held.corrected.tolist() == [whole.shape[1] - 1]
    assert first.past_key_values is found.past_key_values is cache


@torch.no_grad()
@pytest.mark.parametrize("given", ["cache", "use_cache"])
def test_the_first_part_of_a_prompt_by_hand(model, inputs, given):
    begun = {**inputs, **{k: inputs[k][:, :-3] for k in ("input_ids", "attention_mask")}}
    last = torch.tensor([begun["input_ids"].shape[1] - 1])
    out = model(**begun, **({"past_key_values": DynamicCache()} if given == "cache" else {"use_cache": True}))
    assert torch.equal(out.logits, model(**begun, shiftdc_position=last).logits)
    assert not torch.equal(out.logits, model(**begun, shiftdc=False).logits)
    held = out.past_key_values._shiftdc_held
    assert torch.equal(held.ids, begun["input_ids"]) and held.corrected.tolist() == [-1]
    plain = model(**begun, shiftdc=False).past_key_values
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(out.past_key_values.layers, plain.layers, strict=True))


@torch.no_grad()
def test_labels_and_masks_tell_where_a_prompt_ends(model, inputs, processor):
    length = inputs["input_ids"].shape[1]
    quoted = torch.cat([inputs["input_ids"], words(processor, " I said ASSISTANT: no.")], dim=1)
    row = {"input_ids": quoted, "attention_mask": torch.ones_like(quoted), "pixel_values": inputs["pixel_values"]}
    labels = torch.where(torch.arange(quoted.shape[1]) < length, -100, quoted)
    plain = model(**row, shiftdc=False).logits
    moved = [int((model(**row, **given).logits != plain).any(-1)[0].nonzero()[0]) for given in ({"labels": labels}, {})]
    assert moved[0] == length - 1 < moved[1]
    deep = {**inputs, "attention_mask": torch.ones(1, 1, length, length, dtype=torch.bool)}
    assert "attention_mask must be [batch, time]" in message_of(model, **deep)


@torch.no_grad()
def test_embeddings_that_fail_leave_a_known_cache_unknown(model, inputs):
    cache = DynamicCache()
    model(**inputs, past_key_values=cache)
    with pytest.raises(RuntimeError):
        model(inputs_embeds=torch.ones(1, 1, 5), past_key_values=cache, shiftdc=False)
    assert cache._shiftdc_held is None


@torch.no_grad()
@pytest.mark.parametrize("shiftdc", [None, False])
def test_a_pass_that_fails_leaves_its_cache_unknown(model, inputs, shiftdc):
    cache = DynamicCache()
    model(**inputs, past_key_values=cache, shiftdc=shiftdc)
    assert torch.equal(cache._shiftdc_held.ids, inputs["input_ids"])
    bad = {"input_ids": torch.tensor([[10**6]]), "past_key_values": cache, "shiftdc": shiftdc}
    with pytest.raises(IndexError):
        model(**bad)
    assert cache._shiftdc_held is None


@torch.no_grad()
@pytest.mark.parametrize("rule", ["sequential", "precomputed"])
def test_the_target_of_one_pass(load, both, rule):
    model = load(strength=1, rule=rule)
    reference = model.shiftdc_coordinates(**both) - 2
    found = model(**both, shiftdc_reference=reference).logits
    amounts = torch.full((2, 2), 2.0)
    expected = model(**both, shiftdc_correction=amounts).logits
    assert torch.allclose(found, expected, atol=1e-4) == (rule == "precomputed")
    assert not torch.allclose(found[:, -1], model(**both).logits[:, -1], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["sequential", "precomputed"])
def test_a_prompt_in_parts_is_the_prompt(load, both, rule):
    model = load(strength=3, rule=rule)
    reference = model.shiftdc_coordinates(**both) - 2
    expected = model(**both, shiftdc_reference=reference).logits
    for first in (both["input_ids"].shape[1] - 5, both["input_ids"].shape[1] - 1):
        cache = DynamicCache()
        begun = {**both, **{k: both[k][:, :first] for k in ("input_ids", "attention_mask")}}
        model(**begun, past_key_values=cache)
        rest = {"input_ids": both["input_ids"][:, first:], "attention_mask": both["attention_mask"]}
        found = model(**rest, past_key_values=cache, shiftdc_reference=reference).logits
        assert torch.allclose(found, expected[:, first:], atol=1e-4)


def test_a_warning_where_the_baked_shift_stands_for_another_reference(load, inputs, monkeypatch):
    said = []
    monkeypatch.setattr("exporter.modeling.modeling_shiftdc.logger.warning_once", said.append)
    model = load(strength=4, caption_max_new_tokens=2)
    amounts = torch.ones(1, 2)
    for given in ({"shiftdc": False}, {"shiftdc_reference": amounts}, {"shiftdc_correction": amounts}):
        model(**inputs, **given)
    load(strength=4, reference="static")(**inputs)
    assert said == []
    model(**inputs)
    assert said == [
        "forward() got no shiftdc_reference, so the mean shift baked at export is used instead of the 'caption' reference; "
        "generate() computes that reference itself."
    ]


@torch.no_grad()
def test_on_another_device_the_same_comes_out(model, both, text):
    reference = model.shiftdc_coordinates(**both) - 2
    expected = model(**both, shiftdc_reference=reference).logits
    position = torch.tensor([20, -1])
    at = model(**both, shiftdc_position=position).logits
    with other_device() as device:
        there = copy.deepcopy(model).to(device)
        moved = {k: v.to(device) for k, v in both.items()}
        for target in (reference, reference.to(device)):
            assert torch.allclose(there(**moved, shiftdc_reference=target).logits.cpu(), expected, atol=1e-3)
        for place in (position, position.to(device)):
            assert torch.allclose(there(**moved, shiftdc_position=place).logits.cpu(), at, atol=1e-3)
        prompts = [[1, 9], [1, 9, 10]]
        composed = there._shiftdc_last_coordinates(prompts, device, {})
        here = model._shiftdc_last_coordinates(prompts, torch.device("cpu"), {})
        assert composed.device == device and torch.allclose(composed.cpu(), here, atol=1e-3)
        nothing = there.shiftdc_reference(text["input_ids"].to(device))
        assert nothing.device == device and not nothing.cpu().any()


def test_settings_of_prompts_come_from_the_config(model, monkeypatch):
    assert model._shiftdc_settings == ShiftDCSettings.of(model.config)
    images = model._shiftdc_images
    assert (images.names, images.image_token_id, images.video_token_id) == (type(model)._shiftdc_image_names, 4, None)
    monkeypatch.setattr(model.config, "shiftdc", with_traits(model.config.shiftdc, row_inputs=["pixel_values"]))
    assert model._shiftdc_images.by_row == {"pixel_values"} and images.by_row == frozenset()
    assert (model._shiftdc_padding.token, model._shiftdc_padding.ends) == (3, {2})
    monkeypatch.setattr(model.generation_config, "eos_token_id", [2, 7])
    assert model._shiftdc_padding.ends == {2, 7}
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    assert model._shiftdc_padding.ends == {2}
