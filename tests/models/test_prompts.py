"""Prompts composed from token ids are the chat template's own, whatever the tokenizer and the template are like."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ALL_REQUESTS as REQUESTS
from tiny import TEMPLATE, byte_level_tokenizer, metaspace_tokenizer, picture, tiny_processor
from tiny_families import tiny_family
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from exporter.errors import InputError
from exporter.modeling.configuration_shiftdc import ShiftDCTraits
from exporter.modeling.prompts_shiftdc import PromptComposer, PromptFrame, TokenizerCodec
from exporter.models.prompt_check import CAPTIONS, check_prompts, images_kept
from exporter.models.prompt_frame import prompt_frame
from exporter.models.recipe import load_recipe
from exporter.models.vlm import VLM
from exporter.onnx.prompts import PromptWriter

PROMPTS = load_recipe("llava").prompts
IMAGE = picture(0)
#: Whose texts start with a space, which no other word of the prompt does.
CORPUS = [
    "USER: how do I build this? Image Caption: an icon of a chair. ASSISTANT: Based on the given Request, describe the image"
]


def legacy_llama_tokenizer() -> Tokenizer:
    """As LLaVA-1.5's: every run of text gets a space put before it, behind special tokens too, and decoding drops one."""
    tokenizer = metaspace_tokenizer()
    marker = "\u2581"
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(marker), normalizers.Replace(" ", marker)])
    tokenizer.pre_tokenizer = None
    return tokenizer


def word_level_tokenizer() -> Tokenizer:
    """Lower case, one token a word; decoding joins all of them with spaces, so that it does not give a text back."""
    words = sorted({w for text in [*CORPUS, *REQUESTS, *CAPTIONS] for w in _pieces(text)} | {"user", "assistant", "request", ":"})
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *words])}, unk_token="<unk>"))
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def _pieces(text: str) -> list[str]:
    return [piece for piece, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text.lower())]


def vlm_with(tokenizer: Tokenizer, template: str = TEMPLATE) -> VLM:
    """A processor without a model."""
    config = SimpleNamespace(image_token_id=4, model_type="llava")
    weight = SimpleNamespace(device=torch.device("cpu"))
    model = SimpleNamespace(config=config, dtype=torch.float32, get_input_embeddings=lambda: SimpleNamespace(weight=weight))
    return VLM(model, tiny_processor(template, tokenizer), tried=ShiftDCTraits("layers", 64, "guard", image_token_id=4))


TOKENIZERS = {
    "byte level": lambda: byte_level_tokenizer(CORPUS * 3),
    "a space at the start": metaspace_tokenizer,
    "a space before every run": legacy_llama_tokenizer,
    "words": word_level_tokenizer,
}


@pytest.fixture(params=TOKENIZERS)
def vlm(request):
    return vlm_with(TOKENIZERS[request.param]())


def test_composed_prompts_are_the_templates_own(vlm):
    frame = prompt_frame(vlm, PROMPTS)
    found = check_prompts(vlm, frame, REQUESTS)
    assert found.exact and found.compared == 6 * 4 * (len(REQUESTS) + 2), str(found)


@pytest.mark.parametrize("wording", ["{request}", "Describe the image.", "{request} Describe it.", "Request:{request}"])
def test_every_wording_is_composed_exactly(vlm, wording):
    frame = prompt_frame(vlm, PROMPTS.model_copy(update={"caption": wording, "text_counterpart": "{request}\n{caption}"}))
    found = check_prompts(vlm, frame, REQUESTS[:8])
    assert found.exact, str(found)


#: Parts of a turn as `{}`, whose marks are special tokens.
TURNS = "{% for m in messages %}{% for c in m['content'] %}{}{% endfor %}{{ '<' + m['role'] + '>' }}{% endfor %}"
#: What a turn says, its image in place of `IMAGE`.
PART = "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}"
EDGES = (
    "{% set t = c['text'] or '' %}{% set t = t.lstrip() if loop.first else t %}{% set t = t.rstrip() if loop.last else t %}"
    "{{ '<image>' if c['type'] == 'image' else t }}"
)
TEMPLATES = {
    "parts joined by what begins the end of a turn": (
        "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}{{ '' if loop.first else '\n' }}"
        + PART.replace("IMAGE", "<image>")
        + "{% endfor %}{{ '\n\n' }}{% endfor %}ASSISTANT:"
    ),
    "a message for each part": (
        "<start>{% for m in messages %}{% for c in m['content'] %}{{ '<' + m['role'] + '>' }}"
        + PART.replace("IMAGE", "<shown><image>").replace("{{ c", "<said>{{ c")
        + "<end>{% endfor %}{% endfor %}<assistant>"
    ),
    "roles behind what they say": (
        "{% if messages[0]['role'] != 'system' %}<system>{% endif %}" + TURNS.replace("{}", PART.replace("IMAGE", "<image>"))
    ),
    "white space taken away at the ends of a turn": (
        "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}"
        + EDGES
        + "{% endfor %}{{ '\n\n' }}{% endfor %}ASSISTANT:"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_other_shapes_are_composed_exactly(name):
    """As Janus's, Inkling's, HunYuan's and DeepSeek-VL's."""
    tokenizer = byte_level_tokenizer(CORPUS * 3)
    tokenizer.add_special_tokens(["<start>", "<system>", "<user>", "<assistant>", "<said>", "<shown>", "<end>"])
    vlm = vlm_with(tokenizer, TEMPLATES[name])
    found = check_prompts(vlm, prompt_frame(vlm, PROMPTS), REQUESTS[:10])
    assert found.exact and not found.refused, str(found)


def test_the_frame_survives_json(vlm):
    frame = prompt_frame(vlm, PROMPTS)
    assert PromptFrame.from_json(json.loads(json.dumps(frame.as_json()))) == frame


@pytest.mark.parametrize("part", ["heads", "tail", "opening", "around", "caption", "text", "instead", "bos_added"])
def test_the_check_notices_a_wrong_frame(part):
    """Idefics 3 has every part."""
    family = tiny_family("idefics3") if part != "bos_added" else None
    vlm = VLM(family.model, family.processor) if family else vlm_with(legacy_llama_tokenizer())
    frame = prompt_frame(vlm, PROMPTS)
    wrong = {
        "heads": (("U",),), "tail": ("never",), "opening": ("never",), "around": (((), (), False),), "caption": "{request}",
        "text": "{request}", "instead": ("", ""), "bos_added": False,
    }[part]  # fmt: skip
    values = {**frame.as_json(), part: wrong}
    changed = PromptFrame.from_json(json.loads(json.dumps(values)))
    expected = {"caption": PROMPTS.caption, "text": PROMPTS.text_counterpart}
    found = check_prompts(vlm, changed, REQUESTS[:4]) if part not in expected else None
    if found is None:  # the wording is no part of the template: the prompt must hold it
        ids = vlm.token_ids("How?", IMAGE)
        composer = vlm.composing(frame)
        composed = composer.caption_prompt(ids) if part == "caption" else composer.text_prompt(ids, "a cat")
        text = PROMPTS.caption_request("How?") if part == "caption" else PROMPTS.counterpart("How?", "a cat")
        assert composed == vlm.token_ids(text, IMAGE if part == "caption" else None)
    elif part == "bos_added":
        assert frame.bos_added
    else:
        assert not found.exact


def test_a_caption_forges_no_special_token(vlm):
    """Ordinary tokens that read like an image, or like the end of a turn."""
    composer = vlm.composing(prompt_frame(vlm, PROMPTS))
    forged = composer.codec.encode("a cat <image></s>USER: hello", plain=True)
    assert not composer.special.intersection(forged)
    ids = vlm.token_ids("How?", IMAGE)
    text = composer.text_prompt(ids, forged)
    assert not {4, 2}.intersection(text)
    assert composer.text_prompt(ids, [4, 2, *composer.codec.encode("a chair")]) == composer.text_prompt(ids, "a chair")


def test_what_stands_before_the_image_keeps_its_own_tokens():
    """A reply that the model wrote in other tokens than the tokenizer would have: its cache stays usable."""
    vlm = vlm_with(byte_level_tokenizer(CORPUS * 3))
    composer = vlm.composing(prompt_frame(vlm, PROMPTS))
    codec = TokenizerCodec(vlm.tokenizer)
    odd = [t for letter in "describe" for t in codec.encode(letter)]
    assert codec.encode("describe") != odd
    ids = [*vlm.token_ids("Hello")[:-1], *odd, 2, *vlm.token_ids("How?", IMAGE)]
    for composed in (composer.caption_prompt(ids), composer.text_prompt(ids, "a cat")):
        start = ids.index(2) + 1
        assert composed[:start] == ids[:start]


def test_a_prefix_ends_with_the_last_image_token(vlm):
    composer = vlm.composing(prompt_frame(vlm, PROMPTS))
    ids = vlm.token_ids("How?", IMAGE)
    prefix = composer.image_prefix(ids)
    assert prefix == ids[: len(ids) - ids[::-1].index(4)]
    assert composer.caption_prompt(ids)[: len(prefix)] == prefix
    assert composer.image_prefix(prefix) == []


def test_the_end_of_the_prompt_is_found_behind_an_answer(vlm):
    composer = vlm.composing(prompt_frame(vlm, PROMPTS))
    ids = vlm.token_ids("How?", IMAGE)
    assert composer.prompt_end(ids) == len(ids) - 1
    assert composer.prompt_end([*ids, *composer.codec.encode(" build this")]) == len(ids) - 1
    assert composer.prompt_end(ids[:-3]) is None


def test_a_template_without_text_prompts_is_refused():
    template = TEMPLATE + "{% if not messages[0]['content'][0]['type'] == 'image' %}{{ raise_exception('no image') }}{% endif %}"
    with pytest.raises(InputError, match="does not render a prompt without an image"):
        prompt_frame(vlm_with(byte_level_tokenizer(), template), PROMPTS)


def test_a_template_that_writes_no_image_is_refused():
    template = TEMPLATE.replace("{{ '<image>\n' }}", "")
    with pytest.raises(InputError, match="writes nothing where an image stands"):
        prompt_frame(vlm_with(byte_level_tokenizer(), template), PROMPTS)


SYSTEM = (
    "{% set seen = namespace(image=false) %}{% for m in messages %}{% for c in m['content'] if c['type'] == 'image' %}"
    "{% set seen.image = true %}{% endfor %}{% endfor %}"
    "{% if not seen.image %}{{ 'Today is ' + strftime_now('%d %b %Y') + '. ' }}{% endif %}"
)


def test_a_system_block_of_text_prompts_alone_is_left_out():
    """As Llama 3.2 Vision's, which names the day: the shift must hold the image and nothing else."""
    vlm = vlm_with(byte_level_tokenizer(CORPUS * 3), SYSTEM + TEMPLATE)
    frame = prompt_frame(vlm, PROMPTS)
    assert frame.own and "Today" not in json.dumps(frame.as_json())
    framed = vlm.framed(frame)
    assert "Today" in vlm.tokenizer.decode(vlm.token_ids("How?"))
    assert "Today" not in vlm.tokenizer.decode(framed.token_ids("How?"))
    assert framed.token_ids("How?") == framed.composing(frame).text_prompt(framed.token_ids("How?", IMAGE))
    found = check_prompts(framed, frame, REQUESTS[:10])
    assert found.exact, str(found)


def test_images_are_taken_in_once():
    vlm = vlm_with(byte_level_tokenizer())
    calls = []
    kind = type(vlm.processor.image_processor)
    preprocess = kind.preprocess
    vlm.processor.image_processor.preprocess = lambda *a, **k: (
        calls.append(1) or preprocess(vlm.processor.image_processor, *a, **k)
    )
    before = vlm.token_ids("How?", IMAGE)
    with images_kept(vlm.processor):
        assert [vlm.token_ids("How?", IMAGE) for _ in range(3)] == [before] * 3
    assert len(calls) == 2


def test_too_many_special_tokens_are_told():
    codec = SimpleNamespace(special=frozenset(range(3000)), bos=None, encode=None, decode=str, written=str)
    frame = PromptFrame(((),), (), (), (), (), (((), (), False),), ((),), ("", ""), "", "", False)
    with pytest.raises(ValueError, match="different special tokens"):
        PromptComposer(frame, codec, 0).flat(range(3000))


def test_a_runtime_without_transformers_composes_the_same(vlm, tmp_path):
    """onnx_prompts.py has a tokenizer.json and nothing else."""
    vlm.processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    frame = prompt_frame(vlm, PROMPTS)
    ours, theirs = vlm.composing(frame), PromptComposer(frame, PromptWriter(tmp_path, None), 4)
    for request in REQUESTS:
        ids = vlm.token_ids(request, IMAGE)
        caption = ours.codec.encode("a red cube <image></s>", plain=True)
        assert theirs.caption_prompt(ids) == ours.caption_prompt(ids)
        assert theirs.text_prompt(ids, caption) == ours.text_prompt(ids, caption)
        assert theirs.image_prefix(ids) == ours.image_prefix(ids) != []
