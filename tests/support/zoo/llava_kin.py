"""LLaVA's kin: ViP-LLaVA, LLaVA-NeXT-Video, Video-LLaVA, Granite Vision 4, Command A Vision."""

from __future__ import annotations

from collections.abc import Callable

import with_torchvision  # noqa: F401 (before transformers)
from tiny import TEMPLATE, tiny_model, tiny_processor
from tiny_families import AYA, IMAGE, TinyFamily, text_sizes, tokenizer, vision_sizes
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Cohere2Config,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    Cohere2VisionImageProcessor,
    Cohere2VisionProcessor,
    Granite4VisionConfig,
    Granite4VisionForConditionalGeneration,
    Granite4VisionProcessor,
    LlamaConfig,
    LlavaNextImageProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    LlavaProcessor,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
    VideoLlavaVideoProcessor,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

# transformers/docs/source/en/model_doc/vipllava.md, what it prints for hf/llava-hf/vip-llava-7b-hf
VIP = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'][0]['text'] }}"
    "{% else %}{{ '###Human: ' if m['role'] == 'user' else '###Assistant: ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '###Assistant:' }}{% endif %}"
)
# transformers/docs/source/en/model_doc/video_llava.md and llava_next_video.md (7B): LLaVA-1.5's turns, with videos
WITH_VIDEOS = TEMPLATE.replace(
    "{{ '<image>\n' }}{% endfor %}",
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}",
)
# chat_template.jinja of hf/ibm-granite/granite-docling-258M, as in the tests of a Dart port of Jinja; that of Granite Vision 4.1
# was not found
GRANITE = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' }}"
    "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{{ '<|end_of_text|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
# that of hf/CohereLabs/command-a-vision-07-2025 was not found: Aya Vision's, of the same house
COMMAND_A = AYA.replace("<image>", "<|IMG_PATCH|>")
LAYERS = "model.language_model.layers"
GRID = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
CROP = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
CLIP_PATCHES = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


def vipllava() -> TinyFamily:
    words = tokenizer()
    processor = LlavaProcessor(CLIPImageProcessor(**CROP), words, **CLIP_PATCHES, chat_template=VIP)
    config = VipLlavaConfig(
        text_config=LlamaConfig(**text_sizes(len(words))), vision_config=CLIPVisionConfig(**vision_sizes(28, 14)),
        image_token_index=IMAGE, vision_feature_layer=[-2, -1, 0], image_seq_length=4,
    )  # fmt: skip
    return TinyFamily(processor, VipLlavaForConditionalGeneration(config), LAYERS)


def llava_next_video() -> TinyFamily:
    words = tokenizer("<video>")
    images, videos = LlavaNextImageProcessor(**CROP, image_grid_pinpoints=GRID), LlavaNextVideoVideoProcessor(**CROP)
    processor = LlavaNextVideoProcessor(videos, images, words, WITH_VIDEOS, **CLIP_PATCHES)
    config = LlavaNextVideoConfig(
        text_config=LlamaConfig(**text_sizes(len(words))), vision_config=CLIPVisionConfig(**vision_sizes(28, 14)),
        image_token_index=IMAGE, video_token_index=words.convert_tokens_to_ids("<video>"), image_grid_pinpoints=GRID,
        image_seq_length=4, video_seq_length=1,
    )  # fmt: skip
    return TinyFamily(processor, LlavaNextVideoForConditionalGeneration(config), LAYERS)


def video_llava() -> TinyFamily:
    words = tokenizer("<video>")
    images, videos = VideoLlavaImageProcessor(**CROP), VideoLlavaVideoProcessor(**CROP)
    processor = VideoLlavaProcessor(images, videos, words, **CLIP_PATCHES, chat_template=WITH_VIDEOS)
    config = VideoLlavaConfig(
        text_config=LlamaConfig(**text_sizes(len(words))), vision_config=CLIPVisionConfig(**vision_sizes(28, 14)),
        image_token_index=IMAGE, video_token_index=words.convert_tokens_to_ids("<video>"), image_seq_length=4,
        video_seq_length=40,
    )  # fmt: skip
    return TinyFamily(processor, VideoLlavaForConditionalGeneration(config), LAYERS)


def granite4_vision() -> TinyFamily:
    words = tokenizer("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", bos=False)
    images = LlavaNextImageProcessor(**CROP, image_grid_pinpoints=GRID)
    processor = Granite4VisionProcessor(
        images, words, patch_size=7, vision_feature_select_strategy="full", chat_template=GRANITE, downsample_rate="2/4"
    )
    text = {**text_sizes(len(words)), "num_hidden_layers": 6, "embedding_multiplier": 6.0, "residual_multiplier": 0.5}
    # of a head for each 64 features, so no fewer
    tower = SiglipVisionConfig(**{**vision_sizes(28, 7), "hidden_size": 64}, vision_use_head=False)
    queries = {"num_hidden_layers": 1, "intermediate_size": 64, "cross_attention_frequency": 1, "initializer_range": 0.3}
    config = Granite4VisionConfig(
        text_config={**text, "logits_scaling": 4.0, "attention_multiplier": 0.2}, vision_config=tower,
        qformer_config={**queries, "use_qformer_text_input": False}, image_token_index=IMAGE, image_grid_pinpoints=GRID,
        vision_feature_select_strategy="full", downsample_rate="2/4", deepstack_layer_map=[[-2, 0], [-1, 2]],
        spatial_target_layers=[1, 3, 4, 5], projector_dropout=0.0,
    )  # fmt: skip
    return TinyFamily(processor, Granite4VisionForConditionalGeneration(config), LAYERS)


def cohere2_vision() -> TinyFamily:
    turns = ["<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"]
    words = tokenizer(
        *turns, "<|START_RESPONSE|>", "<|END_RESPONSE|>", image_token="<|IMG_PATCH|>", boi_token="<|START_OF_IMG|>",
        eoi_token="<|END_OF_IMG|>", img_line_break_token="<|IMG_LINE_BREAK|>",
    )  # fmt: skip
    # what the image processor calls patches are the tokens along an edge of a tile
    images = Cohere2VisionImageProcessor(size={"height": 28, "width": 28}, min_patches=1, max_patches=4, patch_size=2)
    processor = Cohere2VisionProcessor(images, words, chat_template=COMMAND_A)
    kinds = ["sliding_attention", "full_attention"] * 3
    sizes = {**text_sizes(len(words)), "num_hidden_layers": 6}
    text = Cohere2Config(**sizes, sliding_window=16, layer_types=kinds, logit_scale=1.0)
    config = Cohere2VisionConfig(
        text_config=text, vision_config=SiglipVisionConfig(**vision_sizes(28, 7), vision_use_head=False),
        image_token_id=words.image_token_id, alignment_intermediate_size=64,
    )  # fmt: skip
    return TinyFamily(processor, Cohere2VisionForConditionalGeneration(config), LAYERS, first=2)


def llava() -> TinyFamily:
    """LLaVA-1.5, which has more tests elsewhere."""
    processor = tiny_processor()
    return TinyFamily(processor, tiny_model(len(processor.tokenizer)), "model.language_model.layers")


FAMILIES: dict[str, Callable[[], TinyFamily]] = {
    f.__name__: f for f in (llava, vipllava, llava_next_video, video_llava, granite4_vision, cohere2_vision)
}
