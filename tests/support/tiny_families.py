"""Tiny random-weight checkpoints of the families beside LLaVA-1.5: real architecture, processor class and kind of template.

Templates say in our words what the published ones do, for the parts that a test reaches; the comment of each names where that was
read. `transformers/` is its repository, `hf/` huggingface.co.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tiny import TEMPLATE, byte_level_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    CLIPVisionConfig,
    Cohere2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    MistralConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    OPTConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

#: Ids of tiny.SPECIAL.
EOS, PAD, IMAGE = 2, 3, 4
# chat_template.json of hf/llava-hf/llava-v1.6-mistral-7b-hf, as quoted in openvinotoolkit/openvino.genai's tokenizer tests; the
# processor's is older, `<s>` comes from the tokenizer. bakLlava-v1-hf: the same without a system turn, and `<\\s>` for `</s>`
MISTRAL = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ '<<SYS>>\n' + m['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}"
)
# hf/mlx-community/aya-vision-32b-4bit, commit 7d532308: a system block of its own before any other, with an image and without
AYA = (
    "{{ bos_token }}<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>You look at pictures.<|END_OF_TURN_TOKEN|>"
    "{% for m in messages %}<|START_OF_TURN_TOKEN|>"
    "{{ m['role'] | replace('user', '<|USER_TOKEN|>') | replace('assistant', '<|CHATBOT_TOKEN|><|START_RESPONSE|>')"
    " | replace('system', '<|SYSTEM_TOKEN|>') }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}<|END_RESPONSE|>{% endif %}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>{% endif %}"
)
# transformers/src/transformers/models/gemma3/convert_gemma3_weights.py: the system's text begins the first user turn, and white
# space around every text is taken away
GEMMA = (
    "{{ bos_token }}{% set first, turns = '', messages %}{% if messages[0]['role'] == 'system' %}"
    "{% set first, turns = messages[0]['content'][0]['text'] + '\n\n', messages[1:] %}{% endif %}{% for m in turns %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + (first if loop.first else '') }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# mistral.rs chat_templates/idefics3.json; transformers/tests/models/idefics3/test_processing_idefics3.py. In the published
# vocabulary, Llama 3's, the tags of rows, columns and the whole image are ordinary text of several tokens (`plain_tags`)
IDEFICS = (
    "<|begin_of_text|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# the first of two templates of hf/meta-llama/Llama-3.2-11B-Vision-Instruct, as in hf/huihui-ai/Llama-3.2-11B-Vision-Instruct-
# abliterated; the present one has a system block with dates where no image is in the conversation
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|image|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@dataclass(frozen=True)
class TinyFamily:
    processor: Any
    model: Any
    #: of the decoder's ModuleList
    layers: str
    #: of the layers that tests calibrate
    first: int = 1
    recipe: str = "llava"
    #: (composed prompt, image inputs) -> inputs as long as that prompt, by the processors' own code where they have it
    composed: Callable[[torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda ids, given: {}

    def save(self, folder: Path) -> Path:
        self.model.generation_config.pad_token_id = PAD
        self.model.generation_config.eos_token_id = EOS
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        return folder


def tokenizer(
    *special: str, bos: bool = True, newlines: bool = False, added: Sequence[str] = (), **named: str
) -> PreTrainedTokenizerFast:
    """tiny's byte-level tokenizer with more special tokens, and `added` ones; `named` become attributes (`image_token=...`)."""
    trained = byte_level_tokenizer()
    trained.add_special_tokens([*special, *named.values()])
    trained.add_tokens([AddedToken(token, normalized=False) for token in added])
    if newlines:  # Gemma's tokenizer has a token for each run of newlines
        trained.add_tokens([AddedToken("\n" * n, normalized=False) for n in (2, 3, 4)])
    if bos:
        trained.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    extra = {"extra_special_tokens": named} if named else {"additional_special_tokens": ["<image>", *special]}
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        padding_side="left", **extra,
    )  # fmt: skip


def text_sizes(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, "bos_token_id": 1,
        "eos_token_id": EOS, "pad_token_id": PAD,
    }  # fmt: skip


def vision_sizes(image: int, patch: int) -> dict[str, Any]:
    return {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": image,
        "patch_size": patch, "initializer_range": 0.3,
    }  # fmt: skip


def llava_next(template: str = MISTRAL) -> TinyFamily:
    words = tokenizer()
    grid = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    crop = {"height": 28, "width": 28}
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size=crop, image_grid_pinpoints=grid)
    processor = LlavaNextProcessor(
        images, words, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template,
    )  # fmt: skip
    config = LlavaNextConfig(
        text_config=MistralConfig(**text_sizes(len(words)), sliding_window=None),
        vision_config=CLIPVisionConfig(**vision_sizes(28, 14)),
        image_token_index=IMAGE, image_grid_pinpoints=grid, vision_feature_layer=-2, image_seq_length=4,
    )  # fmt: skip
    return TinyFamily(processor, LlavaNextForConditionalGeneration(config), "model.language_model.layers")


def llava_next_vicuna() -> TinyFamily:
    return llava_next(TEMPLATE)


def aya_vision(plain_tags: bool = True) -> TinyFamily:
    """plain_tags: TILE_1 and TILE_GLOBAL are ordinary text of several tokens, as published, in Aya Expanse's vocabulary.

    There, of the marks of a turn only that at its end is special.
    """
    tiles = [] if plain_tags else ["TILE_GLOBAL", *(f"TILE_{i}" for i in range(1, 5))]
    turns = ["<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"]
    marks = ["<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>"]
    words = tokenizer("<|END_OF_TURN_TOKEN|>", *marks, "<|IMG_LINE_BREAK|>", *tiles, added=turns)
    images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=4)
    processor = AyaVisionProcessor(images, words, patch_size=7, img_size=28, downsample_factor=2, chat_template=AYA)
    text = Cohere2Config(**text_sizes(len(words)), sliding_window=16, logit_scale=1.0)
    config = AyaVisionConfig(
        text_config=text, vision_config=SiglipVisionConfig(**vision_sizes(28, 7), vision_use_head=False), downsample_factor=2,
        image_token_index=words.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )  # fmt: skip
    return TinyFamily(processor, AyaVisionForConditionalGeneration(config), "model.language_model.layers")


def gemma3() -> TinyFamily:
    words = tokenizer(
        "<start_of_turn>", "<end_of_turn>", newlines=True,
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>",
    )  # fmt: skip
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    processor = Gemma3Processor(images, words, image_seq_length=4, chat_template=GEMMA)
    text = Gemma3TextConfig(**text_sizes(len(words)), head_dim=8, query_pre_attn_scalar=8, sliding_window=16)
    config = Gemma3Config(
        text_config=text, vision_config=SiglipVisionConfig(**vision_sizes(28, 14), vision_use_head=False),
        mm_tokens_per_image=4, boi_token_index=words.boi_token_id, eoi_token_index=words.eoi_token_id,
        image_token_index=words.image_token_id, initializer_range=0.3,
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config)
    # zeros at first: images would say nothing
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)
    composed = partial(image_token_types, words.image_token_id)
    return TinyFamily(processor, model, "model.language_model.layers", composed=composed)


def image_token_types(image: int, ids: torch.Tensor, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"token_type_ids": (ids == image).long()}


def idefics3(plain_tags: bool = True) -> TinyFamily:
    """plain_tags: those of rows, columns and the whole image are ordinary text of several tokens, as published."""
    cells = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    around = ["<|begin_of_text|>", "<fake_token_around_image>", "<end_of_utterance>"]
    cells = [] if plain_tags else ["<global-img>", *cells]
    words = tokenizer(*around, *cells, bos=False)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    processor = Idefics3Processor(images, words, image_seq_len=4, chat_template=IDEFICS)
    config = Idefics3Config(
        text_config=LlamaConfig(**text_sizes(len(words))), vision_config=vision_sizes(28, 7), image_token_id=IMAGE,
        scale_factor=2,
    )  # fmt: skip
    return TinyFamily(processor, Idefics3ForConditionalGeneration(config), "model.text_model.layers")


def mllama() -> TinyFamily:
    marks = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"]
    words = tokenizer(*marks, image_token="<|image|>")
    images = MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=2)
    processor = MllamaProcessor(images, words, chat_template=LLAMA)
    sizes = text_sizes(len(words)) | {"num_hidden_layers": 5}
    text = MllamaTextConfig(**sizes, cross_attention_layers=[1])
    vision = MllamaVisionConfig(
        hidden_size=32, attention_heads=4, intermediate_size=64, num_hidden_layers=3, num_global_layers=1, image_size=28,
        patch_size=14, max_num_tiles=2, intermediate_layers_indices=[1], vision_output_dim=64, initializer_range=0.3,
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    )  # fmt: skip
    model = MllamaForConditionalGeneration(
        MllamaConfig(vision_config=vision, text_config=text, image_token_index=words.image_token_id)
    )
    cross = model.model.language_model.layers[1]
    for gate in (cross.cross_attn_attn_gate, cross.cross_attn_mlp_gate):  # zeros at first: images would say nothing
        torch.nn.init.ones_(gate)
    composed = partial(cross_attention_mask, words.image_token_id)
    return TinyFamily(processor, model, "model.language_model.layers", first=2, composed=composed)


def cross_attention_mask(image: int, ids: torch.Tensor, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the processor's code."""
    tiles = given["cross_attention_mask"].amax(1).sum(-1).tolist()
    spans = [get_cross_attention_token_mask(row, image) for row in ids.tolist()]
    tiles = [row[: len(images)] for row, images in zip(tiles, spans, strict=True)]
    dense = convert_sparse_cross_attention_mask_to_dense(spans, tiles, given["cross_attention_mask"].shape[-1], ids.shape[1])
    return {"cross_attention_mask": torch.from_numpy(dense)}


def paligemma() -> TinyFamily:
    words = tokenizer(bos=False)
    images = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    processor = PaliGemmaProcessor(images, words)
    text = GemmaConfig(**text_sizes(len(words)), head_dim=8)
    vision = SiglipVisionConfig(**vision_sizes(28, 14), vision_use_head=False)
    config = PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=32)
    return TinyFamily(
        processor, PaliGemmaForConditionalGeneration(config), "model.language_model.layers", recipe="paligemma",
        composed=lambda ids, given: {"token_type_ids": torch.zeros_like(ids)},
    )  # fmt: skip


def blip_2() -> TinyFamily:
    words = tokenizer()
    images = BlipImageProcessorPil(size={"height": 28, "width": 28})
    processor = Blip2Processor(images, words, num_query_tokens=4)
    sizes = {k: v for k, v in text_sizes(len(words)).items() if k not in ("intermediate_size", "num_key_value_heads")}
    text = OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=32)
    config = Blip2Config(
        vision_config={**vision_sizes(28, 14)}, qformer_config=qformer_sizes(), text_config=text.to_dict(), num_query_tokens=4,
        image_token_index=IMAGE,
    )  # fmt: skip
    model = with_queries(Blip2ForConditionalGeneration(config))
    return TinyFamily(processor, model, "language_model.model.decoder.layers", recipe="blip2")


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's uncased words, and `[DEC]` to begin a text with, as the Q-Former's.

    transformers/src/transformers/models/instructblip/convert_instructblip_original_to_pytorch.py
    """
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    pieces = [
        *"abcdefghijklmnopqrstuvwxyz0123456789?.,:'",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789"),
        "what",
        "is",
    ]
    trained = Tokenizer(models.WordPiece({w: i for i, w in enumerate([*marks, *pieces])}, unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer(lowercase=True)
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trained.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        bos_token="[DEC]", truncation_side="left",
    )  # fmt: skip


def instructblip() -> TinyFamily:
    words, asked = tokenizer(), bert_tokenizer()
    images = BlipImageProcessorPil(size={"height": 28, "width": 28})
    processor = InstructBlipProcessor(images, words, asked, num_query_tokens=4)
    config = InstructBlipConfig(
        vision_config={**vision_sizes(28, 14)}, qformer_config=qformer_sizes(vocab_size=len(asked)),
        text_config=LlamaConfig(**text_sizes(len(words))).to_dict(), num_query_tokens=4, image_token_index=IMAGE,
    )  # fmt: skip
    model = with_queries(InstructBlipForConditionalGeneration(config))
    return TinyFamily(processor, model, "language_model.model.layers", recipe="instructblip")


def qformer_sizes(**extra: int) -> dict[str, Any]:
    return {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "encoder_hidden_size": 32, "initializer_range": 0.3, **extra,
    }  # fmt: skip


def with_queries(model: Any) -> Any:
    """Query tokens are zeros at first."""
    torch.nn.init.normal_(model.query_tokens)
    return model


FAMILIES = {
    f.__name__: f for f in (llava_next, llava_next_vicuna, aya_vision, gemma3, idefics3, mllama, paligemma, blip_2, instructblip)
}


def tiny_family(name: str) -> TinyFamily:
    torch.manual_seed(0)
    family = FAMILIES[name]()
    family.model.eval()
    return family
