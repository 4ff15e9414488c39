"""Qwen3-VL with mixtures of experts, Qwen3.5 and Qwen4 with linear attention. Import with_torchvision before."""

from __future__ import annotations

from typing import Any

from tiny_families import EOS, TinyFamily, text_sizes
from tiny_families_torchvision import MROPE, QWEN3, qwen_family, qwen_ids, qwen_size, qwen_tower, qwen_words
from torch.nn import init
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    Qwen4ExpConfig,
    Qwen4ExpForConditionalGeneration,
)

# chat_template.jinja of hf/Qwen/Qwen3.5-27B: as Qwen3's, and a reply begins with its thoughts
QWEN3_5 = QWEN3.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
#: Of feed-forward layers with experts.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXERS = [f"{kind}_attention" for kind in ("linear", "full", "linear", "full", "linear")]


def thinking_words() -> PreTrainedTokenizerFast:
    words = qwen_words()
    words.add_tokens(["<think>", "</think>"])
    return words


def tower(**sizes: Any) -> dict[str, Any]:
    return qwen_tower(intermediate_size=64, out_hidden_size=32, num_position_embeddings=16, **sizes)


def hybrid() -> dict[str, Any]:
    """Published: three of four layers are linear."""
    return {
        "num_hidden_layers": 5, "layer_types": list(MIXERS), "head_dim": 32, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "rope_parameters": {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 0.25},
    }  # fmt: skip


def family(words: PreTrainedTokenizerFast, template: str, model: Any, first: int = 1) -> TinyFamily:
    images, videos = Qwen2VLImageProcessor(**qwen_size()), Qwen3VLVideoProcessor(**qwen_size())
    tiny = qwen_family(Qwen3VLProcessor(images, words, videos, chat_template=template), model)
    return TinyFamily(tiny.processor, model, tiny.layers, first=first, composed=tiny.composed)


def qwen3_vl_moe() -> TinyFamily:
    words = qwen_words()
    text = text_sizes(len(words)) | EXPERTS | {"head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=tower(deepstack_visual_indexes=[0, 1]), **qwen_ids(words))
    return family(words, QWEN3, Qwen3VLMoeForConditionalGeneration(config))


def qwen3_5() -> TinyFamily:
    words = thinking_words()
    config = Qwen3_5Config(text_config=text_sizes(len(words)) | hybrid(), vision_config=tower(), **qwen_ids(words))
    return family(words, QWEN3_5, Qwen3_5ForConditionalGeneration(config), first=2)


def qwen3_5_moe() -> TinyFamily:
    words = thinking_words()
    text = text_sizes(len(words)) | hybrid() | EXPERTS | {"shared_expert_intermediate_size": 32}
    config = Qwen3_5MoeConfig(text_config=text, vision_config=tower(), **qwen_ids(words))
    return family(words, QWEN3_5, Qwen3_5MoeForConditionalGeneration(config), first=2)


def qwen4_exp() -> TinyFamily:
    """Several residual streams side by side: decoder layers put out `hc_count` times the hidden size."""
    words = thinking_words()
    streams = {"hc_count": 2, "hc_lowrank": 8}
    ngrams = {
        "ple_layer_ids": [1, 5], "ple_embed_dim": 16, "ple_conv_kernel_size": 2, "ngram_size": 3, "heads_per_ngram": 2,
        "ngram_vocab_size_base": 31, "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 4,
    }  # fmt: skip
    indexer = {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2,
    }  # fmt: skip
    sizes = text_sizes(len(words)) | hybrid() | EXPERTS | {"shared_expert_intermediate_size": 32, "eos_token_id": EOS}
    config = Qwen4ExpConfig(text_config=sizes | streams | ngrams | indexer, vision_config=tower(), **qwen_ids(words))
    model = Qwen4ExpForConditionalGeneration(config)
    for layer in (model.model.language_model.layers[i] for i in (0, 4)):  # zeros at first: n-grams would say nothing
        init.normal_(layer.ple.conv1d.weight, std=0.3)
    return family(words, QWEN3_5, model, first=2)


FAMILIES = {f.__name__: f for f in (qwen3_vl_moe, qwen3_5, qwen3_5_moe, qwen4_exp)}
