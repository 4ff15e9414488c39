"""Tiny Inkling and Inkling 2: experts, sliding windows, short convolutions, and attention by distance instead of rotation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiny_families import TinyFamily, text_sizes, tokenizer
from transformers import (
    Inkling2Config,
    Inkling2ForConditionalGeneration,
    Inkling2ImageProcessor,
    Inkling2Processor,
    InklingConfig,
    InklingFeatureExtractor,
    InklingForConditionalGeneration,
    InklingImageProcessor,
    InklingProcessor,
    PreTrainedTokenizerFast,
)

# vLLM's rust/src/chat/src/renderer/inkling, with its tests, for hf/thinkingmachines/Inkling: every part is a message of its own,
# and the effort of thinking is said once, before the first turn that is not the system's
TEMPLATE = (
    "{% set said = namespace(effort=false) %}{% for m in messages %}"
    "{% if m['role'] != 'system' and not said.effort %}{% set said.effort = true %}"
    "<|message_system|><|content_text|>Thinking effort level: 0.9<|end_message|>{% endif %}"
    "{% for c in m['content'] %}{{ '<|message_model|>' if m['role'] == 'assistant' else '<|message_' + m['role'] + '|>' }}"
    "{% if c['type'] == 'image' %}<|content_image|><|unused_200054|>"
    "{% elif c['type'] == 'text' %}<|content_text|>{{ c['text'] }}{% endif %}<|end_message|>{% endfor %}"
    "{% if m['role'] == 'assistant' %}<|content_model_end_sampling|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|message_model|>{% endif %}"
)
MARKS = ["message_user", "message_model", "message_system", "content_text", "content_image", "content_audio_input"]
ENDS = ["end_message", "content_model_end_sampling", "unused_200053", "unused_200054"]
SQUARE = {"height": 20, "width": 20}


def inkling_mm_model() -> TinyFamily:
    """It hears as well."""
    words = inkling_words()
    sound = InklingFeatureExtractor(feature_size=8)
    images = InklingImageProcessor(size={"height": 10, "width": 10}, rescale_image_frac=0.5)
    processor = InklingProcessor(sound, images, words, chat_template=TEMPLATE)
    ids = {
        f"{name}_id": words.convert_tokens_to_ids(getattr(processor, name))
        for name in ("image_token", "audio_token", "image_bos_token", "audio_bos_token")
    }
    text = {
        **windows(len(words)), "intermediate_size": 64, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "n_shared_experts": 1, "logits_mup_width_multiplier": 1.0,
    }  # fmt: skip
    vision = {"patch_size": 10, "num_hidden_layers": 4, "initializer_range": 0.3}  # with fewer layers it needs scipy
    config = InklingConfig(text_config=text, vision_config=vision, audio_config={"n_mel_bins": 8, "mel_vocab_size": 16}, **ids)
    return TinyFamily(
        processor, InklingForConditionalGeneration(config), "model.language_model.layers", recipe="inkling_mm_model"
    )


def inkling2() -> TinyFamily:
    """Layers take the sums of earlier blocks of layers, by attention."""
    words = inkling_words()
    processor = Inkling2Processor(Inkling2ImageProcessor(size=SQUARE), words, chat_template=TEMPLATE)
    text = {**windows(len(words)), "n_layers_per_attn_res_block": 2, "final_logit_softcapping": 30.0}
    vision = {
        "patch_size": 10, "spatial_merge_size": 2, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "posemb_grid_size": 4, "projection_hidden_dim": 32, "text_hidden_size": 32, "initializer_range": 0.3,
    }  # fmt: skip
    image = words.convert_tokens_to_ids("<|unused_200054|>")
    config = Inkling2Config(text_config=text, vision_config=vision, image_token_id=image)
    return TinyFamily(processor, Inkling2ForConditionalGeneration(config), "model.language_model.layers", recipe="inkling2")


def inkling_words() -> PreTrainedTokenizerFast:
    return tokenizer(*(f"<|{name}|>" for name in [*MARKS, *ENDS]), bos=False)


def windows(vocabulary: int) -> dict[str, Any]:
    sizes = {name: size for name, size in text_sizes(vocabulary).items() if name != "intermediate_size"}
    return {
        **sizes, "unpadded_vocab_size": vocabulary, "head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
        "swa_head_dim": 8, "sliding_window_size": 16, "d_rel": 4, "rel_extent": 32, "conv_kernel_size": 3,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"], "moe_intermediate_size": 32,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "route_scale": 1.0,
    }  # fmt: skip


FAMILIES: dict[str, Callable[[], TinyFamily]] = {f.__name__: f for f in (inkling_mm_model, inkling2)}
