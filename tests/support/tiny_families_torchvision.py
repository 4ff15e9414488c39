"""As tiny_families.py, the families whose processors need torchvision."""

from __future__ import annotations

from typing import Any

import torch
from tiny_families import IMAGE, TinyFamily, text_sizes, tokenizer, vision_sizes
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

# chat_template.json of a tune of hf/Qwen/Qwen3-VL-8B-Instruct
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# tokenizer_config.json of hf/Qwen/Qwen2.5-VL-7B-Instruct, in huggingface.js packages/jinja/test/e2e.test.js
QWEN2 = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}" + QWEN3
# transformers/tests/models/llava_onevision/test_processing_llava_onevision.py
ONEVISION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + c['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# transformers/src/transformers/models/internvl/convert_internvl_weights_to_hf.py
INTERNVL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif c['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# transformers/src/transformers/models/smolvlm/processing_smolvlm.py for videos; chat_template.json of hf/HuggingFaceTB/SmolVLM2-*
# is the same without the branch for them. Its vocabulary has all tags of rows and columns as special tokens, and no <video>
SMOLVLM = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% elif c['type'] == 'image' %}{{ '<image>' }}{% elif c['type'] == 'video' %}{{ '<video>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# chat_template.json of hf/mistral-community/pixtral-12b, refs/pr/27; a system turn would go into the last user's
PIXTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST]' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% elif c['type'] == 'image' %}{{ '[IMG]' }}{% endif %}{% endfor %}"
    "{{ '[/INST]' }}{% else %}{{ m['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}"
)
# transformers/tests/models/mistral3/test_processing_mistral3.py: a system block always, which there names the day
MISTRAL_SMALL = PIXTRAL.replace(
    "{{ bos_token }}", "{{ bos_token }}{{ '[SYSTEM_PROMPT]You are Mistral Small 3.\n\nAnswer in short.[/SYSTEM_PROMPT]' }}"
)
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def qwen_words() -> PreTrainedTokenizerFast:
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    return tokenizer("<|im_start|>", "<|im_end|>", *marks, bos=False)


def qwen_ids(words: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    around = {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {name: words.convert_tokens_to_ids(token) for name, token in (names | around).items()}


def qwen_tower(**sizes: Any) -> dict[str, Any]:
    return {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 7, "initializer_range": 0.3, **sizes}


def qwen_size() -> dict[str, Any]:
    """Of image and video processors: 14 pixels to a token, 1 to 16 tokens to an image."""
    return {"patch_size": 7, "size": {"shortest_edge": 14 * 14, "longest_edge": 14 * 14 * 16}}


def qwen_family(processor: Any, model: Any) -> TinyFamily:
    def composed(ids: torch.Tensor, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"mm_token_type_ids": torch.tensor(processor.create_mm_token_type_ids(ids.tolist()))}

    return TinyFamily(processor, model, "model.language_model.layers", composed=composed)


def qwen2_vl() -> TinyFamily:
    words = qwen_words()
    images, videos = Qwen2VLImageProcessor(**qwen_size()), Qwen2VLVideoProcessor(**qwen_size())
    config = Qwen2VLConfig(
        text_config={**text_sizes(len(words)), "rope_parameters": dict(MROPE)}, vision_config=qwen_tower(embed_dim=32),
        **qwen_ids(words),
    )  # fmt: skip
    processor = Qwen2VLProcessor(images, words, videos, chat_template=QWEN2)
    return qwen_family(processor, Qwen2VLForConditionalGeneration(config))


def qwen2_5_vl() -> TinyFamily:
    words = qwen_words()
    images, videos = Qwen2VLImageProcessor(**qwen_size()), Qwen2VLVideoProcessor(**qwen_size())
    tower = qwen_tower(intermediate_size=64, out_hidden_size=32, window_size=28, fullatt_block_indexes=[1])
    config = Qwen2_5_VLConfig(
        text_config={**text_sizes(len(words)), "rope_parameters": dict(MROPE)}, vision_config=tower, **qwen_ids(words)
    )
    processor = Qwen2_5_VLProcessor(images, words, videos, chat_template=QWEN2)
    return qwen_family(processor, Qwen2_5_VLForConditionalGeneration(config))


def qwen3_vl() -> TinyFamily:
    words = qwen_words()
    images, videos = Qwen2VLImageProcessor(**qwen_size()), Qwen3VLVideoProcessor(**qwen_size())
    tower = qwen_tower(intermediate_size=64, out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
    text = {**text_sizes(len(words)), "head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
    config = Qwen3VLConfig(text_config=text, vision_config=tower, **qwen_ids(words))
    processor = Qwen3VLProcessor(images, words, videos, chat_template=QWEN3)
    return qwen_family(processor, Qwen3VLForConditionalGeneration(config))


def llava_onevision() -> TinyFamily:
    words = tokenizer("<|im_start|>", "<|im_end|>", "<video>", bos=False)
    grid = [[28, 28], [28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    size = {"height": 28, "width": 28}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grid), words, LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4, vision_feature_select_strategy="full", chat_template=ONEVISION,
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**text_sizes(len(words))),
        vision_config=SiglipVisionConfig(**vision_sizes(28, 14), vision_use_head=False), image_token_index=IMAGE,
        video_token_index=words.convert_tokens_to_ids("<video>"), image_grid_pinpoints=grid,
    )  # fmt: skip
    return TinyFamily(processor, LlavaOnevisionForConditionalGeneration(config), "model.language_model.layers")


def internvl() -> TinyFamily:
    words = tokenizer(
        "<|im_start|>", "<|im_end|>", bos=False,
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>",
    )  # fmt: skip
    size = {"height": 28, "width": 28}
    images = GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4)
    videos = InternVLVideoProcessor(size=size)
    processor = InternVLProcessor(images, words, videos, image_seq_length=4, chat_template=INTERNVL)
    config = InternVLConfig(
        text_config=Qwen2Config(**text_sizes(len(words))), vision_config=vision_sizes(28, 7), image_seq_length=4,
        image_token_id=words.context_image_token_id,
    )  # fmt: skip
    return TinyFamily(processor, InternVLForConditionalGeneration(config), "model.language_model.layers")


def smolvlm() -> TinyFamily:
    cells = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    around = ["<|im_start|>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<video>"]
    words = tokenizer(*around, *cells, bos=False)
    images = SmolVLMImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    videos = SmolVLMVideoProcessor(size={"longest_edge": 28}, max_image_size={"longest_edge": 28})
    processor = SmolVLMProcessor(images, words, videos, image_seq_len=4, chat_template=SMOLVLM)
    config = SmolVLMConfig(
        text_config=LlamaConfig(**text_sizes(len(words))), vision_config=vision_sizes(28, 7), image_token_id=IMAGE,
        scale_factor=2,
    )  # fmt: skip
    return TinyFamily(processor, SmolVLMForConditionalGeneration(config), "model.text_model.layers")


def pixtral_parts(template: str, merge: int) -> tuple[PixtralProcessor, dict[str, Any]]:
    """A processor, and what the configs of Pixtral and Mistral Small share."""
    words = tokenizer("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    images = PixtralImageProcessor(size={"longest_edge": 56}, patch_size=14 // merge)
    processor = PixtralProcessor(images, words, patch_size=14 // merge, spatial_merge_size=merge, chat_template=template)
    shared = {
        "text_config": MistralConfig(**text_sizes(len(words)), head_dim=8, sliding_window=None),
        "vision_config": PixtralVisionConfig(**vision_sizes(56, 14 // merge)),
        "image_token_index": words.convert_tokens_to_ids("[IMG]"), "vision_feature_layer": -1, "tie_word_embeddings": False,
    }  # fmt: skip
    return processor, shared


def mistral3() -> TinyFamily:
    processor, shared = pixtral_parts(MISTRAL_SMALL, 2)
    config = Mistral3Config(**shared, spatial_merge_size=2)
    return TinyFamily(processor, Mistral3ForConditionalGeneration(config), "model.language_model.layers")


def pixtral() -> TinyFamily:
    """As mistral-community/pixtral-12b: a LLaVA with another vision tower."""
    processor, shared = pixtral_parts(PIXTRAL, 1)
    config = LlavaConfig(**shared, vision_feature_select_strategy="full")
    return TinyFamily(processor, LlavaForConditionalGeneration(config), "model.language_model.layers")


FAMILIES = {f.__name__: f for f in (qwen2_vl, qwen2_5_vl, qwen3_vl, llava_onevision, internvl, smolvlm, mistral3, pixtral)}


def tiny_family(name: str) -> TinyFamily:
    torch.manual_seed(0)
    family = FAMILIES[name]()
    family.model.eval()
    return family
