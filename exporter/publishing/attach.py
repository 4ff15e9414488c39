"""Put figures and pictures into an export, and write its card and report anew."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from exporter.checkpoint.layout import CARD, REPORT
from exporter.checkpoint.manifest import rehashed, with_hashes
from exporter.checkpoint.report import Report
from exporter.checkpoint.staging import write_together
from exporter.errors import printable
from exporter.evaluation.replies import free_name
from exporter.evaluation.results import Results
from exporter.evaluation.results_json import as_document
from exporter.models.base import BaseCheckpoint
from exporter.publishing.card import render_card
from exporter.runtime.hashing import sha256

log = logging.getLogger(__name__)


def attach_results(checkpoint: Path, report: Report, results: Results, pictures: Sequence[Path]) -> None:
    """Put figures and pictures into the checkpoint; replies stay outside."""
    report = report.model_copy(update={"evaluation": as_document(results)})
    assets = {f"assets/{p.name}": p.read_bytes() for p in pictures}
    write_together(checkpoint, assets)
    write_report_and_card(checkpoint, rehashed(report, checkpoint, assets))


def write_report_and_card(checkpoint: Path, report: Report) -> None:
    """Write a report, and the card that it gives; the card shows the pictures that are there."""
    card = card_of(checkpoint, report)
    _keep_edited(checkpoint, report)
    report = with_hashes(report, {CARD: hashlib.sha256(card.encode()).hexdigest()})
    write_together(checkpoint, {CARD: card, REPORT: report.text()})


def _keep_edited(checkpoint: Path, report: Report) -> None:
    """Put a card that its owner has written into under another name, which is no part of the export."""
    card = checkpoint / CARD
    if not card.is_file() or sha256(card) == report.files.get(CARD):
        return
    kept = free_name(checkpoint / f".edited-{CARD}")
    shutil.copyfile(card, kept)
    log.warning("%s", printable(f"{card} was edited, and is written anew; what it was is kept in {kept}."))


def card_of(checkpoint: Path, report: Report) -> str:
    """The card of an export from its own report; licence and language come from the card that it has."""
    base = BaseCheckpoint(report.base_model.id, report.base_model.revision, checkpoint, {}, ())
    return render_card(base, report.recipe, report, report.statistics, repo=checkpoint.name)
