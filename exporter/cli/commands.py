"""The commands: each parses, calls one function, and shows what it gave. Heavy imports wait until a command runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from exporter import __version__
from exporter.cli import console, options
from exporter.cli.group import DefaultToExport
from exporter.cli.libraries import libraries_quiet
from exporter.cli.terminal import Document, Terminal, print_json
from exporter.errors import InputError
from exporter.onnx.interface import SUFFIXES as PRECISIONS
from exporter.runtime.ranks import is_main, world_size


@click.group(cls=DefaultToExport, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="shiftdc-export")
@click.pass_context
def main(context: click.Context) -> None:
    """Export vision-language models whose safety an image does not bend (ShiftDC, arXiv:2502.13095).

    \b
    shiftdc-export MODEL [OPTIONS]   calibrate a checkpoint; MODEL: Hub id, folder, or demo
    shiftdc-export COMMAND ...       one of the commands below
    """
    if world_size() > 1 and context.invoked_subcommand != "export":
        raise InputError("torchrun splits the prompts of an export; run the other commands without it.")


@main.command("export", hidden=True)
@click.argument("model")
@click.option("--output", type=options.PATH, help="Folder to write [default: ./<name>-shiftdc].")
@options.method
@options.measuring
@click.option("--evaluate", is_flag=True, help="Measure the effect on the recipe's benchmark and put it into the card.")
@click.option("--onnx", is_flag=True, help="Also write ONNX graphs, at every precision.")
@click.option("--push", is_flag=True, help="Upload the export to the Hub and check what is there.")
@options.push
@click.option("--dry-run", is_flag=True, help="Print the plan and touch nothing.")
@click.option("--force", is_flag=True, help="Replace an earlier export in --output, and nothing of yours.")
@options.quiet
@options.as_json
def export_command(
    model: str,
    evaluate: bool,
    onnx: bool,
    push: bool,
    repo_id: str | None,
    private: bool,
    create_pr: bool,
    allow_ineffective: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
    **settings: object,
) -> None:
    """Calibrate MODEL and write a self-contained checkpoint."""
    with libraries_quiet():
        from exporter.pipeline.plan import ExportOptions
        from exporter.pipeline.run import PushOptions, Request, run

        target = PushOptions(repo_id, private, create_pr, allow_ineffective) if push else None
        request = Request(model, ExportOptions.of(**settings), evaluate=evaluate, onnx=onnx, push=target, dry_run=dry_run)
        show = (Document if as_json else Terminal)(quiet=quiet or not is_main())
        done = run(request, show)
    if done is not None:
        show.finished(done)


@main.command("check")
@click.argument("model")
@options.recipe
@options.experimental_family
@options.revision
@options.as_json
def check_command(model: str, recipe: str | None, experimental_family: bool, revision: str | None, as_json: bool) -> None:
    """Tell whether MODEL can be calibrated, from its small files alone."""
    with libraries_quiet():
        from exporter.models.base import resolve_small
        from exporter.models.check import check, recipe_of

        files = resolve_small(model, revision)
        chosen = recipe_of(files, recipe, experimental=experimental_family)
        found = check(files, chosen, allow_inexact=True)
    document = console.check_document(files, chosen, found)
    if as_json:
        print_json(document)
    else:
        click.echo(console.check_text(document))
    if not found.prompts.exact:
        raise InputError(f"MODEL: {files.name} is exported only with --allow-inexact-prompts: its composed prompts differ.")


@main.command()
@options.checkpoint
@options.push
@click.option("--revision", help="Branch to push to.")
@click.option("--dry-run", is_flag=True, help="List the files, copied on the server or sent, and touch nothing.")
@options.quiet
@options.as_json
def push(
    checkpoint: Path,
    repo_id: str | None,
    private: bool,
    create_pr: bool,
    allow_ineffective: bool,
    revision: str | None,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Upload an export to the Hub, then check every file there."""
    with libraries_quiet():
        from exporter.publishing.push import plan_push
        from exporter.publishing.push import push as upload
        from exporter.publishing.push_preflight import preflight

        name = preflight(repo_id or checkpoint.resolve().name, private=private, create_pr=create_pr, revision=revision)
        if dry_run:
            plan = plan_push(checkpoint, name, private=private, create_pr=create_pr, revision=revision)
            return print_json(asdict(plan)) if as_json else click.echo(console.push_plan_text(plan))
        show = (Document if as_json else Terminal)(quiet=quiet)
        with show.progress() as progress:
            done = upload(
                checkpoint,
                name,
                private=private,
                create_pr=create_pr,
                revision=revision,
                allow_ineffective=allow_ineffective,
                progress=progress,
            )
    if as_json:
        print_json(asdict(done))
    return show.pushed(done)


@main.command()
@options.checkpoint
@options.device_map
@options.as_json
def verify(checkpoint: Path, device_map: str | None, as_json: bool) -> None:
    """Check an export: files, index, buffers, and the recorded probe in a fresh process."""
    with libraries_quiet():
        from exporter.checkpoint.verify import verify as run

        found = run(checkpoint, device_map)
    if as_json:
        return print_json({"checkpoint": str(checkpoint), **asdict(found)})
    return click.echo(console.verification_text(checkpoint, found))


@main.command()
@options.checkpoint
@options.precision
@options.quiet
@options.as_json
def onnx(checkpoint: Path, precision: str, quiet: bool, as_json: bool) -> None:
    """Write CHECKPOINT/onnx: calibrated graphs for ONNX Runtime and transformers.js, compared with PyTorch."""
    show = Terminal(quiet=quiet)
    with libraries_quiet():
        from exporter.onnx.export import export_onnx, parse_precisions

        precisions = parse_precisions(precision)
        with show.progress() as progress:
            entry = export_onnx(checkpoint, precisions, progress)
    if as_json:
        return print_json({"checkpoint": str(checkpoint), **entry.as_json()})
    return show.traced(checkpoint, entry)


@main.command()
@options.checkpoint
@click.option("--image", "image_file", required=True, type=options.PATH, help="Picture to show the model.")
@click.option("--prompt", required=True, help="What to ask.")
@options.max_new_tokens
@options.dtype
@options.device_map
@click.option("--precision", type=click.Choice(list(PRECISIONS)), default="fp32", show_default=True, help="Of an ONNX export.")
@options.as_json
def generate(
    checkpoint: Path,
    image_file: Path,
    prompt: str,
    max_new_tokens: int,
    dtype: str,
    device_map: str | None,
    precision: str,
    as_json: bool,
) -> None:
    """One reply, calibrated beside uncalibrated; CHECKPOINT may be an export's onnx folder."""
    from exporter.evaluation.comparison import check_prompt, read_image
    from exporter.onnx.runner import OnnxShiftDC, is_onnx_folder

    check_prompt(prompt)
    image = read_image(image_file)
    if is_onnx_folder(checkpoint):  # without torch
        from exporter.onnx.compare import compare as compare_onnx

        result = compare_onnx(OnnxShiftDC(checkpoint, precision), image, prompt, max_new_tokens)
    else:
        with libraries_quiet():
            from exporter.checkpoint.open import open_export
            from exporter.evaluation.compare import compare

            result = compare(open_export(checkpoint, dtype=dtype, device_map=device_map), image, prompt, max_new_tokens)
    return print_json(asdict(result)) if as_json else Terminal(quiet=True).compared(result)


@main.command()
@options.checkpoint
@options.benchmark
@options.max_new_tokens
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@options.dtype
@options.device_map
@options.quiet
@options.as_json
def evaluate(checkpoint: Path, defences: tuple[str, ...], quiet: bool, as_json: bool, **settings: Any) -> None:
    """Attack success, over-refusal, utility and cost, defence by defence, with intervals.

    An interrupted run goes on where it stopped.
    """
    show = (Document if as_json else Terminal)(quiet=quiet)
    with libraries_quiet():
        from exporter.evaluation.defences import STANDARD
        from exporter.evaluation.evaluate import named_defences
        from exporter.evaluation.results_json import as_document
        from exporter.pipeline.evaluate import EvaluationOptions, gather

        chosen = EvaluationOptions(tuple(named_defences(defences or STANDARD)), **settings)
        with show.progress() as progress:
            found = gather(checkpoint, chosen, progress)
    if as_json:
        print_json(as_document(found.results))
    show.evaluated(found)


@main.command()
@click.argument("name", required=False)
@click.option("--markdown", is_flag=True, help="The same as a table in Markdown.")
@options.as_json
def recipes(name: str | None, markdown: bool, as_json: bool) -> None:
    """The families of the installed transformers, supported or refused, and why; with NAME one recipe in full."""
    from exporter.models.family_table import FamilyTable

    if name is not None:
        return click.echo(_recipe_text(name, as_json))
    with libraries_quiet():
        table = FamilyTable.of_installed()
    if as_json:
        return print_json(table.as_json())
    return click.echo(table.markdown() if markdown else table.text())


def _recipe_text(name: str, as_json: bool) -> str:
    from exporter.models.recipe import load_recipe

    recipe = load_recipe(name)
    return recipe.model_dump_json(indent=2) if as_json else recipe.as_yaml()
