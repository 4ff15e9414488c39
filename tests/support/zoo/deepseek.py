"""Tiny DeepSeek-VL, DeepSeek-VL with its second vision tower, and Janus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny_families import TinyFamily, text_sizes, tokenizer, vision_sizes
from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
    DeepseekVLHybridProcessor,
    DeepseekVLProcessor,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import DeepseekVLHybridImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language.\n\n"
)
# transformers/src/transformers/models/deepseek_vl_hybrid/convert_deepseek_vl_hybrid_weights_to_hf.py and janus/convert_janus_
# weights_to_hf.py: white space around what was said is taken away. Janus writes its system turn not here but in the processor
TURNS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% elif m['role'] == 'assistant' %}ASSISTANT: "
    "{% else %}{{ m['role'] | capitalize }}: {% endif %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}"
    "{% set text = c['text'] %}{% if loop.first %}{% set text = text.lstrip() %}{% endif %}"
    "{% if loop.last %}{% set text = text.rstrip() %}{% endif %}{{ text }}{% endif %}{% endfor %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n\n' if m['role'] == 'user' else '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
DEEPSEEK = SYSTEM + TURNS.replace("USER", "User").replace("ASSISTANT", "Assistant").replace("IMAGE", "<image_placeholder>")
JANUS = (
    TURNS.replace("USER", "<|User|>")
    .replace("ASSISTANT", "<|Assistant|>")
    .replace(
        "IMAGE", "{% if not loop.first %}{{ '\n' }}{% endif %}<image_placeholder>{% if not loop.last %}{{ '\n' }}{% endif %}"
    )
)
SQUARE = {"height": 28, "width": 28}


def deepseek_vl() -> TinyFamily:
    words = deepseek_words()
    processor = DeepseekVLProcessor(DeepseekVLImageProcessorPil(size=SQUARE), words, chat_template=DEEPSEEK, num_image_tokens=4)
    model = DeepseekVLForConditionalGeneration(DeepseekVLConfig(**deepseek_sizes(words)))
    return TinyFamily(processor, model, "model.language_model.layers", recipe="deepseek_vl")


def deepseek_vl_hybrid() -> TinyFamily:
    """Two views of one image, in two inputs."""
    words = deepseek_words()
    images = DeepseekVLHybridImageProcessorPil(size=SQUARE, high_res_size={"height": 32, "width": 32})
    processor = DeepseekVLHybridProcessor(images, words, chat_template=DEEPSEEK, num_image_tokens=4)
    sharp = {**vision_sizes(32, 8), "global_attn_indexes": [0], "mlp_dim": 64, "output_channels": 8, "window_size": 2}
    model = DeepseekVLHybridForConditionalGeneration(
        DeepseekVLHybridConfig(**deepseek_sizes(words), high_res_vision_config=sharp)
    )
    torch.nn.init.ones_(model.model.high_res_vision_alpha)  # zero at first: half the sharp view would say nothing
    return TinyFamily(processor, model, "model.language_model.layers", recipe="deepseek_vl_hybrid")


def deepseek_words() -> PreTrainedTokenizerFast:
    return tokenizer(image_token="<image_placeholder>")


def deepseek_sizes(words: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "text_config": text_sizes(len(words)), "vision_config": {**vision_sizes(28, 14), "vision_use_head": False},
        "image_token_id": words.image_token_id, "tie_word_embeddings": False,
    }  # fmt: skip


def janus() -> TinyFamily:
    """It draws as well, by tokens of its own in another mode of `generate`."""
    marks = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    words = tokenizer("<|User|>", "<|Assistant|>", **marks)
    images = JanusImageProcessorPil(size=SQUARE)
    processor = JanusProcessor(images, words, chat_template=JANUS, use_default_system_prompt=True, num_image_tokens=4)
    vision = {**vision_sizes(28, 14), "mlp_ratio": 2.0, "num_image_tokens": 4, "projection_dim": 32}
    drawing = {
        "embed_dim": 8, "num_embeddings": 16, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 1],
        "projection_dim": 32, "image_token_embed_dim": 32, "num_res_blocks": 1,
    }  # fmt: skip
    config = JanusConfig(
        text_config=text_sizes(len(words)), vision_config=vision, vq_config=drawing, image_token_id=words.image_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip
    return TinyFamily(processor, JanusForConditionalGeneration(config), "model.language_model.layers", recipe="janus")


FAMILIES: dict[str, Callable[[], TinyFamily]] = {f.__name__: f for f in (deepseek_vl, deepseek_vl_hybrid, janus)}
