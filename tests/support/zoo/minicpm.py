"""Tiny MiniCPM-V: Qwen3.5's decoder of linear and full attention, images as slices packed into one tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny_families import TinyFamily, text_sizes, tokenizer
from transformers import (
    MiniCPMOcrConfig,
    MiniCPMOcrForConditionalGeneration,
    MiniCPMOcrImageProcessor,
    MiniCPMOcrProcessor,
    MiniCPMOcrVideoProcessor,
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_6Processor,
    MiniCPMV4_7Config,
    MiniCPMV4_7ForConditionalGeneration,
    MiniCPMV4_7Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.minicpmv4_6.image_processing_minicpmv4_6 import MiniCPMV4_6ImageProcessor
from transformers.models.minicpmv4_6.video_processing_minicpmv4_6 import MiniCPMV4_6VideoProcessor

# Not found published. Turns as Qwen3.5's, whose decoder it has, with thinking off; the processor itself writes the marks around
# an image for its one token (transformers/src/transformers/models/minicpmv4_6/processing_minicpmv4_6.py)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|image_pad|>{% elif c['type'] == 'video' %}<|video_pad|>"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
#: Of the tokenizer, as SGLang's processor for minicpmv4_6 names them.
MARKS = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>", "image_end_token": "</image>",
    "slice_start_token": "<slice>", "slice_end_token": "</slice>", "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}  # fmt: skip
LINEAR = {
    "linear_conv_kernel_dim": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip


def minicpmv4_6() -> TinyFamily:
    words = minicpm_words()
    processor = MiniCPMV4_6Processor(**minicpm_parts(words))
    model = sharpened(MiniCPMV4_6ForConditionalGeneration(MiniCPMV4_6Config(**minicpm_sizes(words))))
    return TinyFamily(processor, model, "model.language_model.layers", recipe="minicpmv4_6")


def minicpmv4_7() -> TinyFamily:
    """Positions of three dimensions, laid out by the marks around slices."""
    words = minicpm_words()
    processor = MiniCPMV4_7Processor(**minicpm_parts(words))
    marks = {f"{place}_id": words.convert_tokens_to_ids(MARKS[f"{place}_token"]) for place in ("image_start", "image_end")}
    marks |= {f"{place}_id": words.convert_tokens_to_ids(MARKS[f"{place}_token"]) for place in ("slice_start", "slice_end")}
    (newline,) = words("\n")["input_ids"]
    model = sharpened(MiniCPMV4_7ForConditionalGeneration(MiniCPMV4_7Config(**minicpm_sizes(words), **marks, newline_id=newline)))

    def composed(ids: torch.Tensor, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"mm_token_type_ids": torch.tensor(processor.create_mm_token_type_ids(ids.tolist()))}

    return TinyFamily(processor, model, "model.language_model.layers", recipe="minicpmv4_7", composed=composed)


def minicpm_ocr() -> TinyFamily:
    """As MiniCPM-V 4.6 with four times as many tokens to an image."""
    words = minicpm_words()
    sizes: dict[str, Any] = {"scale_resolution": 16, "max_slice_nums": 2, "patch_size": 4, "downsample_mode": "4x"}
    processor = MiniCPMOcrProcessor(
        MiniCPMOcrImageProcessor(**sizes), MiniCPMOcrVideoProcessor(**sizes | {"slice_mode": False}), words,
        chat_template=TEMPLATE,
    )  # fmt: skip
    taken = {name: size for name, size in minicpm_sizes(words).items() if name != "image_size"}
    config = MiniCPMOcrConfig(**taken, downsample_mode="4x", tie_word_embeddings=False)
    model = sharpened(MiniCPMOcrForConditionalGeneration(config))
    return TinyFamily(processor, model, "model.language_model.layers", recipe="minicpm_ocr")


def sharpened(model: Any) -> Any:
    """With norms of queries and keys that let attention choose: at first it takes the mean, and every prompt ends alike."""
    for name, weight in model.get_decoder().named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.constant_(weight, 2.0)
    return model


def minicpm_words() -> PreTrainedTokenizerFast:
    return tokenizer("<|im_start|>", "<|im_end|>", added=["<think>", "</think>"], bos=False, **MARKS)


def minicpm_parts(words: PreTrainedTokenizerFast) -> dict[str, Any]:
    """16 pixels to a token: an image has 4, a large one as many for each of its slices."""
    sizes: dict[str, Any] = {"scale_resolution": 32, "max_slice_nums": 2, "patch_size": 4}
    return {
        "image_processor": MiniCPMV4_6ImageProcessor(**sizes), "tokenizer": words, "chat_template": TEMPLATE,
        "video_processor": MiniCPMV4_6VideoProcessor(**sizes | {"slice_mode": False}),
    }  # fmt: skip


def minicpm_sizes(words: PreTrainedTokenizerFast) -> dict[str, Any]:
    kinds = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
    text = {**text_sizes(len(words)), "head_dim": 8, "layer_types": kinds, "rope_parameters": rope, **LINEAR}
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
        "patch_size": 4, "initializer_range": 0.3,
    }  # fmt: skip
    return {
        "text_config": {**text, "model_type": "qwen3_5_text"}, "vision_config": vision, "insert_layer_id": 1, "image_size": 32,
        "image_token_id": words.image_token_id, "video_token_id": words.video_token_id,
    }  # fmt: skip


FAMILIES: dict[str, Callable[[], TinyFamily]] = {f.__name__: f for f in (minicpmv4_6, minicpmv4_7, minicpm_ocr)}
