"""Models of several makers that give each image its own number of tokens. Import with_torchvision before."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from tiny_families import TinyFamily, text_sizes, tokenizer
from tiny_families_torchvision import QWEN3, qwen_ids, qwen_size, qwen_tower, qwen_words
from transformers import (
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    Ernie4_5_VLMoeImageProcessor,
    Ernie4_5_VLMoeProcessor,
    Ernie4_5_VLMoeVideoProcessor,
    Exaone4_5_Config,
    Exaone4_5_ForConditionalGeneration,
    Exaone4_5_Processor,
    HyperCLOVAXVisionV2Config,
    HyperCLOVAXVisionV2ForConditionalGeneration,
    HyperCLOVAXVisionV2Processor,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    Kimi_K25ImageProcessor,
    Kimi_K25Processor,
    Kimi_K25VideoProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
    VideoLlama3ImageProcessor,
    VideoLlama3Processor,
    VideoLlama3VideoProcessor,
)

# vllm/examples/offline_inference/vision_language.py and KimiK25Parser in training code of others; the published
# chat_template.jinja was not found. A reply begins with its thoughts
KIMI = (
    "{% for m in messages %}<|im_{{ m['role'] }}|>{{ m['role'] }}<|im_middle|>{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|media_begin|>image<|media_content|><|media_pad|><|media_end|>{{ '\n' }}"
    "{% elif c['type'] == 'video' %}<|kimi_k25_video_placeholder|>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|><think>{% endif %}"
)
# vllm/examples/offline_inference/vision_language.py, and a prompt of hf/baidu/ERNIE-4.5-VL-28B-A3B-PT as printed by mlx-vlm:
# pictures are numbered, and a system text stands before every conversation
ERNIE = (
    "{% set n = namespace(images=0, videos=0) %}<|begin_of_sentence|>You are a multimodal AI assistant.\n{% for m in messages %}"
    "{{ {'user': 'User: ', 'assistant': 'Assistant: ', 'system': ''}[m['role']] }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{% set n.images = n.images + 1 %}Picture {{ n.images }}:"
    "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    "{% elif c['type'] == 'video' %}{% set n.videos = n.videos + 1 %}Video {{ n.videos }}:"
    "<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{{ '<|end_of_sentence|>' if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: <think></think>' }}{% endif %}"
)
# prompts for hf/LGAI-EXAONE/EXAONE-4.5-33B in vllm/examples/offline_inference/vision_language.py
EXAONE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<vision><|image_pad|></vision>{% elif c['type'] == 'video' %}<vision><|video_pad|></vision>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}<|endofturn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# users' prompts for hf/naver-hyperclovax/HyperCLOVAX-SEED-Think-32B; replies begin as
# transformers/docs/source/en/model_doc/hyperclovax_vision_v2.md says
CLOVA = (
    "{% set n = namespace(images=0) %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    '{% if c[\'type\'] == \'image\' %}<|mime_start|>{"id": "image_{{ \'%02d\' % n.images }}", "type": "image/jpeg"}<|mime_end|>\n'
    "<|image_start|><|IMAGE_PAD|><|image_end|>{% set n.images = n.images + 1 %}"
    "{% elif c['type'] == 'video' %}<|video_start|><|VIDEO_PAD|><|video_end|>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
# DEFAULT_CHAT_TEMPLATE of DAMO-NLP-SG/VideoLLaMA3's processor: Qwen's turns, and a line break behind each image
VIDEO_LLAMA = (
    QWEN3.replace("<|vision_start|><|image_pad|><|vision_end|>", "{{ '<|image_pad|>\n' }}")
    .replace("<|vision_start|><|video_pad|><|vision_end|>", "{{ '<|video_pad|>\n' }}")
)  # fmt: skip
#: 1 to 16 tokens to an image of 7 pixels a token.
SMALL = {"patch_size": 7, "size": {"shortest_edge": 7 * 7, "longest_edge": 7 * 7 * 16}}


def kimi_k25() -> TinyFamily:
    marks = [f"<|im_{word}|>" for word in ("system", "user", "assistant", "middle", "end")]
    media = [f"<|media_{word}|>" for word in ("begin", "content", "pad", "end")]
    words = tokenizer(*marks, *media, "<|kimi_k25_video_placeholder|>", bos=False, added=["<think>", "</think>"])
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
    text = text_sizes(len(words)) | latent | experts | {"num_key_value_heads": 4, "first_k_dense_replace": 1}
    tower = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 7,
        "pos_emb_height": 8, "pos_emb_width": 8, "initializer_range": 0.3,
    }  # fmt: skip
    ids = ["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"]
    tokens = ["<|media_pad|>", "<|kimi_k25_video_placeholder|>", "<|media_begin|>", "<|media_end|>"]
    config = Kimi_K25Config(
        text_config=text | {"model_type": "deepseek_v3"}, vision_config=tower, projection_hidden_size=32,
        tie_word_embeddings=False, **{n: words.convert_tokens_to_ids(t) for n, t in zip(ids, tokens, strict=True)},
    )  # fmt: skip
    size = {"patch_size": 7, "size": {"max_height": 8, "max_width": 8}, "max_patches": 64}
    processor = Kimi_K25Processor(Kimi_K25ImageProcessor(**size), words, Kimi_K25VideoProcessor(**size), chat_template=KIMI)
    return TinyFamily(processor, Kimi_K25ForConditionalGeneration(config), "model.language_model.layers")


def ernie4_5_vl_moe() -> TinyFamily:
    """Tokens of images have experts of their own."""
    kinds = {f"{kind}{edge}_token": f"<|{kind}{edge}|>".upper() for kind in ("image", "video") for edge in ("_start", "_end")}
    kinds |= {"image_token": "<|IMAGE_PLACEHOLDER|>", "video_token": "<|VIDEO_PLACEHOLDER|>"}
    words = tokenizer("<|begin_of_sentence|>", "<|end_of_sentence|>", bos=False, added=["<think>", "</think>"], **kinds)
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [32, 16]}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    tower = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 7, "initializer_range": 0.3,
    }  # fmt: skip
    config = Ernie4_5_VLMoeConfig(
        text_config=text_sizes(len(words)) | experts | {"rope_parameters": rope}, vision_config=tower,
        **{f"{name}_id": words.convert_tokens_to_ids(token) for name, token in kinds.items()},
    )  # fmt: skip
    videos = Ernie4_5_VLMoeVideoProcessor(**qwen_size(), draw_on_frames=False)  # a font is no part of this repository
    processor = Ernie4_5_VLMoeProcessor(Ernie4_5_VLMoeImageProcessor(**qwen_size()), words, videos, chat_template=ERNIE)
    model = Ernie4_5_VLMoeForConditionalGeneration(config)
    return TinyFamily(processor, model, "model.language_model.layers", composed=partial(both_types, processor))


def both_types(processor: Any, ids: torch.Tensor, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    rows = ids.tolist()
    return {
        "mm_token_type_ids": torch.tensor(processor.create_mm_token_type_ids(rows)),
        "moe_mm_token_type_ids": torch.tensor(processor.create_moe_mm_token_type_ids(rows)),
    }


def exaone4_5() -> TinyFamily:
    turns = ["<|system|>", "<|user|>", "<|assistant|>", "<|endofturn|>"]
    vision = ["<vision>", "</vision>", "<|image_pad|>", "<|video_pad|>"]
    words = tokenizer(*turns, *vision, bos=False)
    kinds = [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "full", "sliding")]
    text = text_sizes(len(words)) | {"model_type": "exaone4", "num_hidden_layers": 5, "layer_types": kinds, "sliding_window": 16}
    config = Exaone4_5_Config(
        text_config=text, vision_config=windowed(num_key_value_heads=2),
        image_token_id=words.convert_tokens_to_ids("<|image_pad|>"), video_token_id=words.convert_tokens_to_ids("<|video_pad|>"),
    )  # fmt: skip
    images, videos = Qwen2VLImageProcessor(**qwen_size()), Qwen2VLVideoProcessor(**qwen_size())
    processor = Exaone4_5_Processor(images, words, videos, chat_template=EXAONE)
    return TinyFamily(processor, Exaone4_5_ForConditionalGeneration(config), "model.language_model.layers", first=2)


def windowed(**sizes: Any) -> dict[str, Any]:
    """The vision tower of Qwen2.5-VL."""
    return qwen_tower(intermediate_size=64, out_hidden_size=32, window_size=28, fullatt_block_indexes=[1], **sizes)


def hyperclovax_vision_v2() -> TinyFamily:
    vision = [f"<|{kind}_{edge}|>" for kind in ("mime", "image", "video") for edge in ("start", "end")]
    words = tokenizer(
        "<|im_start|>", "<|im_end|>", *vision, bos=False, added=["<think>", "</think>"],
        image_token="<|IMAGE_PAD|>", video_token="<|VIDEO_PAD|>",
    )  # fmt: skip
    scales = {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 0.5}
    config = HyperCLOVAXVisionV2Config(
        text_config=text_sizes(len(words)) | scales | {"model_type": "hyperclovax"},
        vision_config=windowed(model_type="qwen2_5_vl_vision"), tie_word_embeddings=False,
        image_token_id=words.image_token_id, video_token_id=words.video_token_id,
    )  # fmt: skip
    images, videos = Qwen2VLImageProcessor(**qwen_size()), Qwen2VLVideoProcessor(**qwen_size())
    processor = HyperCLOVAXVisionV2Processor(images, words, videos, chat_template=CLOVA)
    return TinyFamily(processor, HyperCLOVAXVisionV2ForConditionalGeneration(config), "model.language_model.layers")


def video_llama_3() -> TinyFamily:
    words = qwen_words()
    tower = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 7,
        "initializer_range": 0.3,
    }  # fmt: skip
    ids = {name: token for name, token in qwen_ids(words).items() if name in ("image_token_id", "video_token_id")}
    config = VideoLlama3Config(text_config=text_sizes(len(words)) | {"model_type": "qwen2"}, vision_config=tower, **ids)
    images, videos = VideoLlama3ImageProcessor(**SMALL), VideoLlama3VideoProcessor(**SMALL)
    processor = VideoLlama3Processor(images, words, videos, chat_template=VIDEO_LLAMA)
    return TinyFamily(processor, VideoLlama3ForConditionalGeneration(config), "model.language_model.layers")


FAMILIES = {f.__name__: f for f in (kimi_k25, ernie4_5_vl_moe, exaone4_5, hyperclovax_vision_v2, video_llama_3)}
