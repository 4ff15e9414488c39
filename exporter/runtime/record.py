"""Values that are kept in a JSON document and read again, perhaps by another version of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer

#: For a dataclass of which records hold rows.
KEEPS_UNKNOWN = ConfigDict(extra="allow")


class Record(BaseModel):
    """A frozen part of a document. Of its keys those are demanded that are relied on; unknown ones are kept."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


def _with_unknown_keys(rows: Sequence[object]) -> list[dict[str, object]]:
    return [dict(vars(row)) for row in rows]


#: JSON has lists only, which `strict` does not take for tuples.
AsList = Field(strict=False)
Texts = Annotated[tuple[str, ...], AsList]
#: For a tuple of dataclasses that keep what is unknown: pydantic alone would not write it again.
InFull = PlainSerializer(_with_unknown_keys)
