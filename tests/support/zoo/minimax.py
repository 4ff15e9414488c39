"""Tiny MiniMax M3: experts behind a dense first layer, and attention to chosen blocks of keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiny_families import TinyFamily, text_sizes, tokenizer
from transformers import (
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLConfig,
    MiniMaxM3VLImageProcessor,
    MiniMaxM3VLProcessor,
    MiniMaxM3VLVideoProcessor,
)

from zoo.minicpm import sharpened

# As ms-swift's MinimaxM3VLTemplate says of hf/MiniMaxAI/MiniMax-M3's: a system turn of its own, which tells how to think, and the
# conversation's system turn as a developer's, always
TEMPLATE = (
    "]~!b[]~b]system\nYou are a model.\n\n<thinking_instructions>\nThink.\n</thinking_instructions>[e~[\n]~b]developer\n"
    "{{ messages[0]['content'][0]['text'] if messages[0]['role'] == 'system' else 'You are a helpful assistant.' }}[e~[\n"
    "{% for m in messages if m['role'] != 'system' %}]~b]{{ 'ai' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}]<]image[>[{% elif c['type'] == 'video' %}]<]video[>["
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}[e~[\n{% endfor %}"
    "{% if add_generation_prompt %}]~b]ai\n{% endif %}"
)


def minimax_m3_vl(blocks: int = 32) -> TinyFamily:
    """blocks: of 8 keys, that a token sees. A prompt that is longer reads otherwise behind padding: blocks begin with it."""
    marks = ["]<]image[>[", "]<]video[>[", "]<]start of image[>[", "]<]end of image[>["]
    words = tokenizer("]~!b[", "]~b]", "[e~[", *marks, bos=False)
    sizes: dict[str, Any] = {"patch_size": 7, "temporal_patch_size": 2, "merge_size": 2}
    pixels = {"size": {"shortest_edge": 14 * 14 * 4, "longest_edge": 14 * 14 * 16}}
    images, videos = MiniMaxM3VLImageProcessor(**sizes, **pixels), MiniMaxM3VLVideoProcessor(**sizes)
    processor = MiniMaxM3VLProcessor(images, words, videos, chat_template=TEMPLATE)
    text = {
        **text_sizes(len(words)), "head_dim": 8, "rotary_dim": 4, "dense_intermediate_size": 64, "intermediate_size": 32,
        "shared_intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse", "full_attention"],
        "index_n_heads": 2, "index_head_dim": 8, "index_block_size": 8, "index_topk_blocks": blocks,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
        "patch_size": 7, "initializer_range": 0.3,
    }  # fmt: skip
    image, video = words.convert_tokens_to_ids(marks[:2])
    config = MiniMaxM3VLConfig(
        text_config=text, vision_config=vision, image_token_index=image, video_token_index=video, projector_hidden_size=32
    )
    model = sharpened(MiniMaxM3SparseForConditionalGeneration(config))
    return TinyFamily(processor, model, "model.language_model.layers", recipe="minimax_m3_vl")


FAMILIES: dict[str, Callable[[], TinyFamily]] = {f.__name__: f for f in (minimax_m3_vl,)}
