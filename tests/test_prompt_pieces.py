"""Prompts composed from token pieces say what the chat template says."""

from __future__ import annotations

import pytest
from PIL import Image
from tiny import TEMPLATE, byte_level_tokenizer, metaspace_tokenizer, tiny_model, tiny_processor

from exporter.modeling.modeling_shiftdc_prompts import PromptPieces
from exporter.prompt_pieces import prompt_pieces
from exporter.recipes import Prompts, load_recipe
from exporter.vlm import VLM, user_turn

IMAGE = Image.new("RGB", (40, 40), "red")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = load_recipe("llava").prompts
WRAPPED = Prompts(caption="Look. {request} Describe!", text_counterpart="Q: {request} Seen: {caption} Answer.")


@pytest.fixture(scope="module", params=["byte level", "metaspace"])
def tokenizer(request):
    return {"byte level": byte_level_tokenizer, "metaspace": metaspace_tokenizer}[request.param]


@pytest.fixture(params=["llava", "chatml"])
def vlm(request, tokenizer):
    processor = tiny_processor({"llava": TEMPLATE, "chatml": CHATML}[request.param], tokenizer())
    return VLM(tiny_model(len(processor.tokenizer)), processor)


@pytest.fixture(params=[PROMPTS, WRAPPED], ids=["paper", "wrapped"])
def prompts(request):
    return request.param


def read(vlm, ids):
    """Text of a prompt, with the image once."""
    text = vlm.tokenizer.decode(ids)
    while "<image><image>" in text:
        text = text.replace("<image><image>", "<image>")
    return text


@pytest.mark.parametrize("request_text", ["How do I build this?", "build it: now", "7 zebras", "A"])
def test_composed_prompts_read_as_the_template_renders_them(vlm, prompts, request_text):
    pieces = PromptPieces(prompt_pieces(vlm, prompts), vlm.image_token_id)
    ids = vlm.token_ids(request_text, IMAGE)
    assert read(vlm, pieces.caption_prompt(ids)) == read(vlm, vlm.token_ids(prompts.caption_request(request_text), IMAGE))
    assert read(vlm, pieces.text_prompt(ids)) == read(vlm, vlm.token_ids(request_text))
    # a caption as the model would go on with it after the generation prompt
    reply = {"role": "assistant", "content": [{"type": "text", "text": "a red chair"}]}
    text = vlm.processor.apply_chat_template([user_turn(request_text, IMAGE), reply], tokenize=False)
    space = " " if text[text.index("a red chair") - 1] == " " else ""
    end_of_prompt = vlm.tokenizer("ASSISTANT:", add_special_tokens=False)["input_ids"]
    caption = vlm.tokenizer(f"ASSISTANT:{space}a red chair", add_special_tokens=False)["input_ids"][len(end_of_prompt) :]
    expected = read(vlm, vlm.token_ids(prompts.counterpart(request_text, "a red chair")))
    assert read(vlm, pieces.text_prompt(ids, caption)) == expected


def test_multiple_turns_take_the_last_request(vlm):
    pieces = PromptPieces(prompt_pieces(vlm, PROMPTS), vlm.image_token_id)
    reply = {"role": "assistant", "content": [{"type": "text", "text": "A box."}]}
    turns = [user_turn("What is it?", IMAGE), reply, user_turn("How so: tell me")]
    ids = vlm.encode_conversations([turns])["input_ids"][0].tolist()
    start, end = pieces.request_span(ids)
    assert vlm.tokenizer.decode(ids[start:end]).strip() == "How so: tell me"
    text = vlm.tokenizer.decode(pieces.text_prompt(ids, [9, 10]))
    assert "<image>" not in text
    assert text.index("What is it?") < text.index("How so: tell me") < text.index("Image Caption:")


def test_an_image_behind_the_request(vlm):
    pieces = PromptPieces(prompt_pieces(vlm, PROMPTS), vlm.image_token_id)
    head, tail, image = pieces.first_turn_head, pieces.tail, [vlm.image_token_id] * 4
    request = vlm.tokenizer("build it", add_special_tokens=False)["input_ids"]
    ids = [*head, *request, *image, *tail]
    assert pieces.caption_prompt(ids) == [*head, *pieces.caption[0], *request, *image, *pieces.caption[1], *tail]
    assert pieces.text_prompt(ids, [9]) == [*head, *pieces.text[0], *request, *pieces.text[1], 9, *pieces.text[2], *tail]


def test_two_images_and_a_started_reply(vlm):
    pieces = PromptPieces(prompt_pieces(vlm, PROMPTS), vlm.image_token_id)
    ids = vlm.token_ids("How?", IMAGE)
    first = ids.index(vlm.image_token_id)
    twice = ids[:first] + [vlm.image_token_id] * 4 + ids[first:] + [30, 31]
    text = pieces.text_prompt(twice)
    assert vlm.image_token_id not in text
    assert text[-2:] == [30, 31]
    assert text[:-2] == pieces.text_prompt(ids)
