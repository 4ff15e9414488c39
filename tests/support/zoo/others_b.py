"""Llama 4, Aria, Idefics2, LFM2-VL, Granite for Docling, North Vision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import with_torchvision  # noqa: F401 (before transformers)
from tiny_families import IMAGE, TinyFamily, text_sizes, tokenizer, vision_sizes
from transformers import (
    AriaConfig,
    AriaForConditionalGeneration,
    AriaImageProcessor,
    AriaProcessor,
    CohereCompassConfig,
    CohereCompassForConditionalGeneration,
    CohereCompassImageProcessor,
    CohereCompassProcessor,
    CohereCompassVideoProcessor,
    GraniteDoclingConfig,
    GraniteDoclingForConditionalGeneration,
    GraniteDoclingImageProcessor,
    GraniteDoclingProcessor,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessor,
    Idefics2Processor,
    Lfm2Config,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Lfm2VlImageProcessor,
    Lfm2VlProcessor,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Llama4ImageProcessor,
    Llama4Processor,
    MistralConfig,
    Siglip2VisionConfig,
)

from zoo.google import media_types
from zoo.llava_kin import COMMAND_A, GRANITE

# transformers/src/transformers/models/llama4/processing_llama4.py, without tools
LLAMA4 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|header_start|>' + m['role'] + '<|header_end|>\n\n' }}"
    "{% for c in m['content'] %}{{ '<|image|>' if c['type'] == 'image' else c['text'] }}{% endfor %}{{ '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header_start|>assistant<|header_end|>\n\n' }}{% endif %}"
)
# transformers/tests/models/aria/test_processing_aria.py
ARIA = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{{ '<fim_prefix><|img|><fim_suffix>' if c['type'] == 'image' else c['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# what transformers/tests/models/idefics2/test_processing_idefics2.py expects; the processor's tokenizer adds <s>
IDEFICS2 = (
    "{% for m in messages %}{{ m['role'] | capitalize }}{{ ':' if m['content'][0]['type'] == 'image' else ': ' }}"
    "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# transformers/tests/models/lfm2_vl/test_processing_lfm2_vl.py
LFM2 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# that of hf/CohereLabs/North-Micro-Vision-Instruct was not found: the turns of the same house, its processor's marks of images
COMPASS = COMMAND_A.replace(
    "<|IMG_PATCH|>{% endif %}",
    "<|VISION_START|><|IMAGE_PAD|><|VISION_END|>{% elif c['type'] == 'video' %}<|VIDEO_PAD|>{% endif %}",
)
LAYERS = "model.language_model.layers"


def llama4() -> TinyFamily:
    marks = ["<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<|image|>"]
    words = tokenizer("<|header_start|>", "<|header_end|>", "<|eot|>", *marks, bos=False)
    images = Llama4ImageProcessor(size={"height": 28, "width": 28}, max_patches=4)
    processor = Llama4Processor(images, words, patch_size=7, chat_template=LLAMA4)
    # layers with chunks and RoPE before those that see all and have none; dense layers before those with experts
    text = {
        **text_sizes(len(words)), "num_hidden_layers": 6, "head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 4,
        "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0] * 3, "attention_chunk_size": 16,
    }  # fmt: skip
    tower = {
        **vision_sizes(28, 7), "intermediate_size": 128, "vision_output_dim": 32, "projector_input_dim": 32,
        "projector_output_dim": 32,
    }  # fmt: skip
    named = {"image": "<|patch|>", "boi": "<|image_start|>", "eoi": "<|image_end|>"}
    ids = {f"{name}_token_index": words.convert_tokens_to_ids(token) for name, token in named.items()}
    model = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=tower, **ids))
    return TinyFamily(processor, model, "language_model.model.layers", first=2)


def aria() -> TinyFamily:
    words = tokenizer("<|im_start|>", "<|im_end|>", "<fim_prefix>", "<fim_suffix>", bos=False, image_token="<|img|>")
    processor = AriaProcessor(AriaImageProcessor(), words, ARIA, size_conversion={980: 4})
    text = {**text_sizes(len(words)), "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    # the processor makes every image 980 pixels wide
    tower = {**vision_sizes(980, 140), "model_type": "idefics3_vision", "hidden_size": 16, "intermediate_size": 32}
    config = AriaConfig(
        text_config=text, vision_config=tower, projector_patch_to_query_dict={49: 4}, image_token_index=words.image_token_id,
        initializer_range=0.3,
    )  # fmt: skip
    return TinyFamily(processor, AriaForConditionalGeneration(config), LAYERS)


def idefics2() -> TinyFamily:
    words = tokenizer("<fake_token_around_image>", "<end_of_utterance>")
    images = Idefics2ImageProcessor(size={"shortest_edge": 28, "longest_edge": 56}, do_image_splitting=True)
    processor = Idefics2Processor(images, words, image_seq_len=4, chat_template=IDEFICS2)
    sizes = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 8}
    config = Idefics2Config(
        text_config=MistralConfig(**text_sizes(len(words)), sliding_window=None), vision_config=vision_sizes(56, 14),
        perceiver_config={**sizes, "hidden_size": 32, "num_key_value_heads": 2, "initializer_range": 0.3}, image_token_id=IMAGE,
    )  # fmt: skip
    model = Idefics2ForConditionalGeneration(config)
    # ones at first: all tokens of an image would be equal
    torch.nn.init.normal_(model.model.connector.perceiver_resampler.latents)
    return TinyFamily(processor, model, "model.text_model.layers")


def lfm2_vl() -> TinyFamily:
    tags = [f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)]
    marks = ["<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"]
    words = tokenizer("<|im_start|>", "<|im_end|>", *marks, *tags, bos=False)
    images = Lfm2VlImageProcessor(
        tile_size=28, encoder_patch_size=7, min_image_tokens=1, max_image_tokens=64, max_tiles=4, size={"height": 28, "width": 28}
    )
    processor = Lfm2VlProcessor(images, words, chat_template=LFM2)
    text = Lfm2Config(
        **{**text_sizes(len(words)), "num_hidden_layers": 6}, layer_types=["conv", "full_attention"] * 3,
        block_auto_adjust_ff_dim=False,
    )  # fmt: skip
    tower = {name: size for name, size in vision_sizes(28, 7).items() if name != "image_size"}
    config = Lfm2VlConfig(
        text_config=text, vision_config=Siglip2VisionConfig(**tower, num_patches=16, vision_use_head=False), image_token_id=IMAGE,
        projector_hidden_size=32,
    )  # fmt: skip
    model = Lfm2VlForConditionalGeneration(config)
    for layer in model.model.language_model.layers[1::2]:  # else what a token is drowns what it reads
        layer.self_attn.out_proj.weight.data.mul_(8)
    return TinyFamily(processor, model, LAYERS, first=2)


def granite_docling() -> TinyFamily:
    """Tags of rows and columns are ordinary text of several tokens."""
    around = ["<fake_token_around_image>", "<global-img>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"]
    words = tokenizer(*around, bos=False)
    images = GraniteDoclingImageProcessor(size={"height": 28, "width": 28}, max_patches=4)
    processor = GraniteDoclingProcessor(images, words, image_seq_len=4, chat_template=GRANITE)
    text = {**text_sizes(len(words)), "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
    tower = {**vision_sizes(28, 7), "out_hidden_size": 32, "scale_factor": 2, "deepstack_visual_indexes": [0, 1]}
    config = GraniteDoclingConfig(text_config=text, vision_config=tower, image_token_id=IMAGE, pad_token_id=3)
    return TinyFamily(processor, GraniteDoclingForConditionalGeneration(config), "model.text_model.layers")


def cohere_compass() -> TinyFamily:
    turns = ["<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"]
    marks = ["<|VISION_START|>", "<|VISION_END|>", "<|IMAGE_PAD|>", "<|VIDEO_PAD|>"]
    words = tokenizer(*turns, "<|START_RESPONSE|>", "<|END_RESPONSE|>", *marks, bos=False)
    size = {"patch_size": 7, "size": {"shortest_edge": 14 * 14, "longest_edge": 14 * 14 * 16}}
    images, videos = CohereCompassImageProcessor(**size), CohereCompassVideoProcessor(**size)
    processor = CohereCompassProcessor(images, words, videos, chat_template=COMPASS)
    # windows with RoPE before layers that see all and have none
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    text = {
        **text_sizes(len(words)), "num_hidden_layers": 6, "sliding_window": 16, "logit_scale": 1.0,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "rope_parameters": {"sliding_attention": rope, "full_attention": None},
    }  # fmt: skip
    tower = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 7, "out_hidden_size": 32,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1], "initializer_range": 0.3,
    }  # fmt: skip
    ids = {"image": "<|IMAGE_PAD|>", "video": "<|VIDEO_PAD|>", "vision_start": "<|VISION_START|>", "vision_end": "<|VISION_END|>"}
    config = CohereCompassConfig(
        text_config=text, vision_config=tower, tie_word_embeddings=True,
        **{f"{name}_token_id": words.convert_tokens_to_ids(token) for name, token in ids.items()},
    )  # fmt: skip
    model = CohereCompassForConditionalGeneration(config)
    return TinyFamily(processor, model, LAYERS, first=2, composed=partial(media_types, processor))


FAMILIES: dict[str, Callable[[], TinyFamily]] = {
    f.__name__: f for f in (llama4, aria, idefics2, lfm2_vl, granite_docling, cohere_compass)
}
