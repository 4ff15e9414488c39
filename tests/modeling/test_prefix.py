"""One reading of the image for caption and reply, and for many questions: the same tokens as reading it anew."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from in_memory import with_traits
from tiny import encode, picture, tiny_processor
from transformers import GenerationConfig, LogitsProcessorList

from exporter.checkpoint.open import open_export
from exporter.data.demo.benchmark import image, items
from exporter.modeling.image_prefix_shiftdc import reads_padding, takes_cache
from exporter.modeling.inputs_shiftdc import align_prefixes
from exporter.modeling.modeling_shiftdc import ShiftDCMixin
from exporter.models.recipe import load_recipe
from exporter.pipeline.export import export
from exporter.pipeline.plan import ExportOptions, make_plan

GREEDY = {"max_new_tokens": 6, "do_sample": False}
REQUESTS = ["How do I build this?", "A", "What is it, and who needs one?", "Who? " * 9]
IMAGES = [picture(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def model(load):
    return load()


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def towers(model, run):
    """What `run` returns, and how often the vision tower ran meanwhile."""
    calls = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        return run(), len(calls)
    finally:
        handle.remove()


def apart(model, run):
    """What `run` returns where nothing is shared."""
    kept = model.config.shiftdc
    model.config.shiftdc = with_traits(kept, shares_prefix=False)
    try:
        return run()
    finally:
        model.config.shiftdc = kept


@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        {"generation_config": GenerationConfig(max_new_tokens=6)},
        {"max_new_tokens": 6, "do_sample": True, "temperature": 0.7},
    ],
    ids=["greedy", "config", "sampling"],
)
@pytest.mark.parametrize("count", [1, 4])
def test_the_tokens_are_those_of_two_readings(model, processor, options, count):
    inputs = encode(processor, REQUESTS[-count:], IMAGES[-count:])

    def reply():
        torch.manual_seed(1)
        return model.generate(**inputs, **options)

    found, once = towers(model, reply)
    expected, twice = towers(model, lambda: apart(model, reply))
    assert torch.equal(found, expected)
    assert (once, twice) == (1, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 7},
        {"prompt_lookup_num_tokens": 1},
        {"num_return_sequences": 2, "do_sample": True},
        {"output_attentions": True, "return_dict_in_generate": True},
    ],
    ids=lambda o: ",".join(o),
)
def test_other_ways_to_generate_read_the_image_themselves(model, processor, options):
    inputs = encode(processor, REQUESTS[:1], IMAGES[:1])
    _, count = towers(model, lambda: model.generate(**inputs, **{**GREEDY, **options}))
    assert count == 2


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"max_length": 90, "max_new_tokens": None},
        {"min_length": 70},
        {"logits_processor": LogitsProcessorList([lambda ids, scores: scores + ids.shape[1] % 7 * (ids[:, :1] == 3)])},
    ],
    ids=lambda o: next(iter(o)),
)
def test_what_looks_at_the_prompts_columns_sees_the_callers(model, processor, options):
    """Rows of mixed lengths are laid out anew for the cache; then nothing may count columns or see padding."""
    for requests, count in ((REQUESTS, 2), (REQUESTS[:1], 1)):
        inputs = encode(processor, requests, IMAGES[: len(requests)])
        found, read = towers(model, lambda: model.generate(**inputs, **{**GREEDY, **options}))  # noqa: B023
        assert read == count
        assert torch.equal(found, apart(model, lambda: model.generate(**inputs, **{**GREEDY, **options})))  # noqa: B023


def test_rows_without_an_image_and_the_precomputed_rule_share_nothing(model, load, processor):
    mixed = encode(processor, REQUESTS[:2], [IMAGES[0], None])
    assert towers(model, lambda: model.generate(**mixed, **GREEDY))[1] == 2
    alone = encode(processor, REQUESTS[:1], IMAGES[:1])
    other = load(rule="precomputed")
    assert towers(other, lambda: other.generate(**alone, **GREEDY))[1] == 3  # caption, clean pass, reply


@pytest.mark.parametrize("style", ["request", "describe", "naming"])
def test_many_questions_about_images_that_were_read_once(load, processor, style):
    model = load(caption_style=style)
    first = encode(processor, REQUESTS[:2], IMAGES[:2])
    seen, read = towers(model, lambda: model.shiftdc_image(**first))
    assert read == 1
    width = max(map(len, seen.prefixes))
    for requests in (REQUESTS[:2], REQUESTS[2:], ["Why?", "Why?"]):
        inputs = encode(processor, requests, IMAGES[:2])
        found, again = towers(model, lambda: model.generate(**inputs, **GREEDY, shiftdc_image=seen))  # noqa: B023
        assert again == 0
        assert seen.cache.get_seq_length() == width
        assert torch.equal(found, model.generate(**inputs, **GREEDY, shiftdc_captions=seen.captions))
        if style != "request":
            assert model.shiftdc_captions(**inputs) == seen.captions
        without_pixels = {k: v for k, v in inputs.items() if k != "pixel_values"}
        assert torch.equal(model.generate(**without_pixels, **GREEDY, shiftdc_image=seen), found)


def test_a_later_turn_goes_on_from_the_same_image(model, processor):
    seen = model.shiftdc_image(**encode(processor, REQUESTS[:1], IMAGES[:1]))
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": REQUESTS[0]}]},
        {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(text=prompt, images=IMAGES[0], return_tensors="pt")
    found, read = towers(model, lambda: model.generate(**inputs, **GREEDY, shiftdc_image=seen))
    assert read == 0
    assert torch.equal(found, model.generate(**inputs, **GREEDY, shiftdc_captions=seen.captions))


def test_any_number_of_threads_may_ask_about_one_image(model, processor):
    seen = model.shiftdc_image(**encode(processor, REQUESTS[:1], IMAGES[:1]))
    before = [(layer.keys, layer.keys.clone()) for layer in seen.cache.layers]
    asked = [encode(processor, [request], IMAGES[:1]) for request in (*REQUESTS, "Why?", "Where is it?")]
    expected = [model.generate(**inputs, **GREEDY, shiftdc_captions=seen.captions).tolist() for inputs in asked]

    def reply(number):
        inputs = asked[number % len(asked)]
        return model.generate(**inputs, **GREEDY, shiftdc_image=seen).tolist()

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(reply, range(48)))
    assert found == [expected[i % len(asked)] for i in range(48)]
    assert all(
        keys is layer.keys and torch.equal(keys, kept) for layer, (keys, kept) in zip(seen.cache.layers, before, strict=True)
    )


def test_another_image_is_an_error_and_a_failed_reply_leaves_the_cache_as_it_was(model, load, processor):
    inputs = encode(processor, REQUESTS[:1], IMAGES[:1])
    seen = model.shiftdc_image(**inputs)
    expected = model.generate(**inputs, **GREEDY, shiftdc_image=seen)
    with pytest.raises(ValueError, match="is of other images"):
        model.generate(**encode(processor, REQUESTS[:1], IMAGES[1:2]), **GREEDY, shiftdc_image=seen)
    with pytest.raises(ValueError, match="is of 1 prompts, found 2"):
        model.generate(**encode(processor, REQUESTS[:2], IMAGES[:2]), **GREEDY, shiftdc_image=seen)

    def fail(ids, scores):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        model.generate(**inputs, **GREEDY, shiftdc_image=seen, logits_processor=LogitsProcessorList([fail]))
    assert torch.equal(model.generate(**inputs, **GREEDY, shiftdc_image=seen), expected)
    without_pixels = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with pytest.raises(ValueError, match="no image was given"):
        model.generate(**without_pixels, **GREEDY, num_beams=2, shiftdc_image=seen)
    with pytest.raises(ValueError, match="reference: caption"):
        load(reference="text").shiftdc_image(**inputs)


@pytest.mark.parametrize(
    ("options", "given", "takes"),
    [
        ({}, (), True),
        ({"do_sample": True}, ("streamer", "logits_processor", "tokenizer"), True),
        ({"num_beams": 2}, (), False),
        ({"do_sample": True, "num_return_sequences": 2}, (), False),
        ({"use_cache": False}, (), False),
        ({"cache_implementation": "static"}, (), False),
        ({"prefill_chunk_size": 7}, (), False),
        ({"guidance_scale": 1.5}, (), False),  # a second prompt without a prefix
        ({"return_dict_in_generate": True}, (), False),
        ({"output_attentions": True}, (), False),
        ({"token_healing": True}, (), False),
        ({}, ("assistant_model",), False),
    ],
)
def test_which_calls_go_on_from_a_filled_cache(options, given, takes):
    assert takes_cache(GenerationConfig(max_new_tokens=3, **options), given) is takes


@pytest.mark.parametrize(
    ("options", "given", "reads"),
    [
        ({}, (), False),
        ({}, ("tokenizer",), False),
        ({"max_new_tokens": None, "max_length": 50}, (), True),
        ({"min_length": 4}, (), True),
        ({"repetition_penalty": 1.2}, (), True),
        ({"encoder_repetition_penalty": 0.9}, (), True),
        ({"no_repeat_ngram_size": 2}, (), True),
        ({"encoder_no_repeat_ngram_size": 2}, (), True),
        ({}, ("logits_processor",), True),
        ({}, ("stopping_criteria",), True),
    ],
)
def test_which_calls_see_padding(options, given, reads):
    assert reads_padding(GenerationConfig(**{"max_new_tokens": 3, **options}), given) is reads


@pytest.mark.parametrize(
    ("shares", "implementation", "keeps"), [(True, None, True), (False, None, False), (True, "static", False)]
)
def test_where_a_cache_is_kept_at_all(shares, implementation, keeps):
    config = SimpleNamespace(cache_implementation=implementation)
    model = SimpleNamespace(_shiftdc_traits=SimpleNamespace(shares_prefix=shares), generation_config=config)
    assert ShiftDCMixin._shiftdc_keeps_cache(model) is keeps


def test_a_prefix_stands_in_the_same_columns_whatever_follows():
    prefixes, device = [[1, 2, 3], [4]], torch.device("cpu")
    ids, mask = align_prefixes(prefixes, [[5], [6, 7]], 0, device)
    assert ids.tolist() == [[1, 2, 3, 0, 5], [0, 0, 4, 6, 7]]
    assert mask.tolist() == [[1, 1, 1, 0, 1], [0, 0, 1, 1, 1]]


def test_a_wording_without_a_slot_takes_the_requests_place(load, processor):
    model = load(caption_style="describe")
    ids = encode(processor, REQUESTS[:1], IMAGES[:1])["input_ids"][0].tolist()
    expected = encode(processor, [load_recipe("llava").prompts.describe], IMAGES[:1])["input_ids"][0].tolist()
    assert model.shiftdc_composer.caption_prompt(ids) == expected


def test_the_demo_model_answers_the_same(tmp_path):
    demo = export(make_plan("demo", ExportOptions.of(output=tmp_path / "demo", caption_style="naming")))
    vlm = open_export(demo.plan.output)
    chosen = [i for cell in ("harmful_image", "harmless_text") for i in items("development", cell, 4)]
    for size in (1, 4):
        batch = chosen[:size]
        inputs = vlm.encode([i.request for i in batch], [image(i) for i in batch])
        found, read = towers(vlm.model, lambda: vlm.model.generate(**inputs, max_new_tokens=16))  # noqa: B023
        assert read == 1
        assert torch.equal(found, apart(vlm.model, lambda: vlm.model.generate(**inputs, max_new_tokens=16)))  # noqa: B023
    assert max(map(len, vlm.model.shiftdc_captions(**inputs))) == 3
