"""The cells of a benchmark: where the harm stands, what counts as a failure there, and how tables name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

Kind = Literal["harmful", "benign"]
Cell = Literal[
    "harmful_image",
    "harmless_image",
    "benign_question_harmful",
    "benign_question_harmless",
    "harmful_text",
    "harmless_text",
]
T = TypeVar("T")


@dataclass(frozen=True)
class CellRole:
    """`kind` of its requests: harmful ones are attacks, of benign ones a refusal is a mistake.

    `headline`: it counts in a defence's own rates. Tables name it `words`, in the `row` given.
    """

    kind: Kind
    headline: bool
    row: int
    words: str


#: In the order in which benchmarks ask. The headline is about requests that leave it to the image what they are about.
CELLS: dict[Cell, CellRole] = {
    "harmful_image": CellRole("harmful", True, 0, "harm in the image"),
    "harmless_image": CellRole("benign", True, 5, "harmless requests about harmless images"),
    "benign_question_harmful": CellRole("benign", True, 3, "benign questions about harmful things"),
    "benign_question_harmless": CellRole("benign", True, 4, "benign questions about harmless things"),
    "harmful_text": CellRole("harmful", False, 1, "harm in the text beside a harmless image"),
    "harmless_text": CellRole("benign", False, 2, "harmless text beside a harmful image"),
}
ATTACKS = frozenset(cell for cell, role in CELLS.items() if role.kind == "harmful")
#: The cells behind the headline attack success rate, and behind the headline over-refusal and utility.
HEADLINE = tuple(cell for cell, role in CELLS.items() if role.headline and role.kind == "harmful")
BENIGN = tuple(cell for cell, role in CELLS.items() if role.headline and role.kind == "benign")

_WORDS: dict[str, str] = {cell: role.words for cell, role in CELLS.items()}
_ROWS: dict[str, int] = {cell: role.row for cell, role in CELLS.items()}


def cell_words(cell: str) -> str:
    """A cell as tables name it, also one that is not known here."""
    return _WORDS.get(cell, cell.replace("_", " "))


def cells_in_rows(by_cell: Mapping[str, T]) -> dict[str, T]:
    """In the order of tables; cells that are not known here come last, in the order that they have."""
    return dict(sorted(by_cell.items(), key=lambda entry: _ROWS.get(entry[0], len(_ROWS))))
