"""The table of cells: what follows from it is what benchmarks, figures and cards rely on."""

from __future__ import annotations

from typing import get_args

from exporter.data.cells import ATTACKS, BENIGN, CELLS, HEADLINE, Cell, cell_words, cells_in_rows


def test_every_cell_stands_in_the_table_once():
    assert tuple(CELLS) == get_args(Cell)
    assert sorted(role.row for role in CELLS.values()) == list(range(len(CELLS)))


def test_what_counts_where():
    assert {"harmful_image", "harmful_text"} == ATTACKS
    assert HEADLINE == ("harmful_image",)
    assert BENIGN == ("harmless_image", "benign_question_harmful", "benign_question_harmless")


def test_words_and_rows():
    assert cell_words("harmless_image") == "harmless requests about harmless images"
    assert cell_words("own_cell") == "own cell"
    assert list(cells_in_rows(dict.fromkeys(("own_cell", *CELLS)))) == [
        "harmful_image", "harmful_text", "harmless_text", "benign_question_harmful", "benign_question_harmless",
        "harmless_image", "own_cell",
    ]  # fmt: skip
