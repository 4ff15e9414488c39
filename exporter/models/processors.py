"""A checkpoint's processor: tokenizers, image and video processing, and the chat template; loaded, pinned and compared.

transformers chooses the classes of these parts by names in the files, and where they name none, or one that it knows to be wrong,
by config.json's model_type. An export has a model_type of its own, so that all classes must stand in its files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name

from exporter.data.images import typographic_image
from exporter.errors import InputError, VerificationError, refusing
from exporter.models.chat_template import encoded
from exporter.models.conversation import user_turn
from exporter.models.notices import noticed
from exporter.models.recipe import Recipe
from exporter.runtime.reading import Json, UnreadableError, read_json

PROCESSOR, TOKENIZER = "processor_config.json", "tokenizer_config.json"
IMAGES, VIDEOS = "preprocessor_config.json", "video_preprocessor_config.json"
#: Text on which tokenizers of two classes differ, if they differ: spaces, digits, lines, other scripts, marks.
ODD_TEXT = "  Two spaces,\n\nlines\n\t\u200bé e\u0301 中文 🙂👍🏽 12345 3.14 <image> </s> <|im_end|> {{x}} [INST] ▁a don't ...  "


def load_processor(folder: Path, recipe: Recipe, what: str = "MODEL") -> ProcessorMixin:
    """The processor with its tokenizer, with the recipe's chat template if it gives one. Raises InputError."""
    return load_with_notices(folder, recipe, what)[0]


def load_with_notices(folder: Path, recipe: Recipe, what: str = "MODEL") -> tuple[ProcessorMixin, tuple[str, ...]]:
    """As `load_processor`, with what transformers said meanwhile. Raises InputError."""
    with noticed(f"{what}: the processor in {folder}", folder) as notices:
        processor = _loaded(folder, what)
        if not (hasattr(processor, "tokenizer") and hasattr(processor, "image_processor")):
            raise InputError(f"{what}: {folder} has no processor of images and text (processor_config.json); restore its files.")
    if recipe.chat_template is not None:
        processor.chat_template = recipe.chat_template
    if getattr(processor.image_processor, "do_pan_and_scan", None):
        raise InputError(
            f"{what}: do_pan_and_scan is on in the preprocessor_config.json of {folder}, and prompts with sentences between "
            "crops cannot be composed; set it to false."
        )
    return processor, (*notices, *_unused_settings(folder, processor))


def _loaded(folder: Path, what: str) -> ProcessorMixin:
    """Raises InputError."""
    kind = _processor_class(folder, what)
    with _loading(folder, what):
        try:
            return kind.from_pretrained(folder, trust_remote_code=False)
        except ImportError as error:
            if (remedy := _remedy(error)) is None:
                raise
            raise InputError(f"{what}: the processor in {folder} cannot be loaded: {remedy}") from error


def _loading(folder: Path, what: str) -> AbstractContextManager[None]:
    """Around what transformers reads of the files."""
    return refusing(f"{what}: the processor in {folder} cannot be loaded", "restore its files")


def _processor_class(folder: Path, what: str) -> type[ProcessorMixin | AutoProcessor]:
    """AutoProcessor, or the model's own where the files name one without images, as InstructBLIP's do. Raises InputError."""
    if (named := named_class(folder)) is None:
        return AutoProcessor
    if (found := processor_class_from_name(named)) is None:
        raise InputError(
            f"{what}: the files in {folder} name the processor class {named}, which transformers {transformers.__version__} "
            "has not; its own code is never run, so install a transformers that has it, or give another checkpoint."
        )
    if "image_processor" in found.get_attributes():
        return AutoProcessor
    with _loading(folder, what):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return PROCESSOR_MAPPING.get(type(config), AutoProcessor)


def named_class(folder: Path) -> str | None:
    """The processor class that the files name, looked for where transformers looks."""
    for name in (PROCESSOR, IMAGES, VIDEOS, TOKENIZER):
        if isinstance(named := _settings(folder / name).get("processor_class"), str):
            return named
    return None


def _settings(file: Path) -> dict[str, Json]:
    try:
        values = read_json(file)
    except UnreadableError:
        return {}
    return values if isinstance(values, dict) else {}


def _remedy(error: ImportError) -> str | None:
    """What to do where a package is missing that only some families' processors need."""
    if "torchvision" in str(error).lower():
        return "it needs torchvision; run 'pip install torchvision', from the index that torch came from."
    return "it needs num2words; run 'pip install num2words'." if "num2words" in str(error) else None


def _unused_settings(folder: Path, processor: ProcessorMixin) -> list[str]:
    """What stands in processor_config.json and no part of the processor takes; transformers passes it over in silence."""
    kind, named = type(processor), named_class(folder)
    taken = {*kind.__init__.__code__.co_varnames, *kind.get_attributes(), "processor_class", "auto_map", "custom_pipelines"}
    unused = sorted(_settings(folder / PROCESSOR).keys() - taken - {"chat_template", "image_processor", "video_processor"})
    notices = []
    if unused:
        notices.append(f"{PROCESSOR} has settings that {kind.__name__} does not take: {', '.join(unused)}")
    if named is not None and named.removesuffix("Fast") != kind.__name__:
        notices.append(f"the files name the processor class {named}; the model's own, {kind.__name__}, is used")
    return notices


def tokenizers(processor: ProcessorMixin) -> dict[str, PreTrainedTokenizerBase]:
    """The tokenizers of a processor by attribute: `tokenizer`, and others, as the Q-Former's."""
    return {name: getattr(processor, name) for name in type(processor).get_attributes() if "tokenizer" in name}


def pin(processor: ProcessorMixin, folder: Path) -> None:
    """Write into an export's files the classes of the base's processor, where these are not what the files alone give."""
    for name, tokenizer in tokenizers(processor).items():
        file, kind = folder / ("" if name == "tokenizer" else name) / TOKENIZER, _tokenizer_class(type(tokenizer).__name__)
        if _tokenizer_class(_settings(file).get("tokenizer_class")) != kind:
            _set(file, "tokenizer_class", kind)
    _set(folder / PROCESSOR, "processor_class", type(processor).__name__)
    nested = _settings(folder / PROCESSOR)
    images = _settings(folder / IMAGES)
    if "image_processor" not in nested and not images.keys() & {"image_processor_type", "feature_extractor_type"}:
        kind = type(processor.image_processor).__name__.removesuffix("Pil").removesuffix("Fast")
        _set(folder / IMAGES, "image_processor_type", kind)
    videos = getattr(processor, "video_processor", None)
    if videos is not None and "video_processor" not in nested and "video_processor_type" not in _settings(folder / VIDEOS):
        (folder / VIDEOS).write_text(videos.to_json_string(), "utf-8")


def _tokenizer_class(named: object) -> str:
    """A tokenizer class under the one name for it that other versions, and transformers.js, know too."""
    name = str(named)
    if name == "TokenizersBackend":
        return "PreTrainedTokenizerFast"
    return name if name.startswith("PreTr") else name.removesuffix("Fast")


def _set(file: Path, key: str, value: str) -> None:
    settings = _settings(file)
    if settings.get(key) != value:
        file.write_text(json.dumps({**settings, key: value}, indent=2, ensure_ascii=False) + "\n", "utf-8")


def check_same(base: ProcessorMixin, folder: Path, recipe: Recipe) -> None:
    """Raise VerificationError where the processor of an export gives other tokens, pixels or prompts than its base's."""
    exported = load_processor(folder, recipe, "CHECKPOINT")
    if found := next(_differences(base, exported), None):
        raise VerificationError(f"{folder}: the processor of the export is not the base model's: {found}.")


def _differences(one: ProcessorMixin, other: ProcessorMixin) -> Iterator[str]:
    if type(one) is not type(other):
        yield f"it is a {type(other).__name__}, and the base's is a {type(one).__name__}"
        return
    if one.chat_template != other.chat_template:
        yield "its chat template is another"
    for name, tokenizer in tokenizers(one).items():
        twin = getattr(other, name)
        if any(tokenizer(t)["input_ids"] != twin(t)["input_ids"] for t in (ODD_TEXT, ODD_TEXT.strip())):
            yield f"its {name} gives other tokens for the same text"
        if [*map(str, tokenizer.all_special_tokens)] != [*map(str, twin.all_special_tokens)]:
            yield f"its {name} has other special tokens"
    for name in type(one).get_attributes():
        if name in tokenizers(one):
            continue
        part, twin = getattr(one, name), getattr(other, name)
        if type(part) is not type(twin) or part.to_dict() != twin.to_dict():
            yield f"its {name} is a {type(twin).__name__} with other settings"
    for image in (typographic_image("hello"), typographic_image("hello").resize((90, 40))):
        first, second = (_inputs(p, image) for p in (one, other))
        different = [k for k in first.keys() | second.keys() if not _equal(first.get(k), second.get(k))]
        if different:
            yield f"a prompt with an image differs in {', '.join(sorted(different))}"


def _inputs(processor: ProcessorMixin, image: Image.Image) -> Mapping[str, object]:
    return dict(encoded(processor, [[user_turn("What  is 2024?\n", image)]], return_tensors="pt"))


def _equal(one: object, other: object) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) else one == other
