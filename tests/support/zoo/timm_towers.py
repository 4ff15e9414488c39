"""Types whose vision towers are timm's: Gemma 3n, FastVLM, PerceptionLM. Without timm they cannot be built."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import with_torchvision  # noqa: F401 (before transformers)
from tiny_families import GEMMA, IMAGE, TinyFamily, image_token_types, text_sizes, tokenizer
from transformers import (
    CLIPImageProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    Gemma3nAudioFeatureExtractor,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma3nProcessor,
    LlamaConfig,
    LlavaProcessor,
    PerceptionLMConfig,
    PerceptionLMForConditionalGeneration,
    PerceptionLMImageProcessor,
    PerceptionLMProcessor,
    PerceptionLMVideoProcessor,
    Qwen2Config,
    SiglipImageProcessor,
    TimmWrapperConfig,
)

# chat_template.jinja of hf/google/gemma-3n-E2B-it, as in unslothai/unsloth's chat_templates.py: Gemma 3's, with other tags
GEMMA_3N = GEMMA.replace(
    "{{ '<start_of_image>' }}", "{{ '<image_soft_token>' }}{% elif c['type'] == 'audio' %}{{ '<audio_soft_token>' }}"
)
# transformers/src/transformers/models/fast_vlm/convert_fastvlm_weights_to_hf.py
FASTVLM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + c['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# transformers/src/transformers/models/perception_lm/convert_perception_lm_weights_to_hf.py; its system turn is longer
PERCEPTION = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nYou understand pictures.<|eot_id|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<|image|>' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'video') %}{{ '<|video|>' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] | trim }}{% endfor %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def gemma3n() -> TinyFamily:
    # the last four have embeddings beside the text's, as published; so have runs of newlines here, which are added last
    words = tokenizer(
        "<start_of_turn>", "<end_of_turn>", newlines=True, boi_token="<start_of_image>", boa_token="<start_of_audio>",
        eoi_token="<end_of_image>", image_token="<image_soft_token>", eoa_token="<end_of_audio>",
        audio_token="<audio_soft_token>",
    )  # fmt: skip
    images = SiglipImageProcessor(size={"height": 64, "width": 64}, do_normalize=False)
    processor = Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(), images, words, audio_seq_length=32, image_seq_length=4, chat_template=GEMMA_3N
    )
    # the last two layers take keys and values of those before; all carry four streams
    text = {
        **text_sizes(len(words)), "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_kv_shared_layers": 2, "sliding_window": 16, "head_dim": 8, "hidden_size_per_layer_input": 16, "laurel_rank": 8,
        "vocab_size_per_layer_input": words.eoi_token_id, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
    }  # fmt: skip
    # MobileNetV5 cannot be made small by what a config.json can say
    tower = {
        "architecture": "test_efficientnet", "hidden_size": 256, "vocab_size": 2, "vocab_offset": words.eoi_token_id,
        "initializer_range": 0.3,
    }  # fmt: skip
    audio = {
        "hidden_size": 32, "vocab_size": len(words) - words.eoa_token_id, "vocab_offset": words.eoa_token_id,
        "conf_num_hidden_layers": 1, "conf_num_attention_heads": 4, "sscp_conv_channel_size": [8, 4],
    }  # fmt: skip
    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("image", "boi", "eoi", "audio", "boa", "eoa")}
    config = Gemma3nConfig(
        text_config=text, vision_config=tower, audio_config=audio, **ids, vision_soft_tokens_per_image=4,
        audio_soft_tokens_per_image=32, initializer_range=0.3,
    )  # fmt: skip
    model = Gemma3nForConditionalGeneration(config)
    for layer in model.model.language_model.layers:  # zeros at first: what each layer is told of the tokens would say nothing
        torch.nn.init.normal_(layer.altup.correct_output_scale)
    composed = partial(image_token_types, words.image_token_id)
    return TinyFamily(processor, model, "model.language_model.layers", first=2, composed=composed)


def fast_vlm() -> TinyFamily:
    words = tokenizer("<|im_start|>", "<|im_end|>", bos=False)
    images = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    processor = LlavaProcessor(
        images, words, patch_size=32, vision_feature_select_strategy="full", num_additional_image_tokens=0, chat_template=FASTVLM
    )
    # five stages and 64 pixels to a patch as published would need larger images
    sizes = {
        "layers": [1] * 4, "embed_dims": [8, 16, 32, 32], "mlp_ratios": [2, 2, 2, 2], "downsamples": [False, True, True, True],
        "se_downsamples": [False] * 4, "pos_embs": [None] * 4, "token_mixers": ["repmixer", "repmixer", "repmixer", "attention"],
    }  # fmt: skip
    tower = TimmWrapperConfig(
        architecture="fastvit_mci3", hidden_size=64, do_pooling=True, global_pool="avg", initializer_range=0.3,
        model_args={**sizes, "inference_mode": True},
    )  # fmt: skip
    config = FastVlmConfig(
        text_config=Qwen2Config(**text_sizes(len(words))), vision_config=tower, image_token_index=IMAGE, image_seq_length=4
    )
    return TinyFamily(processor, FastVlmForConditionalGeneration(config), "model.language_model.layers")


def perception_lm() -> TinyFamily:
    words = tokenizer(
        "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", bos=False, image_token="<|image|>", video_token="<|video|>"
    )
    images = PerceptionLMImageProcessor(tile_size=28, max_num_tiles=4, vision_input_type="thumb+tile")
    videos = PerceptionLMVideoProcessor(size={"height": 28, "width": 28})
    processor = PerceptionLMProcessor(videos, images, words, patch_size=7, pooling_ratio=2, chat_template=PERCEPTION)
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 7, "img_size": [28, 28], "ref_feat_shape": [4, 4]}
    tower = TimmWrapperConfig(
        architecture="vit_pe_lang_large_patch14_448", model_args={**sizes, "global_pool": ""}, num_features=32,
        initializer_range=0.3,
    )  # fmt: skip
    config = PerceptionLMConfig(
        text_config=LlamaConfig(**text_sizes(len(words))), vision_config=tower, projector_pooling_ratio=2,
        image_token_id=words.image_token_id, video_token_id=words.video_token_id,
    )  # fmt: skip
    return TinyFamily(processor, PerceptionLMForConditionalGeneration(config), "model.language_model.layers")


FAMILIES: dict[str, Callable[[], TinyFamily]] = {f.__name__: f for f in (gemma3n, fast_vlm, perception_lm)}
