"""Conversations in the form that chat templates and processors take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from PIL import Image

from exporter.data.images import blank_image

Role = Literal["system", "user", "assistant"]


class TextPart(TypedDict):
    type: Literal["text"]
    text: str


class ImagePart(TypedDict):
    type: Literal["image"]
    image: Image.Image


class Message(TypedDict):
    """One turn."""

    role: Role
    content: list[TextPart | ImagePart]


Conversation = list[Message]
#: What is only handed on to a template, with whatever else a client wrote into it.
GivenConversation = Sequence[Mapping[str, object]]


def user_turn(request: str, *images: Image.Image | None, behind: bool = False) -> Message:
    """A request with its images before or behind it."""
    pictures = [_shown(image) for image in images if image is not None]
    return {"role": "user", "content": [_said(request), *pictures] if behind else [*pictures, _said(request)]}


def text_turn(role: Role, text: str) -> Message:
    return {"role": role, "content": [_said(text)]}


def has_image(conversation: Conversation) -> bool:
    return any(part["type"] == "image" for turn in conversation for part in turn["content"])


def without_images(conversation: Conversation) -> Conversation:
    return [{**turn, "content": [part for part in turn["content"] if part["type"] != "image"]} for turn in conversation]


def with_blank_image(conversation: Conversation) -> Conversation:
    """With a neutral image before the first request."""
    index = next(i for i, turn in enumerate(conversation) if turn["role"] == "user")
    first = conversation[index]
    shown: Message = {**first, "content": [_shown(blank_image()), *first["content"]]}
    return [*conversation[:index], shown, *conversation[index + 1 :]]


def _said(text: str) -> TextPart:
    return {"type": "text", "text": text}


def _shown(image: Image.Image) -> ImagePart:
    return {"type": "image", "image": image}
