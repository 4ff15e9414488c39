"""Models that hear as well: Qwen-Omni's text parts. Import with_torchvision before."""

from __future__ import annotations

from typing import Any

from tiny_families import TinyFamily, text_sizes, tokenizer
from tiny_families_torchvision import MROPE, QWEN2, QWEN3
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3OmniMoeProcessor,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)

from zoo.qwen import EXPERTS, tower

VIDEO = "{% elif c['type'] == 'video' %}"
AUDIO = "{% elif c['type'] == 'audio' %}<|audio_start|><|audio_pad|><|audio_end|>"
# placeholders as in vllm/model_executor/models/qwen3_omni_moe_thinker.py, turns as Qwen3-VL's
OMNI_3 = QWEN3.replace(VIDEO, AUDIO + VIDEO)
# chat_template of hf/Qwen/Qwen2.5-Omni-7B, as quoted in several repositories: as Qwen2.5-VL's with other tokens
OMNI_2_5 = (
    QWEN2.replace(VIDEO, AUDIO.replace("start|>", "bos|>").replace("end|>", "eos|>").replace("audio_pad", "AUDIO") + VIDEO)
    .replace("<|vision_start|>", "<|vision_bos|>").replace("<|vision_end|>", "<|vision_eos|>")
    .replace("<|image_pad|>", "<|IMAGE|>").replace("<|video_pad|>", "<|VIDEO|>")
)  # fmt: skip


def omni_words(image: str, video: str, audio: str, around: dict[str, str]) -> PreTrainedTokenizerFast:
    return tokenizer(
        "<|im_start|>", "<|im_end|>", bos=False, image_token=image, video_token=video, audio_token=audio, **around
    )  # fmt: skip


def ears(**sizes: Any) -> dict[str, Any]:
    return {
        "num_mel_bins": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 32,
        "max_source_positions": 1500, "n_window": 50, "output_dim": 32, "initializer_range": 0.3, **sizes,
    }  # fmt: skip


# the processors' classes have their own size of videos, in pixels: larger patches make fewer tokens of it
PATCH = 14
SIZE = {"patch_size": PATCH, "size": {"shortest_edge": (2 * PATCH) ** 2 * 4, "longest_edge": (2 * PATCH) ** 2 * 16}}


def family(processor_class: Any, words: PreTrainedTokenizerFast, template: str, model: Any) -> TinyFamily:
    images, videos = Qwen2VLImageProcessor(**SIZE), Qwen2VLVideoProcessor(**SIZE)
    processor = processor_class(images, videos, WhisperFeatureExtractor(feature_size=16), words, chat_template=template)
    return TinyFamily(processor, model, "model.language_model.layers")


def qwen2_5_omni_thinker() -> TinyFamily:
    edges = {f"{kind}_{edge}_token": f"<|{kind}_{edge}|>" for kind in ("vision", "audio") for edge in ("bos", "eos")}
    words = omni_words("<|IMAGE|>", "<|VIDEO|>", "<|AUDIO|>", edges)
    sight = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": PATCH, "initializer_range": 0.3, "out_hidden_size": 32}
    config = Qwen2_5OmniThinkerConfig(
        text_config=text_sizes(len(words)) | {"rope_parameters": dict(MROPE)}, audio_config=ears(),
        vision_config=sight | {"intermediate_size": 64, "window_size": 56, "fullatt_block_indexes": [1]},
        image_token_index=words.image_token_id, video_token_index=words.video_token_id, audio_token_index=words.audio_token_id,
        audio_start_token_id=words.audio_bos_token_id, audio_end_token_id=words.audio_eos_token_id,
        vision_start_token_id=words.vision_bos_token_id, vision_end_token_id=words.vision_eos_token_id, initializer_range=0.3,
    )  # fmt: skip
    return family(Qwen2_5OmniProcessor, words, OMNI_2_5, Qwen2_5OmniThinkerForConditionalGeneration(config))


def qwen3_omni_moe_thinker() -> TinyFamily:
    edges = {
        f"{kind}_{edge}_token": f"<|{kind}_{word}|>"
        for kind in ("vision", "audio") for edge, word in (("bos", "start"), ("eos", "end"))
    }  # fmt: skip
    words = omni_words("<|image_pad|>", "<|video_pad|>", "<|audio_pad|>", edges)
    text = text_sizes(len(words)) | EXPERTS | {"head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
    config = Qwen3OmniMoeThinkerConfig(
        text_config=text, vision_config=tower(deepstack_visual_indexes=[0, 1]) | {"patch_size": PATCH},
        audio_config=ears(n_window_infer=100, conv_chunksize=8, downsample_hidden_size=8),
        image_token_id=words.image_token_id, video_token_id=words.video_token_id, audio_token_id=words.audio_token_id,
        audio_start_token_id=words.audio_bos_token_id, vision_start_token_id=words.vision_bos_token_id, initializer_range=0.3,
    )  # fmt: skip
    return family(Qwen3OmniMoeProcessor, words, OMNI_3, Qwen3OmniMoeThinkerForConditionalGeneration(config))


FAMILIES = {f.__name__: f for f in (qwen3_omni_moe_thinker, qwen2_5_omni_thinker)}
