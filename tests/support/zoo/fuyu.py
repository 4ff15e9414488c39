"""Tiny Fuyu: patches of an image are words of the decoder, without a tower; its prompts have no turns."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tiny import CORPUS
from tiny_families import TinyFamily, text_sizes
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import FuyuConfig, FuyuForCausalLM, FuyuImageProcessor, FuyuProcessor, PersimmonConfig, PreTrainedTokenizerFast

MARKS = ["|ENDOFTEXT|", "<s>", "</s>", "<pad>", "|SPEAKER|", "|NEWLINE|", *(f"<0x0{i}>" for i in range(5))]


def fuyu() -> TinyFamily:
    words = fuyu_words()
    # the PIL one does not run in transformers 5.23: it transposes a tensor as an array
    images = FuyuImageProcessor(size={"height": 42, "width": 42}, patch_size={"height": 14, "width": 14})
    processor = FuyuProcessor(images, words)
    sizes: dict[str, Any] = {k: v for k, v in text_sizes(len(words)).items() if k != "num_key_value_heads"}
    text = PersimmonConfig(**sizes, rope_parameters={"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 0.5})
    config = FuyuConfig(
        text_config=text.to_dict(), image_size=42, patch_size=14, initializer_range=0.3, image_token_id=processor.image_token_id
    )
    return TinyFamily(processor, FuyuForCausalLM(config), "model.language_model.layers", recipe="fuyu")


def fuyu_words() -> PreTrainedTokenizerFast:
    """As a SentencePiece model: a mark of spaces before the first word too, even where a mark of an image is first."""
    trained = Tokenizer(models.BPE(unk_token="|ENDOFTEXT|", ignore_merges=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(r"\|[A-Z]+\||<0x0\d>"), "isolated")
    trained.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    letters = [*(chr(code) for code in range(32, 127)), "\n"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=MARKS, initial_alphabet=letters, show_progress=False)
    trained.train_from_iterator(CORPUS * 5, trainer)
    plain = Tokenizer.from_str(json.dumps(json.loads(trained.to_str()) | {"added_tokens": []}))  # marks are text
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="|ENDOFTEXT|",
        padding_side="left",
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], TinyFamily]] = {"fuyu": fuyu}
