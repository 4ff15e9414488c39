"""Files that come from others, read with a limit on their size and in forms that cannot grow in memory.

Every function raises UnreadableError, whose message is a reason without anything of the content.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import yaml

#: Largest files that are read whole, in bytes. The largest real ones are far smaller: an index of a 1000-shard model has 10 MB.
RECIPE_BYTES = 256_000
JSON_BYTES = 64_000_000
CARD_BYTES = 4_000_000
LINES_BYTES = 512_000_000
#: Largest header of a safetensors file; the format itself allows 100 MB.
HEADER_BYTES = 32_000_000
#: Longest number in YAML, in characters; one of millions of hexadecimal digits is read and can then not be printed.
NUMBER_CHARACTERS = 100
#: Longest request, prompt or caption, in characters.
TEXT_CHARACTERS = 32_768


#: What JSON can hold.
Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"


class UnreadableError(ValueError):
    """The file cannot be used, for the reason that the message gives."""


class NoFileError(UnreadableError):
    """There is no such file."""


def read_bytes(file: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes; nothing larger is read."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe would be waited for, for ever
            raise UnreadableError("it is no regular file")
        with file.open("rb") as stream:
            data = stream.read(most + 1)
    except FileNotFoundError as error:
        raise NoFileError("there is no such file") from error
    except UnreadableError:
        raise
    except OSError as error:
        raise UnreadableError(error.strerror or type(error).__name__) from error
    except ValueError as error:  # a null byte
        raise UnreadableError("its path is not usable") from error
    if len(data) > most:
        raise UnreadableError(f"it has more than {most:,} bytes")
    return data


def text_of(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"byte {error.start} is not UTF-8") from error


def parse_json(text: str | bytes, *, unique: bool = False) -> Any:
    """JSON; with `unique`, a key that stands twice in an object is an error."""
    try:
        return json.loads(text, object_pairs_hook=_unique if unique else None)
    except UnreadableError:
        raise
    except RecursionError as error:
        raise UnreadableError("it is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise UnreadableError(f"byte {error.start} is not UTF-8") from error
    except ValueError as error:
        raise UnreadableError(str(error)) from error


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise UnreadableError("a key stands twice in one object")
    return found


def member(value: Mapping[str, Json], key: str) -> Mapping[str, Json]:
    """The object at `key`; an empty one where there is none, or something else."""
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def read_json(file: Path, *, unique: bool = False) -> Any:
    return parse_json(text_of(read_bytes(file, JSON_BYTES)), unique=unique)


# what PyYAML raises on dates and numbers that are none
_NO_VALUE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


class _PlainLoader(yaml.SafeLoader):
    """No aliases, which make gigabytes of a few lines, and no key twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        found = super().construct_mapping(node, deep=deep)
        if len(found) < len(node.value):
            raise yaml.YAMLError("a key stands twice in one mapping")
        return found


def _number(loader: _PlainLoader, node: yaml.ScalarNode) -> Any:
    if len(node.value) > NUMBER_CHARACTERS:
        raise yaml.YAMLError(f"a number has more than {NUMBER_CHARACTERS} characters")
    return loader.construct_yaml_int(node) if node.tag.endswith(":int") else loader.construct_yaml_float(node)


for _kind in ("int", "float"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _number)


def parse_yaml(text: str) -> Any:
    try:
        return yaml.load(text, _PlainLoader)  # noqa: S506 (a SafeLoader)
    except RecursionError as error:
        raise UnreadableError("it is nested too deeply") from error
    except yaml.YAMLError as error:
        raise UnreadableError(str(error).splitlines()[0]) from None  # its other lines quote the text
    except _NO_VALUE:
        raise UnreadableError("a value is not of the type that its form or tag says") from None  # it quotes the value
