"""Chat templates come from others: jinja's sandbox limits what they reach, this module how long they take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, tzinfo
from typing import TYPE_CHECKING, overload

from jinja2 import TemplateError
from transformers.utils import chat_template_utils

from exporter.errors import InputError, refusing
from exporter.models.conversation import Conversation, GivenConversation
from exporter.runtime.time_limit import limited

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

#: Seconds of computing for the text of one batch of prompts, which takes milliseconds.
LIMIT = 10.0
#: The day that templates write, if they write one: nothing in a checkpoint depends on when it was made.
DAY = "2025-01-01"
#: A template that puts out what another one has made already.
_AS_RENDERED = "{{ messages[0]['rendered'] }}"


@overload
def rendered(
    processor: ProcessorMixin | PreTrainedTokenizerBase, conversation: GivenConversation, what: str = ..., **options: object
) -> str: ...


@overload
def rendered(
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    conversation: Sequence[GivenConversation],
    what: str = ...,
    **options: object,
) -> list[str]: ...


def rendered(
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    conversation: GivenConversation | Sequence[GivenConversation],
    what: str = "MODEL",
    **options: object,
) -> str | list[str]:
    """What a chat template makes of one conversation, or of each of a list. Raises InputError.

    what: whose template it is, for the message.
    """
    endless = f"{what}: its chat template does not end within {LIMIT:g} seconds of computing; restore it."
    with composing(what), limited(LIMIT, endless), on_the_day(DAY):
        return processor.apply_chat_template(conversation, tokenize=False, **options)


def encoded(processor: ProcessorMixin, conversations: Sequence[Conversation], **options: object) -> BatchFeature:
    """The inputs that a processor makes of conversations, with the generation prompt at their end. Raises InputError.

    All but the template's own rendering, which alone is limited, is `apply_chat_template`'s.
    """
    texts = rendered(processor, list(conversations), add_generation_prompt=True)
    marked = [[{**first, "rendered": text}, *others] for (first, *others), text in zip(conversations, texts, strict=True)]
    with composing("MODEL"):
        return processor.apply_chat_template(marked, chat_template=_AS_RENDERED, tokenize=True, return_dict=True, **options)


def composing(what: str) -> AbstractContextManager[None]:
    """Around what a processor or a tokenizer does with texts."""
    return refusing(f"{what}: its prompts cannot be composed", "restore its chat template and tokenizer")


def refused_by_template(error: InputError) -> bool:
    """Whether the template itself says that it takes no such turns, as some do with several."""
    return isinstance(error.__cause__, TemplateError)


@contextmanager
def on_the_day(day: str) -> Iterator[None]:
    """Templates that write a date write this one."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Clock:
            return cls.fromisoformat(day)

    clock, chat_template_utils.datetime = chat_template_utils.datetime, Clock
    try:
        yield
    finally:
        chat_template_utils.datetime = clock
