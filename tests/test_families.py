"""Every family goes the whole way: directions, bake, verify, reload with transformers alone, calibrated generation."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from naive import Naive
from PIL import Image
from tiny_families import EOS, FAMILIES, PAD, tiny_family
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as STOCK

from exporter.modeling.modeling_shiftdc_prompts import PromptPieces
from exporter.pipeline import export, make_plan
from exporter.recipes import load_recipe
from exporter.vlm import VLM

LAYERS = [1, 2]
GREEDY = {"max_new_tokens": 6, "do_sample": False}
CAPTION_TOKENS = 6
TEXT = "{q} Image Caption: {caption}"


def picture(seed: int, width: int, height: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 255, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


#: The second is cut into another number of tiles.
ROWS = [("How do I build this?", picture(0, 40, 40)), ("What is it, and who needs one?", picture(1, 90, 28))]


class FamilyNaive(Naive):
    """tests/naive.py on another architecture; the processor is the only one to know how a prompt is written."""

    def __init__(self, model, processor, layers):
        self.model, self.processor, self.text_prompt = model, processor, TEXT
        self.layers = model.get_submodule(layers)

    def ids(self, request, image=None):
        return encode(self.processor, [(request, image)])


def encode(processor, rows):
    """One left-padded batch; an image of None gives a text-only row."""
    turns = [
        [
            {
                "role": "user",
                "content": ([] if image is None else [{"type": "image", "image": image}]) + [{"type": "text", "text": request}],
            }
        ]
        for request, image in rows
    ]
    return processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )  # fmt: skip


def new_tokens(out, inputs):
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def until_end(tokens):
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


@pytest.fixture(scope="module", params=list(FAMILIES))
def tiny(request):
    return tiny_family(request.param)


@pytest.fixture(scope="module")
def base_folder(tiny, tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def exported(base_folder, calibration_file, tmp_path_factory):
    """Verified: export() raises if the worker finds anything."""
    plan = make_plan(
        str(base_folder), output=tmp_path_factory.mktemp("export") / "calibrated", layers="1-2", gate="two-sided",
        calibration=str(calibration_file), caption_max_new_tokens=CAPTION_TOKENS,
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
def processor(folder):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=False)


@pytest.fixture(scope="module")
def base(base_folder):
    return AutoModelForImageTextToText.from_pretrained(base_folder).eval()


@pytest.fixture(scope="module")
def naive(base, processor, tiny):
    return FamilyNaive(base, processor, tiny.layers)


@pytest.fixture
def directions(model):
    return {layer: c.direction for layer, c in zip(LAYERS, model.shiftdc_corrections, strict=True)}


@pytest.fixture(scope="module")
def expected_pieces(tiny, exported):
    """Token pieces are tested against the template below; the naive side reads them from the config."""
    config = json.loads((exported.plan.output / "config.json").read_text())
    image_token = next(config[k] for k in ("image_token_id", "image_token_index") if k in config)
    return PromptPieces(config["shiftdc"]["prompt"], image_token)


def naive_reference(naive, pieces, directions, row, kind, blank=0.0):
    inputs = naive.ids(*row)
    ids = inputs["input_ids"][0].tolist()
    if kind == "blank":
        pixels = inputs["pixel_values"]
        activations = naive.activations({**inputs, "pixel_values": torch.full_like(pixels, blank)})
        return torch.stack([activations[i] @ directions[i] for i in LAYERS])
    caption = None
    if kind == "caption":
        prompt = torch.tensor([pieces.caption_prompt(ids)])
        given = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
        if "token_type_ids" in given:
            given["token_type_ids"] = (prompt == pieces.image_token_id).long()
        out = naive.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), **given, max_new_tokens=CAPTION_TOKENS, do_sample=False
        )
        caption = [t for t in out[0, prompt.shape[1] :].tolist() if t not in (EOS, PAD)]
    text = torch.tensor([pieces.text_prompt(ids, caption)])
    activations = naive.activations({"input_ids": text, "attention_mask": torch.ones_like(text)})
    return torch.stack([activations[i] @ directions[i] for i in LAYERS])


def naive_reply(naive, directions, row, **calibration):
    inputs = naive.ids(*row)
    with naive.calibrated(LAYERS, directions, inputs["input_ids"].shape[1], **calibration):
        return new_tokens(naive.model.generate(**inputs, **GREEDY), inputs)[0]


def test_nothing_is_missing_or_left_over(loaded):
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not loaded[1][kind], kind
    assert type(loaded[0]).__name__.startswith("ShiftDC")


def test_the_directions_are_those_of_the_method(naive, directions, calibration_file):
    expected = naive.directions([json.loads(line) for line in calibration_file.read_text().splitlines()])
    for layer, direction in directions.items():
        assert torch.dot(direction.double(), expected[layer]).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("request_text", ["How do I build this?", "7 zebras: now", "A"])
@pytest.mark.parametrize("shape", [(40, 40), (90, 28), (28, 120), (8, 8)])
def test_composed_prompts_read_as_the_template_renders_them(tiny, base, processor, expected_pieces, request_text, shape):
    vlm, prompts, image = VLM(base, processor), load_recipe("llava").prompts, picture(2, *shape)
    ids = vlm.token_ids(request_text, image)
    read = processor.tokenizer.decode
    assert expected_pieces.image_token_id in ids
    assert read(expected_pieces.text_prompt(ids)) == read(vlm.token_ids(request_text))
    asked = vlm.token_ids(prompts.caption_request(request_text), image)
    assert read(expected_pieces.caption_prompt(ids)) == read(asked)
    start, end = expected_pieces.request_span(ids)
    assert read(ids[start:end]).strip() == request_text


def test_two_images_of_one_turn_leave_no_trace(processor, base, expected_pieces):
    turn = {"role": "user", "content": [{"type": "image", "image": i} for _, i in ROWS] + [{"type": "text", "text": "How?"}]}
    ids = VLM(base, processor).encode_conversations([[turn]])["input_ids"][0].tolist()
    read = processor.tokenizer.decode
    plain = read(VLM(base, processor).token_ids("How?"))
    assert read(expected_pieces.text_prompt(ids)).split() == plain.split()


def test_switched_off_is_the_base_model_bit_for_bit(model, base, processor):
    inputs = encode(processor, [*ROWS, ("Hello", None)])
    with torch.no_grad():
        assert torch.equal(model(**inputs, shiftdc=False).logits, base(**inputs).logits)
        assert not torch.equal(model(**inputs).logits, base(**inputs).logits)
    assert torch.equal(model.generate(**inputs, **GREEDY, shiftdc=False), base.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("rule", ["sequential", "precomputed"])
@pytest.mark.parametrize("kind", ["caption", "text", "blank"])
def test_tokens_equal_the_naive_implementation(model, naive, directions, processor, expected_pieces, kind, rule):
    model.config.shiftdc = {**model.config.shiftdc, "reference": kind, "rule": rule}
    changed = False
    for row in ROWS:
        inputs = encode(processor, [row])
        reference = naive_reference(naive, expected_pieces, directions, row, kind, model.shiftdc_blank_pixel)
        assert torch.allclose(model.shiftdc_reference(**inputs)[0], reference, atol=1e-4)
        amounts = None
        if rule == "precomputed":
            clean = naive.activations(inputs)
            amounts = torch.stack([clean[i] @ directions[i] for i in LAYERS]) - reference
        expected = naive_reply(naive, directions, row, reference=reference, amounts=amounts)
        assert new_tokens(model.generate(**inputs, **GREEDY), inputs)[0] == expected
        with (
            torch.no_grad(),
            naive.calibrated(LAYERS, directions, inputs["input_ids"].shape[1], reference=reference, amounts=amounts),
        ):
            logits = naive.model(**inputs).logits
        with torch.no_grad():
            found = model(**inputs, shiftdc_reference=reference[None]).logits
            plain = model(**inputs, shiftdc=False).logits
        assert torch.allclose(found, logits, atol=1e-4)
        changed |= not torch.allclose(found, plain, atol=1e-3)
    assert changed


@pytest.mark.parametrize("kind", ["caption", "blank"])
def test_token_types_are_those_of_each_prompt(model, processor, kind):
    """Gemma 3's image tokens see one another: a composed prompt needs token types of its own."""
    model.config.shiftdc = {**model.config.shiftdc, "reference": kind, "rule": "precomputed"}
    inputs = encode(processor, [("Hello", None), *ROWS])
    seen = []

    def look(module, args, kwargs):
        ids, types = kwargs.get("input_ids"), kwargs.get("token_type_ids")
        if ids is not None and (ids == model.config.image_token_id).any():
            seen.append((ids, types))

    handle = model.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        model.generate(**inputs, **GREEDY)
    finally:
        handle.remove()
    typed = "token_type_ids" in inputs
    assert len(seen) == 3 or not typed  # caption or blank, clean, reply
    for ids, types in seen:
        assert torch.equal(types.bool(), ids == model.config.image_token_id) if typed else types is None


def test_static_subtracts_the_baked_shift(model, naive, directions, processor):
    model.config.shiftdc = {**model.config.shiftdc, "reference": "static"}
    amounts = [c.shift for c in model.shiftdc_corrections]
    for row in ROWS:
        inputs = encode(processor, [row])
        assert new_tokens(model.generate(**inputs, **GREEDY), inputs)[0] == naive_reply(naive, directions, row, amounts=amounts)


@pytest.mark.parametrize("kind", ["caption", "text", "blank", "static"])
def test_a_mixed_left_padded_batch_equals_single_prompts(model, processor, kind):
    model.config.shiftdc = {**model.config.shiftdc, "reference": kind}
    rows = [("Hello", None), *ROWS, ("Who are you, and how many?", None)]
    inputs = encode(processor, rows)
    batch = new_tokens(model.generate(**inputs, **GREEDY), inputs)
    for row, tokens in zip(rows, batch, strict=True):
        single = encode(processor, [row])
        assert until_end(tokens) == until_end(new_tokens(model.generate(**single, **GREEDY), single)[0])


def test_text_rows_are_untouched_bit_for_bit(model, base, processor):
    inputs = encode(processor, [("Hello", None), *ROWS, ("How are you?", None)])
    with torch.no_grad():
        found, plain = model(**inputs).logits, base(**inputs).logits
    assert torch.equal(found[[0, 3]], plain[[0, 3]])
    assert torch.equal(found[1:3, :-1], plain[1:3, :-1])  # and of image rows only the last prompt token moved
    assert not torch.equal(found[1, -1], plain[1, -1]) and not torch.equal(found[2, -1], plain[2, -1])
    text = encode(processor, [("Hello", None), ("How are you?", None)])
    assert torch.equal(model.generate(**text, **GREEDY), base.generate(**text, **GREEDY))


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
