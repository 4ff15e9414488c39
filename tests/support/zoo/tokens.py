"""Tiny Chameleon and Emu3: an image is words of the vocabulary, that a model of its own finds.

Neither has a published template: the recipes hold one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tiny_families import TinyFamily, text_sizes, tokenizer
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonProcessor,
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3ImageProcessor,
    Emu3Processor,
)
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

#: Words that a picture can be made of.
CODES = 16


def chameleon() -> TinyFamily:
    codes = [f"IMGIMG{''.join('ABCDEFGHIJ'[int(digit)] for digit in str(code))}Z" for code in range(CODES)]
    words = tokenizer("<racm3:break>", "<eoss>", "<reserved08706>", *codes)
    words.sep_token = "<reserved08706>"
    images = ChameleonImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = ChameleonProcessor(images, words, image_seq_length=16)
    sizes = {
        "embed_dim": 8, "num_embeddings": CODES, "latent_channels": 32, "resolution": 32, "base_channels": 32,
        "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1,
    }  # fmt: skip
    config = ChameleonConfig(**text_sizes(len(words)), vocabulary_map=words.get_vocab(), vq_config=sizes)
    model = ChameleonForConditionalGeneration(config)
    drawing = model.model.vqmodel
    spread(drawing.quantize.embedding, drawing.quant_conv)
    return TinyFamily(processor, model, "model.layers", recipe="chameleon")


def emu3() -> TinyFamily:
    codes = [f"<|visual token {code:06d}|>" for code in range(CODES)]
    named = {
        "boi_token": "<|image start|>", "eoi_token": "<|image end|>", "image_wrapper_token": "<|image token|>",
        "eof_token": "<|extra_201|>", "image_token": "<image>",
    }  # fmt: skip
    words = tokenizer("<|extra_200|>", *codes, bos=False, **named)
    images = Emu3ImageProcessor(min_pixels=16 * 16, max_pixels=24 * 32)
    processor = Emu3Processor(images, words)
    sizes = {
        "codebook_size": CODES, "base_channels": 32, "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1,
        "hidden_size": 32, "attn_resolutions": [],
    }  # fmt: skip
    config = Emu3Config(text_config=text_sizes(len(words)), vq_config=sizes, vocabulary_map=words.get_vocab())
    model = Emu3ForConditionalGeneration(config)
    drawing = model.model.vqmodel
    spread(drawing.quantize.embedding, drawing.quant_conv)
    return TinyFamily(processor, model, "model.text_model.layers", recipe="emu3")


def spread(codes: torch.nn.Embedding, finder: torch.nn.Module) -> None:
    """Codes that pictures reach by random weights: at first they lie so close to each other that all pictures are one."""
    torch.nn.init.normal_(codes.weight)
    for weight in finder.parameters():
        torch.nn.init.normal_(weight, std=2.0)


FAMILIES: dict[str, Callable[[], TinyFamily]] = {f.__name__: f for f in (chameleon, emu3)}
