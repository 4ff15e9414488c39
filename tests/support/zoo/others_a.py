"""Step 3.7, and readers of documents that take requests as well. Import with_torchvision before."""

from __future__ import annotations

from typing import Any

from tiny_families import TinyFamily, text_sizes, tokenizer
from tiny_families_torchvision import qwen_family, qwen_size
from transformers import (
    HunYuanVLConfig,
    HunYuanVLForConditionalGeneration,
    HunYuanVLImageProcessor,
    HunYuanVLProcessor,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PaddleOCRVLImageProcessor,
    PaddleOCRVLProcessor,
    Step3p7Config,
    Step3p7ForConditionalGeneration,
    Step3p7ImageProcessor,
    Step3p7Processor,
)

# hf/stepfun-ai/Step-3.7-Flash's was not found: turns and thoughts are hf/stepfun-ai/Step-3.5-Flash's
STEP = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<im_patch>{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# chat_template.jinja of hf/PaddlePaddle/PaddleOCR-VL, as quoted in several repositories
PADDLE = (
    "<|begin_of_sentence|>{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{{ '\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'Assistant:\n' }}{{ m['content'][0]['text'] + eos_token }}"
    "{% else %}{{ m['content'][0]['text'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
# prompts for hf/tencent/HunyuanOCR in vllm/examples/offline_inference/vision_language.py and in mistral.rs: a role stands behind
# what it says, and an empty system text before
PLACE = "<\N{FULLWIDTH VERTICAL LINE}hy_place\u2581holder\u2581no\u2581{}\N{FULLWIDTH VERTICAL LINE}>"
BEGIN, USER, ASSISTANT, PAD = (
    f"<\N{FULLWIDTH VERTICAL LINE}hy_{name}\N{FULLWIDTH VERTICAL LINE}>"
    for name in ("begin\u2581of\u2581sentence", "User", "Assistant", "\u2581pad\u2581")
)
START, END, IMAGE = (PLACE.format(number) for number in (100, 101, 102))
HUNYUAN = (
    BEGIN + "{% if messages[0]['role'] != 'system' %}" + PLACE.format(3) + "{% endif %}{% for m in messages %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}" + START + IMAGE + END + "{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{{ {'user': '" + USER + "', 'assistant': '" + ASSISTANT + "', 'system': '" + PLACE.format(3) + "'}[m['role']] }}"
    "{% endfor %}"
)  # fmt: skip


def step3p7() -> TinyFamily:
    """An image is seen whole and, where it is large, in crops; layers with sliding windows have more heads."""
    marks = ["<im_patch>", "<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>"]
    words = tokenizer("<|im_start|>", "<|im_end|>", *marks, bos=False, added=["<think>", "</think>"])
    kinds = [f"{kind}_attention" for kind in ("full", "sliding", "full", "sliding", "full")]
    experts = {
        "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "share_expert_dim": 32, "mlp_layer_types": ["dense", *["sparse"] * 4],
    }  # fmt: skip
    windows = {"num_hidden_layers": 5, "layer_types": kinds, "sliding_window": 16, "num_sliding_attention_heads": 8}
    rope = {"rope_theta": [10000.0] * 5, "partial_rotary_factors": [0.5, 1.0, 0.5, 1.0, 0.5]}
    tower = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 4,
        "mlp_ratio": 2.0, "max_position_embeddings": 64, "initializer_range": 0.3, "layer_scale_init_value": 1.0,
    }  # fmt: skip
    text = text_sizes(len(words)) | {"head_dim": 8} | experts | windows | rope
    config = Step3p7Config(text_config=text, vision_config=tower, image_token_id=words.convert_tokens_to_ids("<im_patch>"))
    images = Step3p7ImageProcessor(size={"height": 32, "width": 32}, patch_size=16, vision_patch_size=4, max_image_size=96)
    processor = Step3p7Processor(images, words, chat_template=STEP)
    return TinyFamily(processor, Step3p7ForConditionalGeneration(config), "model.language_model.layers", first=2)


def paddleocr_vl() -> TinyFamily:
    words = tokenizer("<|begin_of_sentence|>", "<|IMAGE_START|>", "<|IMAGE_END|>", bos=False, image_token="<|IMAGE_PLACEHOLDER|>")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    start, end = (words.convert_tokens_to_ids(f"<|IMAGE_{edge}|>") for edge in ("START", "END"))
    tower = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 7,
        "image_size": 28, "initializer_range": 0.3,
    }  # fmt: skip
    config = PaddleOCRVLConfig(
        text_config=text_sizes(len(words)) | {"head_dim": 8, "rope_parameters": rope, "tie_word_embeddings": False},
        vision_config=tower, image_token_id=words.image_token_id, vision_start_token_id=start,
        vision_end_token_id=end, tie_word_embeddings=False,
    )  # fmt: skip
    processor = PaddleOCRVLProcessor(PaddleOCRVLImageProcessor(**qwen_size()), words, chat_template=PADDLE)
    return qwen_family(processor, PaddleOCRVLForConditionalGeneration(config))


def hunyuan_vl() -> TinyFamily:
    """Its tokens of an image are one more than its features in each row, and one at either end."""
    named = {"image_token": IMAGE, "image_start_token": START, "image_end_token": END}
    words = tokenizer(BEGIN, USER, ASSISTANT, PLACE.format(3), bos=False, **named)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1, 1]}
    tower: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 7,
        "out_hidden_size": 32, "max_image_size": 56, "initializer_range": 0.3,
    }  # fmt: skip
    config = HunYuanVLConfig(
        text_config=text_sizes(len(words)) | {"head_dim": 8, "rope_parameters": rope}, vision_config=tower,
        image_token_id=words.image_token_id, im_start_id=words.image_start_token_id, im_end_id=words.image_end_token_id,
    )  # fmt: skip
    processor = HunYuanVLProcessor(HunYuanVLImageProcessor(**qwen_size()), words, chat_template=HUNYUAN)
    return qwen_family(processor, HunYuanVLForConditionalGeneration(config))


FAMILIES = {f.__name__: f for f in (step3p7, paddleocr_vl, hunyuan_vl)}
