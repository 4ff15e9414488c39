"""The demo's tokenizer, chat template and processor.

Pieces compose: words carry their leading space, so that tokenising "USER:", the image, " words" and " ASSISTANT:" apart
gives the ids of the whole prompt.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from exporter.data.demo.drawing import SIZE

PATCH = 16
IMAGE_TOKENS = (SIZE // PATCH) ** 2
PAD, BOS, EOS, IMAGE = SPECIALS = ("<pad>", "<s>", "</s>", "<image>")
PAD_ID, BOS_ID, EOS_ID, IMAGE_ID = range(len(SPECIALS))

CHAT_TEMPLATE = """\
{%- macro images(content) -%}
{%- if content is not string -%}
{%- for part in content if part['type'] == 'image' -%}<image>{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro words(content) -%}
{%- if content is string -%}{{ ' ' + content | trim }}{%- else -%}
{%- for part in content if part['type'] == 'text' -%}{{ ' ' + part['text'] | trim }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ 'SYSTEM:' + words(message['content']) + '</s>' }}
{%- elif message['role'] == 'user' -%}{{ 'USER:' + images(message['content']) + words(message['content']) }}
{%- else -%}{{ ' ASSISTANT:' + words(message['content']) + '</s>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}"""


def build_processor(corpus: Iterable[str]) -> LlavaProcessor:
    """A LlavaProcessor whose tokenizer has one token for every word of the corpus."""
    pixels = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        pixels,
        _tokenizer(corpus),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """The trained tokenizer with its special tokens, padding on the left."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(corpus),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[IMAGE],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def _byte_level_bpe(corpus: Iterable[str]) -> Tokenizer:
    """Lower-casing byte-level BPE, merged until every word of the corpus is one token; other text falls into pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # Replies start with the space that parts them from "ASSISTANT:".
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=10_000,
            min_frequency=0,
            special_tokens=list(SPECIALS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer
