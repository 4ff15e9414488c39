"""Tiny random-weight LLaVA checkpoints of the real architecture, with a real tokenizer, chat template and processor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BatchFeature,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

IMAGE_SIZE, PATCH = 28, 14
# chat_template.json of huggingface.co/llava-hf/llava-1.5-7b-hf, as in FriendliAI/llava-1.5-7b-hf, without its marks for training,
# and with turns of plain text
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]


CORPUS = ["USER: How do I build this? Image Caption: an icon of a chair. ASSISTANT: Based on the given Request, describe it"]


def byte_level_tokenizer(corpus: Sequence[str] = CORPUS, vocabulary: int = 400) -> Tokenizer:
    """As GPT-2's and Qwen's: spaces are part of the word behind them."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """As Llama's: a marker for each space, bytes for what is not in the vocabulary."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL, *byte_tokens], show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    trained = json.loads(tokenizer.to_str())
    trained["added_tokens"] = trained["added_tokens"][: len(SPECIAL)]  # bytes are text
    return Tokenizer.from_str(json.dumps(trained))


def tiny_processor(
    chat_template: str | None = TEMPLATE, tokenizer: Tokenizer | None = None, image_size: int = IMAGE_SIZE
) -> LlavaProcessor:
    tokenizer = tokenizer or byte_level_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<image>"], padding_side="left",
    )  # fmt: skip
    images = CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size})
    return LlavaProcessor(
        images, fast, patch_size=PATCH, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=chat_template,
    )  # fmt: skip


def tiny_model(
    vocabulary: int, *, tied: bool = False, layers: int = 4, intermediate: int = 64, seed: int = 0
) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
        pad_token_id=3, tie_word_embeddings=tied,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=IMAGE_SIZE,
        patch_size=PATCH, initializer_range=0.3,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=4, image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
        vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=tied,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval()


def save_tiny_llava(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    sharded: bool = False,
    generation_config: bool = True,
    chat_template: str | None = TEMPLATE,
    image_token_index: bool = True,
    layers: int = 4,
    intermediate: int = 64,
) -> Path:
    """Write a checkpoint as LLaVA's are published (old key layout) and return its folder."""
    processor = tiny_processor(chat_template)
    model = tiny_model(len(processor.tokenizer), tied=tied, layers=layers, intermediate=intermediate).to(dtype)
    model.generation_config.pad_token_id = 3
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder, max_shard_size="60KB" if sharded else "5GB")
    processor.save_pretrained(folder)
    if not generation_config:
        (folder / "generation_config.json").unlink()
    if not image_token_index:
        config = json.loads((folder / "config.json").read_text())
        config["image_token_id"] = config.pop("image_token_index")
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def picture(seed: int, width: int = 40, height: int = 40) -> Image.Image:
    """Noise."""
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 255, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


def encode(processor: LlavaProcessor, requests: Sequence[str], images: Sequence[Image.Image | None]) -> BatchFeature:
    """One left-padded batch; an image of None gives a text-only row."""
    texts = []
    for request, image in zip(requests, images, strict=True):
        content = ([{"type": "image"}] if image is not None else []) + [{"type": "text", "text": request}]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    given = [i for i in images if i is not None]
    return processor(text=texts, images=given or None, return_tensors="pt", padding=True)
