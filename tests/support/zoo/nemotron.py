"""Tiny Nemotron 3 Nano Omni: state-space layers, attention and experts, each a layer of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiny_families import TinyFamily, text_sizes, tokenizer
from transformers import (
    NemotronH_Omni_Reasoning_V3,
    NemotronH_Omni_Reasoning_V3_Config,
    NemotronH_Omni_Reasoning_V3ImageProcessor,
    NemotronH_Omni_Reasoning_V3Processor,
    NemotronH_Omni_Reasoning_V3VideoProcessor,
    ParakeetFeatureExtractor,
)

# Not found published. Turns as the text model's, hf/nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16: a system turn always, and the
# beginning of a thought
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% elif c['type'] == 'video' %}<video>\n{% elif 'text' in c %}{{ c['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def nemotron_h_omni() -> TinyFamily:
    """Without its ear: `audio_config` may be absent."""
    marks = ["<video>", "<so_embedding>", "<so_start>", "<so_end>", "<img>", "</img>"]
    words = tokenizer("<|im_start|>", "<|im_end|>", *marks, added=["<think>", "</think>"], bos=False)
    patches: dict[str, Any] = {"patch_size": 7, "downsample_ratio": 0.5}
    half = [0.5, 0.5, 0.5]
    processor = NemotronH_Omni_Reasoning_V3Processor(
        NemotronH_Omni_Reasoning_V3ImageProcessor(
            **patches, image_mean=half, image_std=half, min_num_patches=16, max_num_patches=32, max_model_len=512
        ),
        NemotronH_Omni_Reasoning_V3VideoProcessor(**patches, norm_mean=half, norm_std=half, video_target_num_patches=16),
        words, ParakeetFeatureExtractor(feature_size=8), chat_template=TEMPLATE,
    )  # fmt: skip
    text = {
        **text_sizes(len(words)), "head_dim": 8, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention", "moe", "full_attention"],
        "ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 8, "n_routed_experts": 4,
    }  # fmt: skip
    del text["num_hidden_layers"]
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2.0, "patch_size": 7,
        "image_size": 28, "max_img_size": 56, "num_cls_tokens": 2, "num_registers": 1, "video_temporal_patch_size": 2,
        "initializer_range": 0.3,
    }  # fmt: skip
    config = NemotronH_Omni_Reasoning_V3_Config(
        text_config=text, vision_config=vision, force_image_size=28, projector_hidden_size=32, vision_hidden_size=32,
        image_token_id=processor.image_token_id, video_token_id=processor.video_token_id,
        audio_token_id=processor.audio_token_id,
    )  # fmt: skip
    return TinyFamily(processor, NemotronH_Omni_Reasoning_V3(config), "language_model.model.layers", recipe="nemotron_h_omni")


FAMILIES: dict[str, Callable[[], TinyFamily]] = {f.__name__: f for f in (nemotron_h_omni,)}
