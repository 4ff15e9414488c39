"""LFM3-VL, dots3 and NVIDIA's Cosmos reasoners. Import with_torchvision before."""

from __future__ import annotations

from tiny_families import TinyFamily, text_sizes, tokenizer
from tiny_families_torchvision import MROPE, QWEN3, qwen_family, qwen_ids, qwen_size, qwen_words
from transformers import (
    Cosmos3EdgeConfig,
    Cosmos3EdgeForConditionalGeneration,
    Cosmos3EdgeImageProcessor,
    Cosmos3EdgeProcessor,
    Cosmos3EdgeVideoProcessor,
    Cosmos3OmniConfig,
    Cosmos3OmniForConditionalGeneration,
    Dots3NoteConfig,
    Dots3NoteFeatureExtractor,
    Dots3NoteForConditionalGeneration,
    Dots3NoteProcessor,
    Lfm3VlConfig,
    Lfm3VlForConditionalGeneration,
    Lfm3VlProcessor,
    Qwen2VLImageProcessor,
    Qwen3VLVideoProcessor,
)

from zoo.qwen import family, tower

# the published one was not found: turns as hf/LiquidAI/LFM2-VL-3B's, images in the processor's tokens
LFM = "{{ bos_token }}" + QWEN3
# the published one was not found: turns as hf/rednote-hilab/dots.vlm1.inst's, images in the processor's token
DOTS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|img|><|imgpad|><|endofimg|>{% elif c['type'] == 'video' %}<|video_pad|>"
    "{% elif c['type'] == 'audio' %}<|audio_comp_pad|>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}<|endof{{ m['role'] }}|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 7,
    "initializer_range": 0.3,
}  # fmt: skip


def lfm3_vl() -> TinyFamily:
    """Convolutions, windows and full attention; convolutions in the vision tower too."""
    words = qwen_words()
    kinds = ["conv", "full_attention", "sliding_attention"] * 2
    text = text_sizes(len(words)) | {
        "model_type": "lfm3", "num_hidden_layers": 6, "layer_types": kinds, "head_dim": 8, "sliding_window": 16,
    }  # fmt: skip
    config = Lfm3VlConfig(
        text_config=text, vision_config=TOWER | {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
        projector_hidden_size=32, tie_word_embeddings=False, **qwen_ids(words),
    )  # fmt: skip
    images, videos = Qwen2VLImageProcessor(**qwen_size()), Qwen3VLVideoProcessor(**qwen_size())
    processor = Lfm3VlProcessor(images, words, videos, chat_template=LFM)
    return TinyFamily(processor, Lfm3VlForConditionalGeneration(config), "model.language_model.layers", first=3)


def dots3_note() -> TinyFamily:
    """Experts in the vision tower as well; images, videos and sounds."""
    turns = [f"<|{edge}{role}|>" for role in ("system", "user", "assistant") for edge in ("", "endof")]
    media = ["<|img|>", "<|imgpad|>", "<|endofimg|>", "<|video_pad|>", "<|audio_comp_pad|>"]
    words = tokenizer(*turns, *media, bos=False)
    kinds = [f"{kind}_attention" for kind in ("indexed", "sliding", "indexed", "sliding", "indexed")]
    # of shorter prompts than index_topk, here and published, all tokens are seen
    layers = {
        "num_hidden_layers": 5, "layer_types": kinds, "mlp_layer_types": ["dense", *["sparse"] * 4], "sliding_window": 16,
        "index_topk": 512, "index_head_dim": 8, "index_n_heads": 2,
    }  # fmt: skip
    latent = {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 16,
        "num_key_value_heads": 4,
    }  # fmt: skip
    windows = {f"swa_{name}": size for name, size in latent.items() if name != "qk_rope_head_dim"} | {
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
    }
    experts = {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_experts_intermediate_size": 32,
    }  # fmt: skip
    sight = {
        "mlp_layer_types": ["dense", "sparse"], "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "adapter_in_dim": 32, "adapter_out_dim": 32,
    }  # fmt: skip
    ears = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "feature_size": 16,
        "downsample_hidden_size": 8, "adapter_input_size": 32, "adapter_out_dim": 32,
    }  # fmt: skip
    tokens = {"image_token_id": "<|imgpad|>", "video_token_id": "<|video_pad|>", "audio_token_id": "<|audio_comp_pad|>"}
    config = Dots3NoteConfig(
        text_config=text_sizes(len(words)) | layers | latent | windows | experts, vision_config=TOWER | sight, audio_config=ears,
        **{name: words.convert_tokens_to_ids(token) for name, token in tokens.items()},
    )  # fmt: skip
    flat = qwen_size() | {"temporal_patch_size": 1}
    images, videos = Qwen2VLImageProcessor(**flat), Qwen3VLVideoProcessor(**flat)
    sounds = Dots3NoteFeatureExtractor(feature_size=16)
    processor = Dots3NoteProcessor(images, words, videos, sounds, chat_template=DOTS)
    return TinyFamily(processor, Dots3NoteForConditionalGeneration(config), "model.language_model.layers", first=2)


def cosmos3_edge() -> TinyFamily:
    words = qwen_words()
    # its tokenizer_config.json asks for them: transformers/tests/models/cosmos3_edge/test_processing_cosmos3_edge.py
    words.init_kwargs["return_mm_token_type_ids"] = True
    text = text_sizes(len(words)) | {"head_dim": 8, "rope_parameters": dict(MROPE)}
    config = Cosmos3EdgeConfig(
        text_config=text, vision_config=TOWER | {"num_patches": 16}, projector_hidden_size=32, **qwen_ids(words)
    )
    images, videos = Cosmos3EdgeImageProcessor(**qwen_size()), Cosmos3EdgeVideoProcessor(**qwen_size(), return_metadata=True)
    processor = Cosmos3EdgeProcessor(images, words, videos, chat_template=QWEN3)
    return qwen_family(processor, Cosmos3EdgeForConditionalGeneration(config))


def cosmos3_omni() -> TinyFamily:
    words = qwen_words()
    text = text_sizes(len(words)) | {"head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
    config = Cosmos3OmniConfig(
        text_config=text | {"model_type": "qwen3_vl_text"},
        vision_config=tower(deepstack_visual_indexes=[0, 1], model_type="qwen3_vl_vision"), **qwen_ids(words),
    )  # fmt: skip
    return family(words, QWEN3, Cosmos3OmniForConditionalGeneration(config))


FAMILIES = {f.__name__: f for f in (lfm3_vl, dots3_note, cosmos3_omni, cosmos3_edge)}
