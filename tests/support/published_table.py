"""The table of docs/published.md: prompts composed with published templates and vocabularies, and those that differ.

SHIFTDC_PUBLISHED=FOLDER SHIFTDC_VOCABULARIES=FOLDER python tests/support/published_table.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import with_torchvision  # noqa: F401 (before transformers)
from published import CHECKPOINTS

from exporter.models.base import resolve_small
from exporter.models.check import check, recipe_of


def main() -> None:
    print("| checkpoint | what is particular | prompts compared | different | not taken by its template |")
    print("|---|---|---|---|---|")
    for name, make in CHECKPOINTS.items():
        with tempfile.TemporaryDirectory() as work:
            files = resolve_small(str(make(Path(work))))
            found = check(files, recipe_of(files), allow_inexact=True).prompts
        what = (make.__doc__ or "").strip().rstrip(".")
        refused = ", ".join(found.refused) or "-"
        print(f"| `{name}` | {what} | {found.compared} | {len(found.differences)} | {refused} |", flush=True)


if __name__ == "__main__":
    main()
