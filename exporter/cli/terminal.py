"""What is shown of a run: to a person on the terminal, or to a program as one JSON document."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from exporter.cli import console
from exporter.cli.progress_bars import progress_bars
from exporter.errors import printable

if TYPE_CHECKING:  # none of these is needed to print the help
    from exporter.evaluation.comparison import Comparison
    from exporter.onnx.export import OnnxEntry
    from exporter.pipeline.evaluate import Evidence
    from exporter.pipeline.export import Export
    from exporter.pipeline.plan import Plan
    from exporter.publishing.push import Pushed
    from exporter.runtime.progress import Progress


class Terminal:
    """Results on stdout as they come; progress, and what to beware of, on stderr."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet

    def announce(self, line: str) -> None:
        if not self.quiet:
            click.echo(printable(line), err=True)

    def progress(self) -> AbstractContextManager[Progress]:
        return progress_bars(self.quiet)

    def planned(self, plan: Plan, repo_id: str | None) -> None:
        from exporter.pipeline.plan import plan_needs

        click.echo(console.plan_text(plan, plan_needs(plan), repo_id))

    def exported(self, done: Export) -> None:
        click.echo(f"{printable(done.plan.base.name)} is calibrated: {printable(str(done.plan.output))}")
        for warning in done.report.calibration.warnings:
            click.echo(f"Warning: {printable(warning)}", err=True)
        click.echo(console.export_text(done))

    def evaluated(self, found: Evidence) -> None:
        out = Console() if sys.stdout.isatty() else Console(width=130)
        out.print(console.defence_table(found.results))
        out.print(console.cell_table(found.results))
        click.echo(console.results_legend(found.results))
        click.echo(found.effect.sentence)
        click.echo(f"Replies, results and pictures: {found.folder}")
        _beware(found)

    def traced(self, checkpoint: Path, entry: OnnxEntry) -> None:
        Console().print(console.onnx_table(checkpoint / "onnx", entry))

    def pushed(self, done: Pushed) -> None:
        click.echo(console.pushed_text(done))
        _note(done)

    def compared(self, result: Comparison) -> None:
        out = Console()
        out.print(f"[bold]uncalibrated[/] ({result.uncalibrated_seconds:.2f} s): ", end="")
        out.print(result.uncalibrated, markup=False)
        out.print(f"[bold]calibrated[/]   ({result.calibrated_seconds:.2f} s): ", end="")
        out.print(result.calibrated, markup=False)
        if result.caption is not None:
            out.print("[bold]its caption[/]: ", end="")
            out.print(result.caption, markup=False)
        out.print(console.shift_table(result))

    def finished(self, done: Export) -> None:
        """Everything was shown already."""


class Document(Terminal):
    """Nothing on stdout but one JSON document, at the end."""

    def planned(self, plan: Plan, repo_id: str | None) -> None:
        from exporter.pipeline.plan import plan_needs

        print_json(console.plan_document(plan, plan_needs(plan), repo_id))

    def exported(self, done: Export) -> None:
        """Part of the document at the end."""

    def evaluated(self, found: Evidence) -> None:
        _beware(found)

    def traced(self, checkpoint: Path, entry: OnnxEntry) -> None:
        """Part of the document at the end."""

    def pushed(self, done: Pushed) -> None:
        _note(done)

    def finished(self, done: Export) -> None:
        print_json({"output": str(done.plan.output), **done.report.document()})


def print_json(document: object) -> None:
    click.echo(json.dumps(document, indent=2))


def _beware(found: Evidence) -> None:
    if found.set_aside:
        click.echo(f"Replies made with other settings were there; they are kept in {found.set_aside.name}.", err=True)
    for harm in found.effect.harms:
        click.echo(f"Warning: {harm}", err=True)
    if not found.effect.effective:
        click.echo("Warning: it is not shown that calibration lowers attack success here.", err=True)


def _note(done: Pushed) -> None:
    if done.note:
        click.echo(done.note, err=True)
