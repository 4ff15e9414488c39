"""replies.jsonl: every reply of an evaluation, appended as it comes, so that an interrupted run goes on where it stopped.

The first line holds the settings that the replies depend on. Prompts are not in it: a question is named by its id.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from exporter.errors import InputError
from exporter.runtime.reading import LINES_BYTES, parse_json, read_bytes, text_of

FILE = "replies.jsonl"


@dataclass(frozen=True)
class Reply:
    """One reply; `seconds` is its share of its batch's time, by stage."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    defence: str
    question: str
    text: str
    seconds: dict[str, float]


class ReplyLog:
    """The replies in a folder under one group of settings."""

    def __init__(self, folder: Path, settings: dict[str, object]):
        """Open or start the log; a log of other settings is set aside. Raises InputError for a file that is no log."""
        self.file = folder / FILE
        self.settings = settings
        self.set_aside: Path | None = None
        self._replies: dict[tuple[str, str], Reply] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            found, replies = _read(self.file)
            if found == settings:
                self._replies = {(r.defence, r.question): r for r in replies}
            else:
                self.set_aside = free_name(self.file)
                self.file.rename(self.set_aside)
        if not self._replies:
            self.file.write_text(json.dumps({"settings": settings}) + "\n", "utf-8")
        else:  # a line that an interruption cut short is dropped
            self._rewrite()

    def missing(self, defence: str, questions: Iterable[str]) -> list[str]:
        return [q for q in questions if (defence, q) not in self._replies]

    def append(self, replies: Iterable[Reply]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            for reply in replies:
                file.write(json.dumps(asdict(reply)) + "\n")
                self._replies[reply.defence, reply.question] = reply

    def of(self, defence: str, questions: Iterable[str]) -> list[Reply]:
        return [self._replies[defence, q] for q in questions]

    def _rewrite(self) -> None:
        partial = self.file.with_suffix(".partial")
        lines = [{"settings": self.settings}, *map(asdict, self._replies.values())]
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        partial.replace(self.file)


_REPLY = TypeAdapter(Reply)


def _read(file: Path) -> tuple[object, list[Reply]]:
    try:
        first, *rest = text_of(read_bytes(file, LINES_BYTES)).removesuffix("\n").split("\n")
        settings = parse_json(first)["settings"]
    except (ValueError, KeyError, TypeError) as error:  # UnreadableError is a ValueError
        raise InputError(f"--output: {file} is no log of replies of this tool; give another folder.") from error
    replies = []
    for number, line in enumerate(rest, 2):
        try:
            replies.append(_REPLY.validate_json(line))
        except ValidationError:
            if number == len(rest) + 1:  # cut short by an interruption
                break
            reason = f"--output: {file}, line {number} is no reply; give another folder."
            raise InputError(reason) from None  # it quotes the reply
    return settings, replies


def free_name(file: Path) -> Path:
    """`file` with the first number that no other has."""
    number = 1
    while (name := file.with_name(f"{file.stem}.{number}{file.suffix}")).exists():
        number += 1
    return name
