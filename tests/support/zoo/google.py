"""Google's: Gemma 4. Gemma 3n needs timm: timm_towers.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import with_torchvision  # noqa: F401 (before transformers)
from tiny_families import TinyFamily, text_sizes, tokenizer
from transformers import (
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4UnifiedAudioFeatureExtractor,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedImageProcessor,
    Gemma4UnifiedProcessor,
    Gemma4UnifiedVideoProcessor,
    Gemma4VideoProcessor,
    PreTrainedTokenizerFast,
)

# models/templates/gemma4.jinja of ggml-org/llama.cpp, commit 75f1ba73, without tools: where thinking is not asked for, the reply
# begins behind an empty thought
GEMMA4 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '\n\n<|image|>\n\n' }}"
    "{% elif c['type'] == 'video' %}{{ '\n\n<|video|>\n\n' }}{% elif c['type'] == 'audio' %}{{ '<|audio|>' }}"
    "{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}{{ '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\n<|channel>thought\n<channel|>' }}{% endif %}"
)


def gemma4_words() -> PreTrainedTokenizerFast:
    marks = ["<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", "<|video|>"]
    return tokenizer(
        *marks, newlines=True, image_token="<|image|>", boi_token="<|image>", eoi_token="<image|>", audio_token="<|audio|>",
        boa_token="<|audio>", eoa_token="<audio|>",
    )  # fmt: skip


def gemma4_ids(words: PreTrainedTokenizerFast) -> dict[str, int]:
    names = ("image_token", "boi_token", "eoi_token", "audio_token", "boa_token")
    ids = {f"{name}_id": getattr(words, f"{name}_id") for name in names}
    return {**ids, "eoa_token_index": words.eoa_token_id, "video_token_id": words.convert_tokens_to_ids("<|video|>")}


def gemma4_text(vocabulary: int) -> dict[str, Any]:
    """With windows and without, in turn; the last two layers take keys and values of those before."""
    kinds = ["sliding_attention", "full_attention"] * 3
    return {
        **text_sizes(vocabulary), "num_hidden_layers": 6, "layer_types": kinds, "num_kv_shared_layers": 2, "sliding_window": 16,
        "head_dim": 8, "global_head_dim": 16, "use_bidirectional_attention": "vision",
    }  # fmt: skip


def gemma4_processor(kind: Any, images: Any, videos: Any, audio: Any, words: PreTrainedTokenizerFast) -> Any:
    """An image has up to 70 tokens of 8 by 8 pixels: the processors take no smaller number."""
    size = {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    return kind(audio, images(**size), words, videos(**size, num_frames=2), chat_template=GEMMA4, image_seq_length=70)


def gemma4_family(processor: Any, model: Any) -> TinyFamily:
    # tied, and scaled by the root of the hidden size: every reply would be the prompt's last token
    model.get_input_embeddings().weight.data.mul_(0.2)
    return TinyFamily(processor, model, "model.language_model.layers", first=2, composed=partial(media_types, processor))


def media_types(processor: Any, ids: torch.Tensor, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the processor's code."""
    return {"mm_token_type_ids": torch.tensor(processor.create_mm_token_type_ids(ids.tolist()))}


def gemma4() -> TinyFamily:
    words = gemma4_words()
    parts = (Gemma4ImageProcessor, Gemma4VideoProcessor, Gemma4AudioFeatureExtractor(feature_size=16))
    processor = gemma4_processor(Gemma4Processor, *parts, words)
    # as E2B, with its embeddings for each layer, and as 26B-A4B, with experts
    text = {
        **gemma4_text(len(words)), "vocab_size_per_layer_input": len(words), "hidden_size_per_layer_input": 16,
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16,
    }  # fmt: skip
    tower = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2, "position_embedding_size": 256, "initializer_range": 0.3,
    }  # fmt: skip
    audio = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "subsampling_conv_channels": [16, 8],
        "conv_kernel_size": 3, "attention_chunk_size": 4, "attention_context_left": 5, "output_proj_dims": 32,
        "use_clipped_linears": False,
    }  # fmt: skip
    config = Gemma4Config(text_config=text, vision_config=tower, audio_config=audio, **gemma4_ids(words), initializer_range=0.3)
    model = Gemma4ForConditionalGeneration(config)
    # ones at first: no patch would know where it is
    torch.nn.init.normal_(model.model.vision_tower.patch_embedder.position_embedding_table)
    return gemma4_family(processor, model)


def gemma4_unified() -> TinyFamily:
    words = gemma4_words()
    parts = (Gemma4UnifiedImageProcessor, Gemma4UnifiedVideoProcessor, Gemma4UnifiedAudioFeatureExtractor())
    processor = gemma4_processor(Gemma4UnifiedProcessor, *parts, words)
    sizes = {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 256, "output_proj_dims": 32}
    config = Gemma4UnifiedConfig(
        text_config=gemma4_text(len(words)), vision_config={**sizes, "initializer_range": 0.3},
        audio_config={"audio_embed_dim": 640}, **gemma4_ids(words), initializer_range=0.3,
    )  # fmt: skip
    return gemma4_family(processor, Gemma4UnifiedForConditionalGeneration(config))


FAMILIES: dict[str, Callable[[], TinyFamily]] = {f.__name__: f for f in (gemma4, gemma4_unified)}
