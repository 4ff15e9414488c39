"""What pydantic finds wrong with a value, in a few words."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from pydantic import ValidationError


class Complaint(NamedTuple):
    """The path of a key, and what is wrong with it."""

    key: str
    message: str


def first_complaint(error: ValidationError, whole: str = "the file", below: Collection[str] | None = None) -> Complaint:
    """The first thing that is wrong, without the value found there: that may be a request.

    whole: what has no key. below: the keys that count below the first; a union adds the names of its members.
    """
    first = error.errors(include_input=False, include_url=False)[0]
    path = [str(part) for i, part in enumerate(first["loc"]) if not i or below is None or part in below]
    return Complaint(".".join(path)[:200] or whole, first["msg"].removeprefix("Value error, "))
