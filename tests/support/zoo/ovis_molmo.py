"""Tiny Ovis2 and Molmo2."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tiny_families import TinyFamily, text_sizes, tokenizer, vision_sizes
from transformers import (
    Molmo2Config,
    Molmo2ForConditionalGeneration,
    Molmo2ImageProcessor,
    Molmo2Processor,
    Molmo2VideoProcessor,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Ovis2Processor,
)
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

# transformers/tests/models/ovis2/test_processing_ovis2.py, which names what hf/thisisiron/Ovis2-1B-hf gives: a system turn always
OVIS = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# transformers/tests/models/molmo2/test_processing_molmo2.py: the published one has no system turn and wants roles that alternate
MOLMO = (
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|image|>{% elif c['type'] == 'video' %}<|video|>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def ovis2() -> TinyFamily:
    """Images are soft words of a vocabulary of their own; five marks around and between tiles have features of it too."""
    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    words = tokenizer("<|im_start|>", "<|im_end|>", "<IMG_ATOM>", *marks, bos=False)
    images = Ovis2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=2)
    processor = Ovis2Processor(images, words, chat_template=OVIS, image_seq_length=4)
    text = text_sizes(len(words))
    config = Ovis2Config(
        text_config={**text, "model_type": "qwen2"}, vision_config={**vision_sizes(28, 14), "vocab_size": 64},
        image_token_id=words.convert_tokens_to_ids("<IMG_ATOM>"), visual_indicator_token_ids=words.convert_tokens_to_ids(marks),
        vocab_size=len(words), hidden_size=text["hidden_size"], tie_word_embeddings=False,
    )  # fmt: skip
    return TinyFamily(processor, Ovis2ForConditionalGeneration(config), "model.language_model.layers", recipe="ovis2")


def molmo2() -> TinyFamily:
    """Marks of images lie behind the vocabulary that the model writes, in embeddings of their own; images see both ways."""
    marks = ["<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>", "<im_low>", "<frame_start>", "<frame_end>"]
    words = tokenizer(
        "<|im_start|>", "<|im_end|>", "<im_start>", *marks, bos=False, image_token="<|image|>", video_token="<|video|>"
    )
    size, pooling = {"height": 28, "width": 28}, {"patch_size": 7, "pooling_size": [2, 2]}
    images = Molmo2ImageProcessor(size=size, max_crops=2, overlap_margins=[1, 1], **pooling)
    processor = Molmo2Processor(images, Molmo2VideoProcessor(size=size, num_frames=2, **pooling), words, chat_template=MOLMO)
    behind = {mark: words.convert_tokens_to_ids(mark) for mark in ["<im_start>", *marks]}
    heads = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "initializer_range": 0.3}
    text = text_sizes(behind["<im_start>"]) | {"head_dim": 8, "additional_vocab_size": len(words) - behind["<im_start>"]}
    config = Molmo2Config(
        text_config={**text, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        vision_config={**heads, "intermediate_size": 64, "num_hidden_layers": 3, "image_size": [28, 28], "patch_size": 7},
        adapter_config={**heads, "vision_feature_layer": [2, 1], "intermediate_size": 64, "text_hidden_size": 32},
        image_start_token_id=behind["<im_start>"], low_res_image_start_token_id=behind["<low_res_im_start>"],
        image_end_token_id=behind["<im_end>"], image_patch_id=behind["<im_patch>"], initializer_range=0.3,
        frame_start_token_id=behind["<frame_start>"], frame_end_token_id=behind["<frame_end>"],
    )  # fmt: skip

    def composed(ids: torch.Tensor, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"mm_token_type_ids": torch.tensor(processor.create_mm_token_type_ids(ids.tolist()))}

    model = Molmo2ForConditionalGeneration(config)
    return TinyFamily(processor, model, "model.language_model.layers", recipe="molmo2", composed=composed)


FAMILIES: dict[str, Callable[[], TinyFamily]] = {f.__name__: f for f in (ovis2, molmo2)}
