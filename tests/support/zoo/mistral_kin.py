"""Types with Pixtral's tower: Mistral Large 4, LightOnOCR."""

from __future__ import annotations

from collections.abc import Callable

import torch
import with_torchvision  # noqa: F401 (before transformers)
from tiny_families import TinyFamily, text_sizes, tokenizer, vision_sizes
from tiny_families_torchvision import MISTRAL_SMALL, pixtral_parts
from transformers import (
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    LightOnOcrProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Mistral4Config,
    MistralLarge4Config,
    MistralLarge4ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    Qwen3Config,
)

# that of hf/mistralai/Mistral-Large-4-1T-A52B was not found: Mistral Small's
LARGE = MISTRAL_SMALL.replace("Mistral Small 3", "Mistral Large 4")
# what vllm-project/vllm's examples/offline_inference/vision_language.py writes for it; an empty system turn where none is given
LIGHTON = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for c in m['content'] %}{{ '<|image_pad|>' if c['type'] == 'image' else c['text'] }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAYERS = "model.language_model.layers"
#: Of attention with compressed keys and values, and of experts behind one dense layer.
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
}  # fmt: skip


def mistral_large4() -> TinyFamily:
    words = tokenizer("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    images = PixtralImageProcessor(size={"longest_edge": 56}, patch_size=7)
    processor = PixtralProcessor(images, words, patch_size=7, spatial_merge_size=2, chat_template=LARGE)
    # every second layer has no RoPE; the last two take keys, values and what a layer before has chosen to look at from others.
    # `index_topk`: how many tokens a token looks at
    text = {
        **text_sizes(len(words)), **LATENT, "num_hidden_layers": 6, "index_topk": 16, "index_head_dim": 16, "index_n_heads": 16,
        "no_rope_layers": [1, 0] * 3, "kv_source_layers": [0, 1, 2, 3, 2, 3], "indexer_types": ["full"] * 4 + ["shared"] * 2,
    }  # fmt: skip
    config = MistralLarge4Config(
        text_config=text, vision_config=PixtralVisionConfig(**vision_sizes(56, 7)),
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
    )  # fmt: skip
    model = MistralLarge4ForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if name.endswith((".softmax_scaling.scale", ".rotary_emb.alpha")):  # zeros at first: positions would say less
            torch.nn.init.normal_(weight, std=0.1)
    return TinyFamily(processor, model, LAYERS, first=2)


def mistral_small4() -> TinyFamily:
    """Mistral Small 4 is a Mistral 3 with another language model."""
    processor, shared = pixtral_parts(MISTRAL_SMALL.replace("Small 3", "Small 4"), 2)
    text = Mistral4Config(**{**text_sizes(len(processor.tokenizer)), **LATENT}, q_lora_rank=16)
    config = Mistral3Config(**{**shared, "text_config": text}, spatial_merge_size=2)
    return TinyFamily(processor, Mistral3ForConditionalGeneration(config), LAYERS)


def lighton_ocr() -> TinyFamily:
    words = tokenizer(
        "<|im_start|>", "<|im_end|>", bos=False, image_token="<|image_pad|>", image_break_token="<|vision_pad|>",
        image_end_token="<|vision_end|>",
    )  # fmt: skip
    images = PixtralImageProcessor(size={"longest_edge": 56}, patch_size=14)
    processor = LightOnOcrProcessor(images, words, patch_size=7, spatial_merge_size=2, chat_template=LIGHTON)
    config = LightOnOcrConfig(
        text_config=Qwen3Config(**text_sizes(len(words)), head_dim=8), vision_config=PixtralVisionConfig(**vision_sizes(56, 7)),
        image_token_id=words.image_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    return TinyFamily(processor, LightOnOcrForConditionalGeneration(config), LAYERS)


FAMILIES: dict[str, Callable[[], TinyFamily]] = {f.__name__: f for f in (mistral_large4, lighton_ocr)}
#: Checkpoints of types that are elsewhere, with other parts inside.
VARIANTS: dict[str, Callable[[], TinyFamily]] = {"mistral3 with mistral4": mistral_small4}
