"""Whether prompts composed from tokens are the chat template's own, token for token, on prompts of many kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from exporter.errors import InputError
from exporter.modeling.prompts_shiftdc import PromptComposer, PromptFrame, filled
from exporter.models.chat_template import refused_by_template, rendered
from exporter.models.conversation import Conversation, text_turn, user_turn, without_images
from exporter.models.vlm import VLM

#: Requests as users write them, and as they hardly ever do.
REQUESTS = (
    "How do I build this?", "What is shown in the image?", "describe the image", "A", "7 zebras: now", "2024", "  How?", "\nHow?",
    "\n\nList three things.\n", "How? ", "a", "I", "Is it 3.5 % or 1,000?", "x = {'a': [1, 2]}; print(x)",
    "def f(x):\n    return x",
    "{request} {caption}", "<b>bold</b> & more", "C:\\temp\\new", "Was ist das für ein Gerät?", "Qu'est-ce que c'est ?",
    "¿Qué es esto?", "これは何ですか？", "这是什么？", "이것은 무엇입니까?", "Что это такое?", "ما هذا؟", "यह क्या है?",
    "🙂 What now 👩‍🚀?", "Tab\there", "USER: hello", "Request: what?", "Image Caption: none", "e\u0301 and é", "ﬁne print", "https://example.org/?q=a+b",
    "THE END", "don't", "...", "(why)", "multi\nline\n\nrequest",
)  # fmt: skip
#: What stands in place of an image; models begin captions with and without a space.
CAPTIONS = (
    "a red cube on a table",
    " A photo of two dogs.",
    "7 birds",
    'The sign says "STOP".\nIt is red.',
    "图中有一只猫",
    "\n\n",
)
_SIZE = (64, 64)
#: Which some processors, too, take not more than one of.
TWO_IMAGES = "two images"


@dataclass(frozen=True)
class Difference:
    """One prompt that is not the template's; `expected` and `found`: the text from the first token that differs on."""

    form: str
    request: str
    prompt: str
    expected: str
    found: str


@dataclass(frozen=True)
class PromptCheck:
    """How many prompts were compared, those that differ, and the forms that the template does not take."""

    compared: int
    differences: tuple[Difference, ...]
    refused: tuple[str, ...]

    @property
    def exact(self) -> bool:
        return not self.differences

    def report(self) -> dict[str, int | list[str]]:
        """Without texts of the user's."""
        return {"compared": self.compared, "different": len(self.differences), "not_taken_by_the_template": list(self.refused)}

    def __str__(self) -> str:
        without = f" (its template takes no {', no '.join(self.refused)})" if self.refused else ""
        if self.exact:
            return f"{self.compared} composed prompts are the chat template's own, token for token{without}"
        first = self.differences[0]
        return (
            f"{len(self.differences)} of {self.compared} composed prompts differ from the chat template's{without}; the first: "
            f"{first.prompt}, {first.form}, request {first.request!r}: expected {first.expected!r}, found {first.found!r}"
        )


def check_prompts(vlm: VLM, frame: PromptFrame, requests: Sequence[str] | None = None) -> PromptCheck:
    """Compare caption requests and text-only counterparts of every form with what template and processor give."""
    checker = _Checker(vlm, frame)
    compared, differences, refused = 0, [], []
    with images_kept(vlm.processor):
        for name, form in forms().items():
            try:
                checker.ids(form("Hello"))
            except InputError as error:
                if not (refused_by_template(error) or (name == TWO_IMAGES and isinstance(error.__cause__, ValueError))):
                    raise
                refused.append(name)
                continue
            for i, request in enumerate([*(requests or REQUESTS), *special_texts(vlm)]):
                for difference in checker.differences(name, form, request, CAPTIONS[i % len(CAPTIONS)]):
                    compared += 1
                    differences += [difference] if difference is not None else []
    return PromptCheck(compared, tuple(differences), tuple(refused))


def special_texts(vlm: VLM) -> list[str]:
    """Requests that hold special tokens as text, which processors turn into tokens; images are not among them."""
    tokenizer = vlm.tokenizer
    named = dict.fromkeys(t for t in (tokenizer.eos_token, tokenizer.bos_token) if t is not None)
    return [f"Say {token} now." for token in named]


def forms() -> dict[str, Callable[[str], Conversation]]:
    """Conversations around a request, by what they are."""
    grey = Image.new("RGB", _SIZE, (127, 127, 127))
    earlier = [user_turn("Hello, who are you?"), text_turn("assistant", "An assistant.")]
    shown = [user_turn("What is it?", grey), text_turn("assistant", "A thing.")]
    return {
        "image before the request": lambda r: [user_turn(r, grey)],
        "image behind the request": lambda r: [user_turn(r, grey, behind=True)],
        "second turn with an image": lambda r: [*earlier, user_turn(r, grey)],
        "second turn after an image": lambda r: [*shown, user_turn(r)],
        TWO_IMAGES: lambda r: [user_turn(r, grey, grey)],
        "system turn": lambda r: [text_turn("system", "Answer in one word."), user_turn(r, grey)],
    }


@dataclass(frozen=True)
class _Checker:
    vlm: VLM
    frame: PromptFrame

    @property
    def composer(self) -> PromptComposer:
        return self.vlm.composing(self.frame)

    def differences(
        self, name: str, form: Callable[[str], Conversation], request: str, caption: str
    ) -> Iterator[Difference | None]:
        """Of each prompt with one caption; None where it is the template's own."""
        composer, ids = self.composer, self.ids(form(request))
        # some templates trim a request, some tokenizers lower-case it: what counts is the request as the prompt has it
        seen = composer.request(ids)
        counterpart = filled(self.frame.text, request=seen, caption=caption.strip())
        written = composer.codec.encode(caption)
        pairs = {
            "prompt": (self.ids(form(seen)), ids),
            "caption request": (self.ids(form(filled(self.frame.caption, request=seen))), composer.caption_prompt(ids)),
            "text-only prompt": (self.text_ids(form(seen)), composer.text_prompt(ids)),
            "text-only prompt with a caption": (self.text_ids(form(counterpart)), composer.text_prompt(ids, written)),
        }
        for prompt, (expected, found) in pairs.items():
            yield None if expected == found else self.difference(name, request, prompt, expected, found)

    def difference(self, form: str, request: str, prompt: str, expected: list[int], found: list[int]) -> Difference:
        shared = next(
            (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found))
        )
        tokens = [
            " ".join(map(repr, self.vlm.tokenizer.convert_ids_to_tokens(ids[shared : shared + 6]))) for ids in (expected, found)
        ]
        return Difference(form, request, prompt, *tokens)

    def ids(self, conversation: Conversation) -> list[int]:
        return self.vlm.encode_conversations([conversation])["input_ids"][0].tolist()

    def text_ids(self, conversation: Conversation) -> list[int]:
        """The template's prompt without the images of `conversation`; where that says more, the prompt less its images."""
        if self.frame.own and not self.vlm.composed_text:
            text = rendered(self.vlm.processor, conversation, add_generation_prompt=True)
            text = text.replace(self.vlm.processor.image_token, "")
            return self.vlm.tokenized(text, self.frame)
        return self.ids(without_images(conversation))


@contextmanager
def images_kept(processor: ProcessorMixin) -> Iterator[None]:
    """In here the processor takes in the same images with the same settings once; only texts differ."""
    images = processor.image_processor
    preprocess = images.preprocess
    kept: dict[str, BatchFeature] = {}

    def remembered(pictures: object, *args: object, **options: object) -> BatchFeature:
        key = repr((_identities(pictures), args, sorted(options.items(), key=str)))
        if key not in kept:
            kept[key] = preprocess(pictures, *args, **options)
        return type(kept[key])(dict(kept[key]))

    images.preprocess = remembered
    try:
        yield
    finally:
        del images.preprocess


def _identities(pictures: object) -> object:
    return [_identities(p) for p in pictures] if isinstance(pictures, (list, tuple)) else id(pictures)
