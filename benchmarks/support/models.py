"""Random-weight LLaVA checkpoints of any size, with a real tokenizer and processor: what speed depends on, without a download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny import byte_level_tokenizer, tiny_processor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

EOS, PAD, IMAGE = 2, 3, 4
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CORPUS = [
    "USER: What is it? Image Caption: ASSISTANT: Based on the given Request, describe the image. Request:",
    "Who needs it, and what for? Why? How is it made at home?",
]


@dataclass(frozen=True)
class Size:
    """What a LLaVA's cost depends on."""

    hidden: int = 768
    layers: int = 8
    heads: int = 12
    intermediate: int = 2048
    vocabulary: int = 8192
    image: int = 336  # pixels; with patches of 14, 576 image tokens
    vision_hidden: int = 256
    vision_layers: int = 4
    kv_heads: int | None = None  # as many as heads


#: About 75 million parameters.
SMALL = Size()
#: More than a gigabyte in float32, and small images.
GIGABYTE = Size(hidden=1536, layers=8, heads=12, intermediate=4096, vocabulary=16384, image=56)
#: LLaVA-1.5-7B.
FULL = Size(4096, 32, 32, 11008, 32064, 336, 1024, 24)
#: The language model of LLaVA-1.6-34B.
LARGE = Size(7168, 60, 56, 20480, 64064, 336, 1024, 24, kv_heads=8)
_PATCH = 14


def config(size: Size) -> LlavaConfig:
    text = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads or size.heads,
        max_position_embeddings=4096, bos_token_id=1, eos_token_id=EOS, pad_token_id=PAD, tie_word_embeddings=False,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=size.vision_hidden, intermediate_size=4 * size.vision_hidden, num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_hidden // 64, image_size=size.image, patch_size=_PATCH,
    )  # fmt: skip
    return LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, image_seq_length=(size.image // _PATCH) ** 2,
        vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip


def model(size: Size, **options: Any) -> LlavaForConditionalGeneration:
    """Random weights; `options`: device and dtype."""
    torch.manual_seed(0)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(options.get("dtype", torch.float32))
    try:
        with torch.device(options.get("device", "cpu")):
            made = LlavaForConditionalGeneration(config(size))
    finally:
        torch.set_default_dtype(kept)
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = EOS, PAD
    return made.eval()


def processor(image_size: int = 336) -> LlavaProcessor:
    """A tokenizer with a token for each word of the prompts, as real ones have for common words."""
    return tiny_processor(TEMPLATE, byte_level_tokenizer(CORPUS * 2, 1000), image_size)


def save(size: Size, folder: Path, **options: Any) -> LlavaForConditionalGeneration:
    """Write a checkpoint as they are published, and return the model; `options`: device and dtype."""
    made = model(size, **options)
    made.save_pretrained(folder)
    processor(size.image).save_pretrained(folder)
    return made
