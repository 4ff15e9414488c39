"""Tiny models that read documents: Qianfan-OCR, DeepSeek-OCR 2, Unlimited-OCR.

The last two have no published template: the recipes hold one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiny_families import IMAGE, TinyFamily, text_sizes, tokenizer, vision_sizes
from transformers import (
    DeepseekOcr2Config,
    DeepseekOcr2ForConditionalGeneration,
    DeepseekOcr2Processor,
    QianfanOCRConfig,
    QianfanOCRForConditionalGeneration,
    QianfanOCRProcessor,
)
from transformers.models.deepseek_ocr2.image_processing_pil_deepseek_ocr2 import DeepseekOcr2ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from zoo.minicpm import sharpened

# Not found published: Qwen3's turns, whose decoder it has, and the processor's placeholder
# (transformers/src/transformers/models/qianfan_ocr/processing_qianfan_ocr.py)
QIANFAN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qianfan_ocr() -> TinyFamily:
    """Tiles and the whole, as InternVL, whose tower it has, with a Qwen3."""
    marks = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    words = tokenizer("<|im_start|>", "<|im_end|>", added=["<think>", "</think>"], bos=False, **marks)
    images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=2)
    processor = QianfanOCRProcessor(images, words, image_seq_length=4, chat_template=QIANFAN)
    vision = {**vision_sizes(28, 7), "image_size": [28, 28], "patch_size": [7, 7]}
    text = {**text_sizes(len(words)), "model_type": "qwen3", "head_dim": 8}
    config = QianfanOCRConfig(
        text_config=text, vision_config=vision, image_token_id=words.context_image_token_id, image_seq_length=4
    )
    model = sharpened(QianfanOCRForConditionalGeneration(config))
    return TinyFamily(processor, model, "model.language_model.layers", recipe="qianfan_ocr")


def deepseek_ocr2() -> TinyFamily:
    """144 tokens to an image, and one: as many queries are in the code, whatever the patches behind them."""
    words = tokenizer("<|grounding|>")
    images = DeepseekOcr2ImageProcessorPil(size={"height": 96, "width": 96}, tile_size=96)
    processor = DeepseekOcr2Processor(images, words, patch_size=2, downsample_ratio=4)
    reader = {**text_sizes(1), "num_hidden_layers": 2}
    config = DeepseekOcr2Config(
        text_config=experts(len(words)), vision_config={"sam_config": sam(96, 8), "encoder_config": reader},
        image_token_id=IMAGE,
    )  # fmt: skip
    return TinyFamily(
        processor, DeepseekOcr2ForConditionalGeneration(config), "model.language_model.layers", recipe="deepseek_ocr2"
    )


def experts(vocabulary: int) -> dict[str, Any]:
    return {
        **text_sizes(vocabulary), "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1,
        "moe_intermediate_size": 32, "num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    }  # fmt: skip


def sam(image: int, patch: int) -> dict[str, Any]:
    return {
        **vision_sizes(image, patch), "output_channels": 16, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 64,
        "downsample_channels": [32, 32],
    }  # fmt: skip


FAMILIES: dict[str, Callable[[], TinyFamily]] = {f.__name__: f for f in (qianfan_ocr, deepseek_ocr2)}
