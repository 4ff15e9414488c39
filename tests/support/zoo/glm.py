"""GLM's vision-language models from 4.1V to 5.3. Import with_torchvision before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiny_families import TinyFamily, text_sizes, tokenizer
from tiny_families_torchvision import MROPE, qwen_family, qwen_size
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessor,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    Glm5NextConfig,
    Glm5NextForConditionalGeneration,
    Glm5NextImageProcessor,
    Glm5NextProcessor,
    Glm5NextVideoProcessor,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    Glm46VImageProcessor,
    Glm46VProcessor,
    Glm46VVideoProcessor,
    GlmgaConfig,
    GlmgaImageProcessor,
    GlmgaVideoProcessor,
    GlmOcrConfig,
    GlmOcrForConditionalGeneration,
    PreTrainedTokenizerFast,
)

# chat_template of hf/zai-org/GLM-OCR, in tokenizer_config.json of its ONNX conversions, the end of hf/zai-org/GLM-4.5-Air's, as
# quoted in llama.cpp, and the prompts for GLM-4.1V and 4.5V in vllm/examples/offline_inference/vision_language.py; without tools
# and thoughts of past turns
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|begin_of_image|><|image|><|end_of_image|>"
    "{% elif c['type'] == 'video' %}<|begin_of_video|><|video|><|end_of_video|>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# as hf/zai-org/GLM-4.7's and 5.3's: no line break behind a role, and a reply begins with its thoughts
GLM_5 = GLM.replace("|>\n{% for c", "|>{% for c").replace("<|assistant|>{%", "<|assistant|><think>{%")
AROUND = [f"<|{edge}_of_{kind}|>" for kind in ("image", "video") for edge in ("begin", "end")]


def glm_words() -> PreTrainedTokenizerFast:
    turns = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"]
    return tokenizer(*turns, *AROUND, "<|image|>", "<|video|>", bos=False)


def glm_ids(words: PreTrainedTokenizerFast) -> dict[str, int]:
    edges = [f"{kind}_{edge}_token_id" for kind in ("image", "video") for edge in ("start", "end")]
    names = dict(zip(edges, AROUND, strict=True)) | {"image_token_id": "<|image|>", "video_token_id": "<|video|>"}
    return {name: words.convert_tokens_to_ids(token) for name, token in names.items()}


def rotary() -> dict[str, Any]:
    """Half of a head's 16 numbers are rotated, as published."""
    return {"head_dim": 16, "rope_parameters": {**MROPE, "partial_rotary_factor": 0.5}}


def glm_tower(**sizes: Any) -> dict[str, Any]:
    return {
        "depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 7, "image_size": 28, "out_hidden_size": 32,
        "intermediate_size": 64, "initializer_range": 0.3, **sizes,
    }  # fmt: skip


def glm4v() -> TinyFamily:
    words = glm_words()
    config = Glm4vConfig(text_config=text_sizes(len(words)) | rotary(), vision_config=glm_tower(), **glm_ids(words))
    return glm_4_1(words, Glm4vForConditionalGeneration(config))


def glm4v_moe() -> TinyFamily:
    words = glm_words()
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
    config = Glm4vMoeConfig(text_config=text_sizes(len(words)) | rotary() | experts, vision_config=glm_tower(), **glm_ids(words))
    return glm_4_1(words, Glm4vMoeForConditionalGeneration(config))


def glm_4_1(words: PreTrainedTokenizerFast, model: Any) -> TinyFamily:
    images, videos = Glm4vImageProcessor(**qwen_size()), Glm4vVideoProcessor(**qwen_size())
    return qwen_family(Glm4vProcessor(images, words, videos, chat_template=GLM), model)


def glm46v() -> TinyFamily:
    return glm_4_6(Glm46VConfig, Glm46VImageProcessor, Glm46VVideoProcessor)


def glmga() -> TinyFamily:
    return glm_4_6(GlmgaConfig, GlmgaImageProcessor, GlmgaVideoProcessor)


def glm_4_6(config_class: Callable[..., Any], images: Callable[..., Any], videos: Callable[..., Any]) -> TinyFamily:
    words = glm_words()
    text = text_sizes(len(words)) | rotary() | {"model_type": "glm4v_text"}
    config = config_class(text_config=text, vision_config=glm_tower(model_type="glm4v_vision"), **glm_ids(words))
    processor = Glm46VProcessor(images(**qwen_size()), words, videos(**qwen_size()), chat_template=GLM)
    return qwen_family(processor, Glm46VForConditionalGeneration(config))


def glm_ocr() -> TinyFamily:
    words = glm_words()
    config = GlmOcrConfig(text_config=text_sizes(len(words)) | rotary(), vision_config=glm_tower(), **glm_ids(words))
    images, videos = Glm46VImageProcessor(**qwen_size()), Glm46VVideoProcessor(**qwen_size())
    return qwen_family(Glm46VProcessor(images, words, videos, chat_template=GLM), GlmOcrForConditionalGeneration(config))


def glm5_next() -> TinyFamily:
    """Several residual streams side by side: decoder layers put out [batch, time, hc_mult, hidden], in a tuple.

    Published: three of four layers are linear, the first three are dense.
    """
    words = glm_words()
    words.add_tokens(["<think>", "</think>"])
    mixers = [f"{kind}_attention" for kind in ("linear", "indexed", "linear", "indexed", "linear")]
    kinds = {"num_hidden_layers": 5, "layer_types": mixers, "mlp_layer_types": ["dense", *["sparse"] * 4]}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
    linear = {"linear_num_heads": 4, "linear_head_dim": 8}
    # of shorter prompts than index_topk, here and published, all tokens are seen
    indexer = {"index_topk": 512, "index_head_dim": 8, "index_n_heads": 2, "index_kpool": 2}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "hc_mult": 2}
    text = text_sizes(len(words)) | kinds | latent | linear | indexer | experts
    tower = glm_tower(projection_intermediate_size=64)
    config = Glm5NextConfig(text_config=text, vision_config=tower, **glm_ids(words))
    tokens = {"patch_size": 7, "min_image_tokens": 1, "max_image_tokens": 16}
    images, videos = Glm5NextImageProcessor(**tokens), Glm5NextVideoProcessor(**tokens)
    processor = Glm5NextProcessor(images, words, videos, chat_template=GLM_5)
    tiny = qwen_family(processor, Glm5NextForConditionalGeneration(config))
    return TinyFamily(processor, tiny.model, tiny.layers, first=2, composed=tiny.composed)


FAMILIES = {f.__name__: f for f in (glm46v, glm4v, glm4v_moe, glm_ocr, glmga, glm5_next)}
