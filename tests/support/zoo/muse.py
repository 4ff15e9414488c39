"""Tiny Muse Glimmer and Muse Spark: sliding windows with rotation, and between them full attention without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiny_families import TinyFamily, text_sizes, tokenizer
from transformers import (
    MuseGlimmerConfig,
    MuseGlimmerForConditionalGeneration,
    MuseGlimmerImageProcessor,
    MuseGlimmerProcessor,
    MuseGlimmerVideoProcessor,
    MuseSparkConfig,
    MuseSparkFeatureExtractor,
    MuseSparkForConditionalGeneration,
    MuseSparkProcessor,
    PreTrainedTokenizerFast,
)

# Rendered prompts of hf/meta-models/Muse-Glimmer-30B in the tests of ollama's renderer and in unsloth's notebook: a system turn
# always, with the day and the strength of reasoning; answers are addressed, and the prompt for one ends before its address. Muse
# Spark's was not found and is taken to be the same
TEMPLATE = (
    "{{ bos_token }}<|start|>system<|message|>"
    "{{ messages[0]['content'][0]['text'] if messages[0]['role'] == 'system' else 'You are a helpful AI assistant.' }}"
    "\nCurrent date: {{ strftime_now('%Y-%m-%d') }}.\n\nReasoning strength: {{ reasoning_strength or 'high' }}.<|eot|>"
    "{% for m in messages if m['role'] != 'system' %}<|start|>{{ m['role'] }}"
    "{{ ' to=user' if m['role'] == 'assistant' }}<|message|>{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|patch|>{% elif c['type'] == 'video' %}<|video|>"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
MARKS = [
    "<|start|>", "<|message|>", "<|eot|>", "<|patch|>", "<|image_start|>", "<|image_end|>", "<|video|>", "<|vid_start|>",
    "<|vid_end|>", "<|vid_frame_separator|>", "<|audio|>", "<|soft_audio_start|>", "<|soft_audio_end|>",
]  # fmt: skip
PATCHES: dict[str, Any] = {"patch_size": 7, "temporal_patch_size": 2, "merge_size": 2}


def muse_glimmer() -> TinyFamily:
    words = tokenizer(*MARKS)
    processor = MuseGlimmerProcessor(*muse_pictures(), words, chat_template=TEMPLATE)
    model = MuseGlimmerForConditionalGeneration(MuseGlimmerConfig(**muse_sizes(words)))
    return TinyFamily(processor, model, "model.language_model.layers", recipe="muse_glimmer")


def muse_spark() -> TinyFamily:
    """With experts that are narrower than the stream, gated residuals, and ears."""
    words = tokenizer(*MARKS)
    sound = MuseSparkFeatureExtractor(samples_per_token=96)
    processor = MuseSparkProcessor(*muse_pictures(), words, sound, chat_template=TEMPLATE)
    sizes = muse_sizes(words)
    sizes["text_config"] |= {
        "moe_intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_hidden_size": 16,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    }  # fmt: skip
    ear = {"patch_sizes": [16, 6], "hidden_sizes": [8, 16], "depths": [1, 1], "num_hidden_layers": 2, "out_hidden_size": 32}
    config = MuseSparkConfig(**sizes, audio_config=ear, audio_token_id=words.convert_tokens_to_ids("<|audio|>"))
    return TinyFamily(processor, MuseSparkForConditionalGeneration(config), "model.language_model.layers", recipe="muse_spark")


def muse_pictures() -> tuple[MuseGlimmerImageProcessor, MuseGlimmerVideoProcessor]:
    images = MuseGlimmerImageProcessor(**PATCHES, max_image_tokens=8)
    return images, MuseGlimmerVideoProcessor(**PATCHES, max_video_frame_tokens=4, num_frames=2)


def muse_sizes(words: PreTrainedTokenizerFast) -> dict[str, Any]:
    text = {
        **text_sizes(len(words)), "head_dim": 8, "sliding_window": 16, "output_multiplier": 1.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "layer_rope_theta": [10000.0, 0, 10000.0, 0],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {
        "patch_size": 7, "pos_emb_height": 4, "pos_emb_width": 4, "num_attention_heads": 4, "num_hidden_layers": 2,
        "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 16, "initializer_range": 0.3,
        "layer_types": ["window_attention", "full_attention"],
    }  # fmt: skip
    image, video = words.convert_tokens_to_ids(["<|patch|>", "<|video|>"])
    return {
        "text_config": text, "vision_config": vision, "image_token_id": image, "video_token_id": video, "out_hidden_size": 128,
        "projector_hidden_size": 32,
    }  # fmt: skip


FAMILIES: dict[str, Callable[[], TinyFamily]] = {f.__name__: f for f in (muse_glimmer, muse_spark)}
