"""Every family goes the whole way: directions, bake, verify, reload with transformers alone, calibrated generation."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import transformers
from conftest import ALL_REQUESTS
from family_prompts import GREEDY, ROWS, encode
from in_memory import with_traits
from naive import Naive
from tiny import picture
from tiny_families import EOS, FAMILIES, PAD, tiny_family
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as STOCK

from exporter.errors import InputError
from exporter.modeling.configuration_shiftdc import ShiftDCSettings
from exporter.models.prompt_check import check_prompts
from exporter.models.prompt_frame import prompt_frame
from exporter.models.recipe import load_recipe
from exporter.models.vlm import VLM, composes_text
from exporter.pipeline.export import export
from exporter.pipeline.plan import ExportOptions, make_plan

CAPTION_TOKENS = 6
#: The axis that counts residual streams in what a decoder layer puts out.
STREAMS = {"gemma3n": 0, "glm5_next": 2}
TEXT = "{q} Image Caption: {caption}"


class FamilyNaive(Naive):
    """naive.py on another architecture; the processor is the only one to know how a prompt is written."""

    def __init__(self, model, processor, tiny):
        self.model, self.processor, self.text_prompt = model, processor, TEXT
        self.layers = model.get_submodule(tiny.layers)
        self.tiny, self.stream_axis = tiny, STREAMS.get(model.config.model_type)

    def ids(self, request, image=None):
        return encode(self.processor, [(request, image)])

    def forward(self, inputs):
        alone = "pixel_values" not in inputs and hasattr(self.model, "qformer")  # the outer model demands an image
        (self.model.language_model if alone else self.model)(**inputs)


def new_tokens(out, inputs):
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def at_end(model, inputs):
    """What tells forward() where prompts end, for templates without a generation prompt (InstructBLIP's)."""
    if model.shiftdc_composer.has_prompt_end:
        return {}
    rows = (inputs["input_ids"] == model.config.image_token_id).any(-1)
    return {"shiftdc_position": torch.where(rows, inputs["input_ids"].shape[1] - 1, -1)}


def until_end(tokens):
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


@pytest.fixture(scope="module", params=list(FAMILIES))
def tiny(request):
    return tiny_family(request.param)


@pytest.fixture(scope="module")
def base_folder(tiny, tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def layers(tiny):
    """The calibrated ones."""
    return [tiny.first, tiny.first + 1]


@pytest.fixture(scope="module")
def exported(base_folder, calibration_file, tmp_path_factory, layers):
    """Verified: export() raises if the worker finds anything."""
    plan = make_plan(
        str(base_folder), ExportOptions.of(output=tmp_path_factory.mktemp("export") / "calibrated", gate="two-sided",
        layers=f"{layers[0]}-{layers[1]}",
        calibration=str(calibration_file), caption_max_new_tokens=CAPTION_TOKENS),
    )  # fmt: skip
    return export(plan)


@pytest.fixture(scope="module")
def folder(exported):
    return exported.plan.output


@pytest.fixture(scope="module")
def loaded(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)


@pytest.fixture
def model(loaded):
    model = loaded[0].eval()
    settings = dict(model.config.shiftdc)
    yield model
    model.config.shiftdc = settings


@pytest.fixture(scope="module")
def processor(folder, tiny):
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    processor.chat_template = load_recipe(tiny.recipe).chat_template or processor.chat_template
    # torchvision's classes take the place of Pillow's where it is installed, and Mllama's fails on batches with text rows
    processor.image_processor = tiny.processor.image_processor
    return processor


@pytest.fixture(scope="module")
def base(base_folder):
    return AutoModelForImageTextToText.from_pretrained(base_folder).eval()


@pytest.fixture(scope="module")
def vlm(base, processor, tiny):
    return VLM(base, processor, composed_text=composes_text(processor, load_recipe(tiny.recipe)))


@pytest.fixture(scope="module")
def naive(base, processor, tiny):
    return FamilyNaive(base, processor, tiny)


@pytest.fixture
def directions(model, layers):
    return {layer: c.direction for layer, c in zip(layers, model.shiftdc_corrections, strict=True)}


def naive_reference(naive, directions, row, kind, blank=0.0, pixels=("pixel_values",)):
    """Coordinates of the counterpart, which the chat template writes from texts."""
    request, image = row
    if kind == "blank":
        inputs = naive.ids(request, image)
        for name in pixels:
            if name in inputs:
                inputs[name] = torch.full_like(inputs[name], blank)
    elif kind == "text":
        inputs = naive.ids(request)
    else:
        inputs = naive.ids(TEXT.format(q=request, caption=naive_caption(naive, request, image)))
    activations = naive.activations(inputs)
    return torch.stack([activations[i] @ directions[i] for i in directions])


def naive_caption(naive, request, image):
    asked = naive.ids(load_recipe(naive.tiny.recipe).wording.caption_request(request), image)
    # the Q-Former reads the user's request, also while the model writes the caption
    asked = {**asked, **{k: v for k, v in naive.ids(request, image).items() if k.startswith("qformer")}}
    out = naive.model.generate(**asked, max_new_tokens=CAPTION_TOKENS, do_sample=False)[0, asked["input_ids"].shape[1] :]
    return naive.processor.tokenizer.decode([t for t in out.tolist() if t not in (EOS, PAD)], skip_special_tokens=True).strip()


def naive_reply(naive, directions, row, **calibration):
    inputs = naive.ids(*row)
    with naive.calibrated(list(directions), directions, inputs["input_ids"].shape[1], **calibration):
        return new_tokens(naive.model.generate(**inputs, **GREEDY), inputs)[0]


def test_nothing_is_missing_or_left_over(loaded):
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not loaded[1][kind], kind
    assert type(loaded[0]).__name__.startswith("ShiftDC")


def test_the_directions_are_those_of_the_method(naive, directions, calibration_file):
    expected = naive.directions([json.loads(line) for line in calibration_file.read_text().splitlines()])
    for layer, direction in directions.items():
        assert torch.dot(direction.double(), expected[layer]).item() == pytest.approx(1, abs=1e-6)


def test_composed_prompts_are_the_templates_own(vlm, exported):
    frame = prompt_frame(vlm, exported.plan.recipe.wording)
    assert frame.as_json() == json.loads((exported.plan.output / "config.json").read_text())["shiftdc"]["prompt"]
    found = check_prompts(vlm.framed(frame), frame, ALL_REQUESTS)
    assert found.exact and found.compared >= 400, str(found)


@pytest.mark.parametrize("shape", [(90, 28), (28, 120), (8, 8)])
def test_images_cut_into_other_tiles_leave_no_trace(vlm, exported, shape):
    composer = vlm.composing(prompt_frame(vlm, exported.plan.recipe.wording))
    ids, request = vlm.token_ids("How? 7", picture(2, *shape)), exported.plan.recipe.wording.caption_request("How? 7")
    assert composer.text_prompt(ids) == vlm.token_ids("How? 7")
    assert composer.caption_prompt(ids) == vlm.token_ids(request, picture(2, *shape))


def test_switched_off_is_the_base_model_bit_for_bit(model, base, processor):
    inputs = encode(processor, [*ROWS, ("Hello", None)])
    with torch.no_grad():
        assert torch.equal(model(**inputs, shiftdc=False).logits, base(**inputs).logits)
        assert not torch.equal(model(**inputs, **at_end(model, inputs)).logits, base(**inputs).logits)
    assert torch.equal(model.generate(**inputs, **GREEDY, shiftdc=False), base.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("rule", ["sequential", "precomputed"])
@pytest.mark.parametrize("kind", ["caption", "text", "blank"])
def test_tokens_equal_the_naive_implementation(model, naive, directions, processor, kind, rule):
    model.config.shiftdc = {**model.config.shiftdc, "reference": kind, "rule": rule}
    traits = model.config.shiftdc["traits"]
    changed = False
    for row in ROWS:
        inputs = encode(processor, [row])
        reference = naive_reference(naive, directions, row, kind, traits["blank_pixel"], traits["pixel_inputs"])
        assert torch.allclose(model.shiftdc_reference(**inputs)[0], reference, atol=1e-4)
        amounts = None
        if rule == "precomputed":
            clean = naive.activations(inputs)
            amounts = torch.stack([clean[i] @ directions[i] for i in directions]) - reference
        expected = naive_reply(naive, directions, row, reference=reference, amounts=amounts)
        assert new_tokens(model.generate(**inputs, **GREEDY), inputs)[0] == expected
        with (
            torch.no_grad(),
            naive.calibrated(list(directions), directions, inputs["input_ids"].shape[1], reference=reference, amounts=amounts),
        ):
            logits = naive.model(**inputs).logits
        with torch.no_grad():
            found = model(**inputs, **at_end(model, inputs), shiftdc_reference=reference[None]).logits
            plain = model(**inputs, shiftdc=False).logits
        assert torch.allclose(found, logits, atol=1e-4)
        changed |= not torch.allclose(found, plain, atol=1e-3)
    assert changed


@pytest.mark.parametrize("kind", ["caption", "blank"])
def test_inputs_as_long_as_the_prompt_are_those_of_each_prompt(model, processor, kind, tiny):
    """Token types (Gemma 3, PaliGemma, Qwen) and the cross-attention mask (Mllama) of composed prompts are made anew."""
    model.config.shiftdc = {**model.config.shiftdc, "reference": kind, "rule": "precomputed"}
    inputs = encode(processor, [("Hello", None), *ROWS])
    names = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids", "cross_attention_mask")
    seen = []

    def look(module, args, kwargs):
        ids = kwargs.get("input_ids")
        if ids is not None and (ids == model.config.image_token_id).any():
            seen.append((ids, {k: kwargs[k] for k in names if kwargs.get(k) is not None}))

    handle = getattr(model, "model", model).register_forward_pre_hook(look, with_kwargs=True)
    try:
        model.generate(**inputs, **GREEDY)
        corrected = len(seen)
        model.generate(**inputs, **GREEDY, shiftdc=False)  # some outer classes keep them for themselves
    finally:
        handle.remove()
    expected, seen = sorted(seen[-1][1]) if seen else [], seen[:corrected]
    assert len(seen) == 3 or not expected  # caption or blank, clean, reply
    for ids, given in seen:
        assert sorted(given) == sorted(expected)
        for name, made in tiny.composed(ids, given).items():
            assert torch.equal(given[name], made)


def test_static_subtracts_the_baked_shift(model, naive, directions, processor):
    model.config.shiftdc = {**model.config.shiftdc, "reference": "static"}
    amounts = [c.shift for c in model.shiftdc_corrections]
    for row in ROWS:
        inputs = encode(processor, [row])
        assert new_tokens(model.generate(**inputs, **GREEDY), inputs)[0] == naive_reply(naive, directions, row, amounts=amounts)


def stock_batches_are_singles(base, processor, rows, plain):
    """MiniMax's are not (a TODO of its code); text rows of a mixed batch of Mllama's pass its cross-attention layers."""
    singles = [encode(processor, [row]) for row in rows if row[1] is not None]
    batched = [tokens for row, tokens in zip(rows, plain, strict=True) if row[1] is not None]
    alone = [new_tokens(base.generate(**one, **GREEDY), one)[0] for one in singles]
    return [until_end(t) for t in batched] == [until_end(t) for t in alone]


@pytest.mark.parametrize("kind", ["caption", "text", "blank", "static"])
def test_a_mixed_left_padded_batch_equals_single_prompts(model, base, processor, kind):
    model.config.shiftdc = {**model.config.shiftdc, "reference": kind}
    rows = [("Hello", None), *ROWS, ("Who are you, and how many?", None)]
    inputs = encode(processor, rows)
    batch = new_tokens(model.generate(**inputs, **GREEDY), inputs)
    plain = new_tokens(base.generate(**inputs, **GREEDY), inputs)
    if not stock_batches_are_singles(base, processor, rows, plain):
        pytest.skip("the stock model's left-padded batches are not its single prompts")
    for row, tokens, uncalibrated in zip(rows, batch, plain, strict=True):
        if row[1] is None:  # stock Mllama's text rows depend on the batch: they pass its cross-attention layers in a mixed one
            assert tokens == uncalibrated
            continue
        single = encode(processor, [row])
        assert until_end(tokens) == until_end(new_tokens(model.generate(**single, **GREEDY), single)[0])


def test_text_rows_are_untouched_bit_for_bit(model, base, processor):
    inputs = encode(processor, [("Hello", None), *ROWS, ("How are you?", None)])
    with torch.no_grad():
        found, plain = model(**inputs, **at_end(model, inputs)).logits, base(**inputs).logits
    assert torch.equal(found[[0, 3]], plain[[0, 3]])
    if model.config.model_type != "shiftdc_paligemma":  # whose prompt tokens see the last one
        assert torch.equal(found[1:3, :-1], plain[1:3, :-1])  # and of image rows only the last prompt token moved
    assert not torch.equal(found[1, -1], plain[1, -1]) and not torch.equal(found[2, -1], plain[2, -1])
    text = encode(processor, [("Hello", None), ("How are you?", None)])
    plain = base.language_model if hasattr(base, "qformer") else base  # the outer model demands an image
    text = {k: v for k, v in text.items() if not k.startswith("qformer")}
    assert torch.equal(model.generate(**text, **GREEDY), plain.generate(**text, **GREEDY))


def test_no_uncalibrated_model_comes_out(exported, base_folder, folder):
    """The stock class and its config, and Auto classes without trust; without the guard the stock class would load."""
    name = STOCK[exported.plan.recipe.family]
    stock = getattr(transformers, name)
    for cls in (stock, stock.config_class):
        with pytest.raises(Exception, match="calibrated by ShiftDC"):
            cls.from_pretrained(folder)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False)
    assert isinstance(stock.from_pretrained(base_folder), stock)


def test_save_pretrained_round_trip(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    again, report = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    inputs = encode(processor, ROWS)
    assert torch.equal(again.eval().generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))


def test_a_new_lora_trains_on_top(folder, processor, tiny):
    from peft import LoraConfig, get_peft_model

    fresh = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    directions = [c.direction.clone() for c in fresh.shiftdc_corrections]
    parts = rf".*{tiny.layers.split('.')[-2]}.*(q_proj|v_proj|q_a_proj|kv_a_proj\w*|in_proj\w*|wq|wv|query_key_value|fused_qkv)"
    tuned = get_peft_model(fresh, LoraConfig(r=2, target_modules=parts, init_lora_weights=False))
    inputs = encode(processor, ROWS)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    factors = [p for p in tuned.parameters() if p.requires_grad]
    tuned(**inputs, labels=labels, shiftdc=False).loss.backward()
    if not all(p.grad is None or p.grad.isfinite().all() for p in factors):
        pytest.skip("the stock model's own gradients are not finite")
    tuned.zero_grad()
    before = tuned(**inputs, labels=labels).loss
    before.backward()
    assert factors and all(p.grad is not None for p in factors) and any(p.grad.abs().sum() > 0 for p in factors)
    norm = sum(p.grad.square().sum() for p in factors)
    torch.optim.SGD(factors, lr=(1e-3 / norm).item()).step()
    with torch.no_grad():
        assert tuned(**inputs, labels=labels).loss < before
        assert not torch.equal(tuned(**inputs, **at_end(fresh, inputs)).logits, tuned(**inputs, shiftdc=False).logits)
    assert all(torch.equal(c.direction, d) for c, d in zip(fresh.shiftdc_corrections, directions, strict=True))


#: Whether the beginning of a prompt can be shared, of families where it is known; elsewhere what was measured counts.
SHARED = {
    **dict.fromkeys(("idefics3", "internvl", "llava", "llava_next", "llava_onevision", "mistral3", "smolvlm"), True),
    **dict.fromkeys(("aya_vision", "blip-2", "gemma3", "instructblip", "mllama", "paligemma"), False),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), False),
}


def readings(model, run):
    """What `run` returns, and how often the vision tower ran meanwhile."""
    names = (
        "vision_tower",
        "vision_model",
        "visual",
        "vision_encoder",
        "image_tower",
        "vqmodel",
        "vision_embed_tokens",
        "audio_vision_tower",
    )
    tower = next((m for n, m in model.named_modules() if n.split(".")[-1] in names), None)
    tower = tower or next(m for m in model.modules() if "Vision" in type(m).__name__ or "Tower" in type(m).__name__)
    calls = []
    handle = tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        return run(), len(calls)
    finally:
        handle.remove()


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[1:], [*ROWS, ("A", ROWS[0][1]), ("Who made it, and " * 3, ROWS[0][1])]])
def test_one_reading_of_the_image_gives_the_same_tokens(model, processor, rows):
    family, shared = model.config.model_type.removeprefix("shiftdc_"), model.config.shiftdc["traits"]["shares_prefix"]
    inputs = encode(processor, rows)
    found, once = readings(model, lambda: model.generate(**inputs, **GREEDY))
    model.config.shiftdc = with_traits(model.config.shiftdc, shares_prefix=False)
    expected, twice = readings(model, lambda: model.generate(**inputs, **GREEDY))
    assert [until_end(t) for t in new_tokens(found, inputs)] == [until_end(t) for t in new_tokens(expected, inputs)]
    assert torch.equal(found[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    if SHARED.get(family, shared):
        assert twice == 2 * once  # some towers see an image whole and in crops
    else:
        assert once == twice


def tokens_of_pictures(model):
    traits = model.config.shiftdc["traits"]
    return [t for t in (traits["image_token_id"], traits["video_token_id"]) if t is not None]


def second_turn(processor, ids):
    """(new ids, whole ids): one more request behind `ids`, in whatever words; prompts of one turn have no other form."""
    new = processor.tokenizer("Why is it so?", add_special_tokens=False, return_tensors="pt")["input_ids"]
    return new, torch.cat([ids, new], dim=1)


def test_a_conversation_in_a_cache_is_the_one_without(model, processor, tiny):
    inputs = encode(processor, ROWS[:1])
    cache = DynamicCache(config=model.config.get_text_config())
    named = {**GREEDY, "suppress_tokens": tokens_of_pictures(model)}  # which a random model may write
    first = model.generate(**inputs, **named, past_key_values=cache)
    new, whole = second_turn(processor, first)
    mask = torch.ones_like(whole)
    if hasattr(model, "qformer"):
        with pytest.raises(ValueError, match="does not go on from past_key_values"):
            model.generate(input_ids=new, attention_mask=mask, past_key_values=cache, **GREEDY)
        return
    given = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    given |= model.shiftdc_token_inputs(ShiftDCSettings.of(model.config).traits, whole, given)
    expected = model.generate(input_ids=whole, attention_mask=mask, **given, **named)
    found = model.generate(input_ids=new, attention_mask=mask, past_key_values=cache, **named)
    assert found[:, new.shape[1] :].tolist() == expected[:, whole.shape[1] :].tolist()


def test_two_conversations_in_a_cache_are_those_without(model, processor):
    if hasattr(model, "qformer"):
        pytest.skip("no conversation goes on in a cache")
    inputs = encode(processor, ROWS)
    cache = DynamicCache(config=model.config.get_text_config())
    named = {**GREEDY, "min_new_tokens": GREEDY["max_new_tokens"], "suppress_tokens": tokens_of_pictures(model)}
    first = model.generate(**inputs, **named, past_key_values=cache)
    new = second_turn(processor, first[:1])[0].expand(2, -1)
    whole = torch.cat([first, new], dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, whole.shape[1] - inputs["input_ids"].shape[1]), value=1)
    given = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    given |= model.shiftdc_token_inputs(ShiftDCSettings.of(model.config).traits, whole, given)
    expected = model.generate(input_ids=whole, attention_mask=mask, **given, **named)
    found = model.generate(input_ids=new, attention_mask=mask, past_key_values=cache, **named)
    assert found[:, new.shape[1] :].tolist() == expected[:, whole.shape[1] :].tolist()


def works(base, inputs, **options):
    """Whether the stock model can: Llama 4's cannot search with beams, ERNIE's not do without a cache."""
    if hasattr(base, "qformer"):  # it demands an image for every row
        return True
    try:
        base.generate(**inputs, **options)
    except (ValueError, RuntimeError, IndexError, TypeError):
        return False
    return True


def test_padding_on_the_right_is_as_padding_on_the_left(model, base, processor):
    left = encode(processor, [ROWS[0], ("Hello", None), ROWS[1]])
    order = torch.sort(left["attention_mask"], dim=1, descending=True, stable=True).indices
    right = dict(left)
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"):
        if name in left:
            right[name] = left[name].gather(1, order)
    if "cross_attention_mask" in left:
        index = order[..., None, None].expand(-1, -1, *left["cross_attention_mask"].shape[2:])
        right["cross_attention_mask"] = left["cross_attention_mask"].gather(1, index)
    named = {**GREEDY, "suppress_tokens": tokens_of_pictures(model)}  # which a random model may write
    for options in ({}, {"use_cache": False}, {"num_beams": 2}):
        if options and not works(base, left, **named, **options):
            continue
        found, expected = (model.generate(**given, **named, **options) for given in (right, left))
        assert new_tokens(found, right) == new_tokens(expected, left)


def test_a_generation_config_by_position_is_taken(model, processor):
    inputs = dict(encode(processor, ROWS[:1]))
    config = GenerationConfig(max_new_tokens=2, min_new_tokens=2, pad_token_id=PAD, eos_token_id=EOS)
    expected = model.generate(**inputs, generation_config=config)
    assert expected.shape[1] == inputs["input_ids"].shape[1] + 2
    assert torch.equal(model.generate(None, config, **inputs), expected)
    if hasattr(model, "query_tokens"):  # BLIP's first argument are the pixels
        pixels = inputs.pop("pixel_values")
        assert torch.equal(model.generate(pixels, generation_config=config, **inputs), expected)
        text = {k: v for k, v in encode(processor, [("Hello", None)]).items() if not k.startswith("qformer")}
        assert model.generate(None, config, **text).shape[1] == text["input_ids"].shape[1] + 2


def test_pickled_models_stay_calibrated(model, processor):
    inputs = encode(processor, ROWS[:1])
    expected = model.generate(**inputs, **GREEDY)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(again.generate(**inputs, **GREEDY), expected)


def test_an_image_without_its_tokens_is_refused(model, processor):
    inputs = dict(encode(processor, ROWS[:1]))
    image, ids = model.config.image_token_id, inputs["input_ids"]
    hidden = {**inputs, "input_ids": torch.where(ids == image, ids[0, -1], ids)}
    for given in (hidden, {k: v for k, v in hidden.items() if k != "cross_attention_mask"}):
        with pytest.raises(ValueError, match=r"no image token in input_ids .*shiftdc=False"):
            model.generate(**given, **GREEDY)
        with pytest.raises(ValueError, match=r"no image token in input_ids .*shiftdc=False"):
            model(**given)


def test_layers_that_are_told_nothing_refuse(model, processor):
    inputs = encode(processor, ROWS[:1])
    with pytest.raises(ValueError, match=r"shiftdc=False"):
        model.get_decoder()(input_ids=inputs["input_ids"])
    model.get_decoder()(input_ids=inputs["input_ids"], shiftdc=False)


def test_prompts_and_answers_are_corrected_where_the_prompt_ends(model, processor):
    inputs = encode(processor, ROWS[:1])
    _, whole = second_turn(processor, inputs["input_ids"])
    length = inputs["input_ids"].shape[1]
    given = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    given |= model.shiftdc_token_inputs(ShiftDCSettings.of(model.config).traits, whole, given)
    row = {"input_ids": whole, "attention_mask": torch.ones_like(whole), **given}
    told = {}
    if not model.shiftdc_composer.has_prompt_end:  # then labels say it, or nobody
        with pytest.raises(ValueError, match=r"shiftdc_position=.*shiftdc=False"):
            model(**row)
        told = {"labels": torch.where(torch.arange(whole.shape[1]) < length, -100, whole)}
    with torch.no_grad():
        found, expected = model(**row, **told), model(**row, shiftdc_position=torch.tensor([length - 1]))
        assert torch.equal(found.logits, expected.logits)
        assert not torch.equal(found.logits, model(**row, shiftdc=False).logits)


def edited(folder, file, **changes):
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**values, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"model_type": "t5"}}, "encoder-decoder"),
        ({"image_token_index": None}, "token that stands for an image cannot be told"),
    ],
)
def test_blip_checkpoints_that_cannot_be_calibrated_are_refused(tmp_path, changes, message):
    folder = edited(tiny_family("blip_2").save(tmp_path / "base"), "config.json", **changes)
    with pytest.raises(InputError, match=message):
        make_plan(str(folder), ExportOptions.of(output=tmp_path / "out"))


def test_pan_and_scan_is_refused(tmp_path, calibration_file):
    folder = tiny_family("gemma3").save(tmp_path / "base")
    file = next(f.name for f in (folder / "processor_config.json", folder / "preprocessor_config.json") if f.exists())
    values = json.loads((folder / file).read_text())
    values.get("image_processor", values)["do_pan_and_scan"] = True
    (folder / file).write_text(json.dumps(values))
    with pytest.raises(InputError, match="do_pan_and_scan is on"):
        export(make_plan(str(folder), ExportOptions.of(output=tmp_path / "out", calibration=str(calibration_file), layers="1-2")))
    assert not (tmp_path / "out").exists()


def test_cross_attention_layers_are_left_out(tmp_path, calibration_file):
    """Prompts without an image skip them."""
    folder = tiny_family("mllama").save(tmp_path / "base")
    plan = make_plan(str(folder), ExportOptions.of(output=tmp_path / "out", calibration=str(calibration_file), layers="0-2"))
    layers = export(plan).report.layers
    assert layers.chosen == (0, 2)
    assert "without an image" in layers.left_out["1"]
