"""The exported model against the base model and against the naive implementation, token for token, in every mode."""

from __future__ import annotations

import json

import pytest
import torch
from naive import Naive
from tiny import encode, picture, save_tiny_llava, tiny_processor
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, pipeline

CAPTION = "Based on the given Request, describe the image. Request: {q}"
TEXT = "{q} Image Caption: {caption}"
LAYERS = [1, 2]
GREEDY = {"max_new_tokens": 6, "do_sample": False}
REQUESTS = ["How do I build this?", "Which is it, and who needs one?"]
IMAGES = [picture(0), picture(1)]


@pytest.fixture(scope="module")
def base(base_folder):
    return LlavaForConditionalGeneration.from_pretrained(base_folder).eval()


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def naive(base, processor):
    return Naive(base, processor, CAPTION, TEXT)


@pytest.fixture(scope="module")
def model(load):
    return load()


@pytest.fixture(scope="module")
def exported(make_export):
    """As users load it."""
    folder = make_export(gate="two-sided", caption_max_new_tokens=8).plan.output
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def directions(model):
    return {layer: c.direction for layer, c in zip(LAYERS, model.shiftdc_corrections, strict=True)}


def new_tokens(out, inputs):
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def first_logits(model, inputs, **options):
    """Logits of the first new token, [batch, vocabulary], as generate() computes them."""
    out = model.generate(**inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True, **options)
    return out.logits[0]


def naive_reference(naive, directions, request, image, kind="caption"):
    """Coordinates of the counterpart, which the chat template writes from texts."""
    if kind == "blank":
        inputs = naive.ids(request, image)
        inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
    elif kind == "text":
        inputs = naive.ids(request)
    else:
        caption = naive.processor.tokenizer.decode(naive.caption(request, image, 8), skip_special_tokens=True).strip()
        inputs = naive.ids(naive.text_prompt.format(q=request, caption=caption))
    activations = naive.activations(inputs)
    return torch.stack([activations[i] @ directions[i] for i in LAYERS])


def naive_reply(
    naive, model, directions, request, image, kind="caption", one_sided=False, rule="sequential", strength=1.0, **options
):
    inputs = naive.ids(request, image)
    reference = naive_reference(naive, directions, request, image, kind)
    amounts = None
    if rule == "precomputed":
        clean = naive.activations(inputs)
        amounts = torch.stack([clean[i] @ directions[i] for i in LAYERS]) - reference
    length = inputs["input_ids"].shape[1]
    with naive.calibrated(
        LAYERS, directions, length, reference=reference, amounts=amounts, one_sided=one_sided, strength=strength
    ):
        return new_tokens(naive.model.generate(**inputs, **{**GREEDY, **options}), inputs)


def test_the_naive_implementation_changes_the_replies(naive, base, model, directions):
    """Otherwise the comparisons below would prove nothing."""
    for request, image in zip(REQUESTS, IMAGES, strict=True):
        inputs = naive.ids(request, image)
        plain = new_tokens(base.generate(**inputs, **GREEDY), inputs)
        assert naive_reply(naive, model, directions, request, image) != plain


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 7},
        {"num_beams": 3, "num_return_sequences": 2},
        {"max_new_tokens": 5, "min_new_tokens": 5},
    ],
    ids=lambda o: ",".join(o) or "greedy",
)
def test_a_batch_equals_the_naive_implementation_one_by_one(naive, model, directions, processor, options):
    inputs = encode(processor, [*REQUESTS, "Hello there"], [*IMAGES, None])
    found = new_tokens(model.generate(**inputs, **{**GREEDY, **options}), inputs)
    returned = options.get("num_return_sequences", 1)
    same = {k: v for k, v in options.items() if k not in ("cache_implementation", "prefill_chunk_size", "use_cache")}
    expected = [row for r, i in zip(REQUESTS, IMAGES, strict=True) for row in naive_reply(naive, model, directions, r, i, **same)]
    for got, want in zip(found[: 2 * returned], expected, strict=True):
        assert [t for t in got if t != 3][: len(want)] == [t for t in want if t != 3]
    text = encode(processor, ["Hello there"], [None])
    plain = new_tokens(naive.model.generate(**text, **{**GREEDY, **same}), text)
    assert found[2 * returned :] == plain


@pytest.mark.parametrize("kind", ["caption", "text", "blank"])
@pytest.mark.parametrize("rule", ["sequential", "precomputed"])
@pytest.mark.parametrize("gate", ["one-sided", "two-sided"])
def test_every_reference_rule_and_gate_equals_the_naive_implementation(load, naive, directions, processor, kind, rule, gate):
    model = load(reference=kind, rule=rule, gate=gate)
    inputs = encode(processor, REQUESTS, IMAGES)
    expected = [
        naive_reply(naive, model, directions, r, i, kind, gate == "one-sided", rule)[0]
        for r, i in zip(REQUESTS, IMAGES, strict=True)
    ]
    assert new_tokens(model.generate(**inputs, **GREEDY), inputs) == expected


@pytest.mark.parametrize("gate", ["one-sided", "two-sided"])
def test_static_subtracts_the_baked_shift(load, naive, processor, gate):
    model = load(reference="static", gate=gate)
    directions = {layer: c.direction for layer, c in zip(LAYERS, model.shiftdc_corrections, strict=True)}
    amounts = [c.shift for c in model.shiftdc_corrections]
    for request, image in zip(REQUESTS, IMAGES, strict=True):
        inputs = naive.ids(request, image)
        with naive.calibrated(LAYERS, directions, inputs["input_ids"].shape[1], amounts=amounts, one_sided=gate == "one-sided"):
            expected = naive.model(**inputs).logits[0, -1]
        with torch.no_grad():
            assert torch.allclose(model(**inputs).logits[0, -1], expected, atol=1e-5)
            generated = model.generate(
                **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        assert torch.allclose(generated.logits[0][0], expected, atol=1e-5)


def test_switched_off_is_the_base_model_bit_for_bit(model, base, processor):
    inputs = encode(processor, [*REQUESTS, "Hello"], [*IMAGES, None])
    with torch.no_grad():
        assert torch.equal(model(**inputs, shiftdc=False).logits, base(**inputs).logits)
        assert not torch.equal(model(**inputs).logits, base(**inputs).logits)
    for options in (GREEDY, {**GREEDY, "num_beams": 2}):
        assert torch.equal(model.generate(**inputs, **options, shiftdc=False), base.generate(**inputs, **options))


def test_strength_zero_is_the_base_model_bit_for_bit(load, base, processor):
    inputs = encode(processor, REQUESTS, IMAGES)
    model = load(strength=0.0)
    assert torch.equal(model.generate(**inputs, **GREEDY), base.generate(**inputs, **GREEDY))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)


def test_text_rows_of_a_mixed_batch_are_untouched_bit_for_bit(model, base, processor):
    inputs = encode(processor, ["Hello", REQUESTS[0], "How are you?"], [None, IMAGES[0], None])
    with torch.no_grad():
        found, plain = model(**inputs).logits, base(**inputs).logits
    assert torch.equal(found[[0, 2]], plain[[0, 2]])
    assert not torch.equal(found[1, -1], plain[1, -1])
    assert torch.equal(found[1, :-1], plain[1, :-1])  # and of the image row only the last prompt token moved


def test_sampling_draws_from_the_calibrated_distribution(model, naive, directions):
    inputs = naive.ids(REQUESTS[0], IMAGES[0])
    torch.manual_seed(3)
    found = new_tokens(model.generate(**inputs, max_new_tokens=6, do_sample=True, temperature=0.7), inputs)
    reference = naive_reference(naive, directions, REQUESTS[0], IMAGES[0])
    torch.manual_seed(3)
    with naive.calibrated(LAYERS, directions, inputs["input_ids"].shape[1], reference=reference):
        expected = new_tokens(naive.model.generate(**inputs, max_new_tokens=6, do_sample=True, temperature=0.7), inputs)
    assert found == expected


@pytest.mark.parametrize("request_text", ["one two three one two three", *REQUESTS])
def test_prompt_lookup_gives_the_greedy_tokens(model, naive, directions, request_text):
    """One candidate at a time: with two, transformers itself looks up the image token behind "USER: " and fails on it."""
    inputs = naive.ids(request_text, IMAGES[0])
    found = new_tokens(model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=1), inputs)
    assert found == naive_reply(naive, model, directions, request_text, IMAGES[0])


def test_given_reference_and_captions(model, processor):
    inputs = encode(processor, [*REQUESTS, "Hello"], [*IMAGES, None])
    own = model.shiftdc_reference(**inputs)
    assert own.shape == (3, len(LAYERS))
    assert own[2].tolist() == [0, 0]  # no image
    captions = model.shiftdc_captions(**inputs)
    assert captions[0] and captions[2] == []
    assert torch.equal(model.shiftdc_reference(**inputs, captions=captions), own)
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, shiftdc_reference=own), expected)
    assert torch.equal(model.generate(**inputs, **GREEDY, shiftdc_captions=captions), expected)
    other = [[90, 91, 92] for _ in captions]
    assert not torch.equal(model.shiftdc_reference(**inputs, captions=other), own)


def test_forward_takes_a_reference_under_both_rules(load, naive, directions, processor):
    inputs = naive.ids(REQUESTS[0], IMAGES[0])
    length = inputs["input_ids"].shape[1]
    for rule in ("sequential", "precomputed"):
        model = load(rule=rule)
        reference = model.shiftdc_reference(**inputs)
        clean = naive.activations(inputs)
        amounts = torch.stack([clean[i] @ directions[i] for i in LAYERS]) - reference[0] if rule == "precomputed" else None
        with naive.calibrated(LAYERS, directions, length, reference=reference[0], amounts=amounts), torch.no_grad():
            expected = naive.model(**inputs).logits
        with torch.no_grad():
            assert torch.allclose(model(**inputs, shiftdc_reference=reference).logits, expected, atol=1e-5)


def test_one_sided_never_moves_an_input_toward_safe(load, processor):
    model = load(gate="one-sided")
    inputs = encode(processor, REQUESTS, IMAGES)
    coordinates = model.shiftdc_coordinates(**inputs)
    with torch.no_grad():
        above = model(**inputs, shiftdc_reference=coordinates + 10).logits
        assert torch.equal(above, model(**inputs, shiftdc=False).logits)
        assert not torch.equal(model(**inputs, shiftdc_reference=coordinates - 1).logits, above)


def test_padding_side_does_not_matter_to_forward(model, processor):
    rows = [encode(processor, [r], [i]) for r, i in zip(REQUESTS, IMAGES, strict=True)]
    singles = [model(**r).logits[0, -1] for r in rows]
    processor.tokenizer.padding_side = "right"
    try:
        batch = encode(processor, REQUESTS, IMAGES)
    finally:
        processor.tokenizer.padding_side = "left"
    assert batch["attention_mask"][:, -1].tolist() == [0, 1]
    logits = model(**batch).logits
    for row, single in enumerate(singles):
        last = int(batch["attention_mask"][row].sum()) - 1
        assert torch.allclose(logits[row, last], single, atol=1e-4)


def test_multi_turn_prompts_use_the_last_request(model, processor):
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A thing."}]},
        {"role": "user", "content": [{"type": "text", "text": "How do I build it?"}]},
    ]
    inputs = processor(
        text=processor.apply_chat_template(turns, add_generation_prompt=True), images=IMAGES[0], return_tensors="pt"
    )
    composer, decode = model.shiftdc_composer, processor.tokenizer.decode
    ids = inputs["input_ids"][0].tolist()
    assert composer.request(ids) == "How do I build it?"
    text = decode(composer.text_prompt(ids, processor.tokenizer(" a box", add_special_tokens=False)["input_ids"]))
    assert "<image>" not in text and "How do I build it? Image Caption: a box ASSISTANT:" in text
    caption = decode(composer.caption_prompt(ids))
    assert "<image>" in caption and "Request: How do I build it? ASSISTANT:" in caption
    assert not torch.equal(first_logits(model, inputs), first_logits(model, inputs, shiftdc=False))


def test_pipeline_answers_calibrated(make_export, exported, processor):
    folder = make_export(gate="two-sided", caption_max_new_tokens=8).plan.output
    pipe = pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
    message = [{"role": "user", "content": [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": REQUESTS[0]}]}]
    reply = pipe(text=message, generate_kwargs=GREEDY, return_full_text=False)[0]["generated_text"]
    inputs = encode(processor, REQUESTS[:1], IMAGES[:1])
    out = exported.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    assert reply.strip() == processor.decode(out, skip_special_tokens=True).strip()


def test_save_pretrained_round_trip(exported, processor, tmp_path, base_folder):
    exported.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True).eval()
    inputs = encode(processor, REQUESTS, IMAGES)
    assert torch.equal(again.generate(**inputs, **GREEDY), exported.generate(**inputs, **GREEDY))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["shiftdc"]["layers"] == LAYERS
    with pytest.raises(Exception, match="calibrated by ShiftDC"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_bfloat16_keeps_the_directions_in_float32(make_export, processor):
    folder = make_export(gate="two-sided", caption_max_new_tokens=8).plan.output
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16).eval()
    assert model.dtype == torch.bfloat16
    exact = [c.direction.clone() for c in model.shiftdc_corrections]
    model.to(torch.float16).to(torch.bfloat16)
    for correction, direction in zip(model.shiftdc_corrections, exact, strict=True):
        assert correction.direction.dtype == torch.float32
        assert torch.equal(correction.direction, direction)
    inputs = encode(processor, REQUESTS, IMAGES)
    assert not torch.equal(first_logits(model, inputs), first_logits(model, inputs, shiftdc=False))


@pytest.mark.parametrize("offload", [False, True])
def test_device_map(make_export, exported, processor, tmp_path, offload):
    folder = make_export(gate="two-sided", caption_max_new_tokens=8).plan.output
    rest = [
        "vision_tower",
        "multi_modal_projector",
        "language_model.embed_tokens",
        "language_model.norm",
        "language_model.rotary_emb",
    ]
    places = {"lm_head": "cpu"} | {f"model.{name}": "cpu" for name in rest}
    places |= {f"model.language_model.layers.{i}": "disk" if offload and i < 3 else "cpu" for i in range(4)}
    placed = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, device_map=places, offload_folder=tmp_path
    )
    inputs = encode(processor, REQUESTS, IMAGES)
    assert torch.equal(placed.generate(**inputs, **GREEDY), exported.generate(**inputs, **GREEDY))


def test_torch_compile_gives_the_same_tokens(make_export, processor, tmp_path):
    """Of a model of two decoder layers, because each is traced anew for each kind of step."""
    base = save_tiny_llava(tmp_path / "base", layers=2)
    folder = make_export(base, layers="0-1", gate="two-sided", caption_max_new_tokens=8).plan.output
    model, compiled = (AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval() for _ in range(2))
    compiled.forward = torch.compile(compiled.forward, backend="eager", dynamic=True)
    inputs = encode(processor, REQUESTS, IMAGES)
    expected = model.generate(**inputs, **GREEDY)
    assert not torch.equal(expected, model.generate(**inputs, **GREEDY, shiftdc=False))
    assert torch.equal(compiled.generate(**inputs, **GREEDY), expected)


def test_lora_trains_on_top_and_merges(make_export, processor, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    folder = make_export(gate="two-sided", caption_max_new_tokens=8).plan.output
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    before = [c.direction.clone() for c in model.shiftdc_corrections]
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*(q|v)_proj", init_lora_weights=False))
    inputs = encode(processor, REQUESTS, IMAGES)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    loss = tuned(**inputs, labels=labels).loss
    loss.backward()
    gradients = [p.grad for p in tuned.parameters() if p.requires_grad]
    assert all(g is not None for g in gradients) and any(g.abs().sum() > 0 for g in gradients)
    torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1).step()
    tuned.eval()
    expected = tuned.generate(**inputs, **GREEDY)
    assert not torch.equal(first_logits(tuned, inputs), first_logits(tuned, inputs, shiftdc=False))
    tuned.save_pretrained(tmp_path)
    fresh = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    again = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(again.generate(**inputs, **GREEDY), expected)
    merged = again.merge_and_unload()
    assert torch.equal(merged.generate(**inputs, **GREEDY), expected)
    for correction, direction in zip(merged.shiftdc_corrections, before, strict=True):
        assert torch.equal(correction.direction, direction)


def test_training_corrects_the_last_prompt_token_not_the_last_label(model, processor):
    inputs = encode(processor, REQUESTS[:1], IMAGES[:1])
    length = inputs["input_ids"].shape[1]
    answer = processor.tokenizer(" No, never.", add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    row = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = ids.clone()
    labels[:, :length] = -100
    with torch.no_grad():
        plain, found = model(**row, shiftdc=False).logits, model(**row, labels=labels).logits
    assert torch.equal(plain[0, : length - 1], found[0, : length - 1])
    assert not torch.equal(plain[0, length - 1], found[0, length - 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs_embeds": True}, "input_ids"),
        ({"assistant_model": True}, "assistant_model"),
        ({"shiftdc_reference": torch.zeros(1, 5)}, r"\[1, 2\]"),
        ({"shiftdc_reference": torch.full((1, 2), torch.nan)}, "finite"),
        ({"shiftdc_captions": [[5], [6]]}, "one caption per row"),
        ({"pixel_values": None}, "no image was given"),
    ],
    ids=["inputs_embeds", "assistant", "shape", "nan", "captions", "pixels"],
)
def test_what_cannot_be_calibrated_is_an_error(model, processor, arguments, message):
    inputs = dict(encode(processor, REQUESTS[:1], IMAGES[:1]))
    if "inputs_embeds" in arguments:
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        arguments = {"inputs_embeds": embeds}
    elif "assistant_model" in arguments:
        arguments = {"assistant_model": model}
    with pytest.raises(ValueError, match=message):
        model.generate(**{**inputs, **arguments}, **GREEDY)


def test_two_models_in_one_process_keep_their_own_settings(load, processor):
    inputs = encode(processor, REQUESTS[:1], IMAGES[:1])
    strong, off = load(), load(strength=0.0)
    expected = strong.generate(**inputs, **GREEDY)
    off.generate(**inputs, **GREEDY)
    assert torch.equal(strong.generate(**inputs, **GREEDY), expected)


def test_the_processor_loads_without_trust(make_export):
    folder = make_export(gate="two-sided", caption_max_new_tokens=8).plan.output
    assert type(AutoProcessor.from_pretrained(folder, trust_remote_code=False)).__name__ == "LlavaProcessor"


def test_what_only_reads_coordinates_ends_at_the_last_calibrated_layer(load, processor):
    model = load()
    inputs = encode(processor, ["How do I build this?"], [picture(0)])
    ran = []
    layers = model.get_submodule(model.config.shiftdc["traits"]["decoder_layers"])
    handles = [layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(layers)]
    try:
        found = model.shiftdc_coordinates(**inputs)
        assert ran == list(range(model.config.shiftdc["layers"][-1] + 1))
        assert len(ran) < len(layers)
        ran.clear()
        model.hf_device_map = {"": "cpu"}  # accelerate's hooks must see the whole pass
        assert torch.equal(model.shiftdc_coordinates(**inputs), found)
        assert ran == list(range(len(layers)))
    finally:
        vars(model).pop("hf_device_map", None)
        for handle in handles:
            handle.remove()
