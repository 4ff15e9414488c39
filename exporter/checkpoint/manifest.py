"""Which files an export consists of, and the SHA-256 of each, which its report keeps under "files"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from exporter.checkpoint.layout import CARD, REPORT
from exporter.checkpoint.report import Report
from exporter.runtime.hashing import sha256


def shipped(folder: Path) -> list[str]:
    """Paths of what is pushed and verified, sorted: all files but dotfiles, unfinished ones and replies."""
    paths = (f.relative_to(folder) for f in folder.rglob("*") if f.is_file() or f.is_symlink())
    return sorted(p.as_posix() for p in paths if not (_hidden(p) or p.suffix in (".partial", ".jsonl")))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def hashes(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """SHA-256 by path of every shipped file but the report; `known` ones are not read."""
    known = known or {}
    return {p: known.get(p) or _hash(folder / p) for p in shipped(folder) if p != REPORT}


def _hash(file: Path) -> str:
    return sha256(file) if file.is_file() else "a link that leads to no file"


def rehashed(report: Report, folder: Path, changed: Iterable[str]) -> Report:
    """The report with the hashes of `changed` paths as they are in `folder` now."""
    return with_hashes(report, {p: sha256(folder / p) for p in changed})


def with_hashes(report: Report, changed: Mapping[str, str]) -> Report:
    """The report with other hashes of some paths."""
    return report.model_copy(update={"files": dict(sorted({**report.files, **changed}.items()))})


def differences(folder: Path, report: Report) -> tuple[list[str], list[str]]:
    """(what is wrong, one clause each; what its owner may have edited). Hashes every file."""
    expected, found = report.files, hashes(folder)
    changed = [p for p in expected.keys() & found.keys() if expected[p] != found[p]]
    shards = report.base_model.shards
    wrong = [
        *(f"{p} is missing" for p in expected.keys() - found.keys()),
        *(f"{p} is not part of the export" for p in found.keys() - expected.keys()),
        *(f"{p} is not bitwise the base model's" if p in shards else f"{p} was changed" for p in changed if p != CARD),
        *(f"the report contradicts itself on {p}" for p in shards if expected.get(p) != shards[p]),
    ]
    return sorted(wrong), [p for p in changed if p == CARD]
