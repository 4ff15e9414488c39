"""The command line: parse, call one function, print. Heavy imports wait until a command runs."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console

from exporter import __version__
from exporter.cli import console
from exporter.cli.libraries import libraries_quiet
from exporter.cli.progress_bars import progress_bars
from exporter.errors import InputError, ShiftDCError, printable
from exporter.onnx.interface import SUFFIXES as PRECISIONS
from exporter.runtime.ranks import first, joined, launched


class DefaultToExport(click.Group):
    """`shiftdc-export MODEL ...` is `shiftdc-export export MODEL ...`; errors become one sentence and an exit code."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            self._check_is_no_command(args[0])
            args = ["export", *args]
        return super().resolve_command(ctx, args)

    def _check_is_no_command(self, word: str) -> None:
        """Raise InputError for what is nearly the name of a command, and no folder."""
        near = difflib.get_close_matches(word.lower(), [name for name, command in self.commands.items() if not command.hidden], 1)
        if near and "/" not in word and not Path(word).exists():
            raise InputError(
                f"there is no command {word!r}; {near[0]!r} is nearest (a model of the Hub that has this name is calibrated by "
                f"'shiftdc-export export {word}')."
            )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # options of the default command may come before MODEL
        own = {"--help", "--version"}
        if args and args[0].startswith("-") and args[0] not in own:
            args = ["export", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            _fail(ctx, f"{error.format_message().rstrip('.')}; see --help.", 2)
        except InputError as error:
            _fail(ctx, str(error), 2)
        except ShiftDCError as error:
            _fail(ctx, str(error), 1)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                _fail(ctx, f"a name is too long for the file system ({str(error.filename)[:100]}...); give a shorter one.", 2)
            if error.errno in (None, errno.EPIPE):  # not the disk's, or a reader of stdout who has gone
                raise
            where = f" at {error.filename}" if error.filename else ""
            _fail(ctx, f"the system refused to read or to write ({error.strerror}{where}); see to it and run again.", 1)


def _fail(ctx: click.Context, sentence: str, code: int) -> NoReturn:
    if first():  # the same error ends all processes of a run
        click.echo(f"Error: {printable(sentence)}", err=True)
    ctx.exit(code)


@click.group(cls=DefaultToExport, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="shiftdc-export")
@click.pass_context
def main(context: click.Context) -> None:
    """Export vision-language models whose safety an image does not bend (ShiftDC, arXiv:2502.13095).

    \b
    shiftdc-export MODEL [OPTIONS]   calibrate a checkpoint; MODEL: Hub id, folder, or demo
    shiftdc-export COMMAND ...       one of the commands below
    """
    if launched() > 1 and context.invoked_subcommand != "export":
        raise InputError("torchrun splits the prompts of an export; run the other commands without it.")


def _device_map(context: click.Context, parameter: click.Parameter, given: str | None) -> str | None:
    if given is not None:
        from exporter.models.devices import check_device_map

        check_device_map(given)
    return given


_DTYPES = click.Choice(["auto", "float32", "bfloat16", "float16"])
_checkpoint_argument = click.argument("checkpoint", type=click.Path(path_type=Path))
_device_map_option = click.option(
    "--device-map", metavar="auto|DEVICE", callback=_device_map, help="accelerate's device_map, or one device."
)
_dtype_option = click.option("--dtype", type=_DTYPES, default="auto", show_default=True)
_max_new_tokens_option = click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
_quiet_option = click.option("--quiet", is_flag=True, help="No progress on stderr.")
_json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")


def _push_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--repo-id", metavar="[OWNER/]NAME", help="Repository on the Hub [default: the export's name, under your account]."
        ),
        click.option("--private", is_flag=True, help="Create the repository as private."),
        click.option("--create-pr", is_flag=True, help="Push as a pull request."),
        click.option("--allow-ineffective", is_flag=True, help="Push although no effect, or a harm, was measured."),
    ):
        command = option(command)
    return command


@main.command("export", hidden=True)
@click.argument("model")
@click.option("--output", type=click.Path(path_type=Path), help="Folder to write [default: ./<name>-shiftdc].")
@click.option("--recipe", metavar="NAME|FILE", help="Recipe [default: the model family's].")
@click.option(
    "--calibration",
    metavar="builtin|harmless|FILE.jsonl|UNSAFE+SAFE",
    help="Calibration set; harmless: without harmful data; UNSAFE+SAFE: e.g. mm-safetybench+llava-instruct.",
)
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option(
    "--reference", type=click.Choice(["caption", "text", "blank", "static"]), help="Where the target coordinate comes from."
)
@click.option(
    "--rule", type=click.Choice(["sequential", "precomputed"]), help="Corrections from running or from clean activations."
)
@click.option(
    "--gate",
    type=click.Choice(["one-sided", "two-sided"]),
    help="two-sided is the paper; one-sided never moves an input toward safe.",
)
@click.option(
    "--caption-style",
    type=click.Choice(["request", "describe", "naming"]),
    help="What the model is asked for: a caption in view of the request, one for every question, or a name.",
)
@click.option("--layers", metavar="auto|A-B", help="Decoder layers, from 0, both ends included.")
@click.option(
    "--strength", metavar="X|auto", help="Share of the shift that is taken out (1.0: all); auto: by a sweep, with the layers."
)
@click.option(
    "--dtype",
    type=_DTYPES,
    default="auto",
    show_default=True,
    help="For measuring; the exported weights stay as they are.",
)
@_device_map_option
@click.option("--load-in-4bit", is_flag=True, help="Measure directions on the model quantised by bitsandbytes.")
@click.option("--load-in-8bit", is_flag=True, help="The same with 8 bits.")
@click.option("--adapter", metavar="FOLDER|ID[@REVISION]", help="PEFT LoRA adapter to calibrate with, merged into the export.")
@click.option("--keep-adapter", is_flag=True, help="Leave it unmerged in the export, which then needs PEFT to load.")
@click.option("--allow-inexact-prompts", is_flag=True, help="Export although composed prompts differ from the template's.")
@click.option("--batch-size", metavar="auto|N", default="auto", show_default=True, help="Prompts in one batch.")
@click.option(
    "--evaluate", "evaluated", is_flag=True, help="Measure the effect on the recipe's benchmark and put it into the card."
)
@click.option("--onnx", "with_onnx", is_flag=True, help="Also write ONNX graphs, at every precision.")
@click.option("--push", "pushed", is_flag=True, help="Upload the export to the Hub and check what is there.")
@_push_options
@click.option("--dry-run", is_flag=True, help="Print the plan and touch nothing.")
@click.option("--force", is_flag=True, help="Replace an earlier export in --output, and nothing of yours.")
@_quiet_option
@_json_option
def export_command(
    model: str,
    evaluated: bool,
    with_onnx: bool,
    pushed: bool,
    repo_id: str | None,
    private: bool,
    create_pr: bool,
    allow_ineffective: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
    batch_size: str,
    **options: Any,
) -> None:
    """Calibrate MODEL and write a self-contained checkpoint."""
    with libraries_quiet(), joined() as ranks:
        from exporter.pipeline.export import export
        from exporter.pipeline.plan import make_plan, plan_needs

        options |= {"batch_size": _batch_size(batch_size), "announce": partial(_announce, quiet=quiet or not ranks.leads)}
        plan = ranks.gather(lambda: make_plan(model, **options))[ranks.rank]
        if with_onnx:
            from exporter.onnx.export import check_family

            check_family(plan.recipe.family, plan.base.config)
        if pushed:  # whatever can stop a push stops it before hours of work
            repo_id = ranks.share(
                lambda: _preflight(plan, repo_id, private=private, create_pr=create_pr, measured=evaluated or allow_ineffective)
            )
        if dry_run:
            if ranks.leads:
                of_plan = plan, plan_needs(plan), repo_id if pushed else None
                click.echo(json.dumps(console.plan_document(*of_plan), indent=2) if as_json else console.plan_text(*of_plan))
            return
        with progress_bars(quiet or not ranks.leads) as progress:
            done = export(plan, progress, ranks)
    if done is None:  # the first process does the rest
        return
    with libraries_quiet():
        if not as_json:
            _print_export(done)
        if evaluated:
            done.report["evaluation"] = _evaluate(plan, quiet=quiet, silent=as_json)
        if with_onnx:
            done.report["onnx"] = _export_onnx(plan.output, ",".join(PRECISIONS), quiet=quiet, silent=as_json)
        if pushed:
            options = {"private": private, "create_pr": create_pr, "allow_ineffective": allow_ineffective}
            _push(plan.output, str(repo_id), quiet=quiet, as_json=False, silent=as_json, **options)
    if as_json:
        click.echo(json.dumps({"output": str(plan.output), **done.report}, indent=2))


def _announce(line: str, *, quiet: bool) -> None:
    if not quiet:
        click.echo(printable(line), err=True)


def _preflight(plan: Any, repo_id: str | None, *, private: bool, create_pr: bool, measured: bool) -> str:
    from exporter.publishing.push_preflight import check_base, preflight

    if not measured:
        raise InputError("--push: the effect must be measured first; add --evaluate, or --allow-ineffective.")
    found = preflight(repo_id or plan.output.name, private=private, revision=None, create_pr=create_pr)
    check_base(plan.base.folder, plan.base.name, plan.base.revision)
    return found


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", text):
        raise InputError(f"--batch-size: expected auto or a whole number from 1, found {text!r}.")
    return int(text)


@main.command("check")
@click.argument("model")
@click.option("--recipe", metavar="NAME|FILE", help="Recipe [default: the model family's].")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@_json_option
def check_command(model: str, recipe: str | None, revision: str | None, as_json: bool) -> None:
    """Tell whether MODEL can be calibrated, from its small files alone."""
    with libraries_quiet():
        from exporter.models.base import resolve_small
        from exporter.models.check import check, recipe_of

        files = resolve_small(model, revision)
        chosen = recipe_of(files, recipe)
        found = check(files, chosen, allow_inexact=True)
    document = console.check_document(files, chosen, found)
    click.echo(json.dumps(document, indent=2) if as_json else console.check_text(document))
    if not found.prompts.exact:
        raise InputError(f"MODEL: {files.name} is exported only with --allow-inexact-prompts: its composed prompts differ.")


@main.command()
@_checkpoint_argument
@_push_options
@click.option("--revision", help="Branch to push to.")
@click.option("--dry-run", is_flag=True, help="List the files, copied on the server or sent, and touch nothing.")
@_quiet_option
@_json_option
def push(checkpoint: Path, repo_id: str | None, dry_run: bool, quiet: bool, as_json: bool, **options: Any) -> None:
    """Upload an export to the Hub, then check every file there."""
    with libraries_quiet():
        from exporter.publishing.push import plan_push
        from exporter.publishing.push_preflight import preflight

        where = {k: options[k] for k in ("private", "create_pr", "revision")}
        name = preflight(repo_id or checkpoint.resolve().name, **where)
        if not dry_run:
            _push(checkpoint, name, quiet=quiet, as_json=as_json, **options)
            return
        plan = plan_push(checkpoint, name, **where)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(plan), indent=2))
        return
    click.echo(console.push_plan_text(plan))


def _push(checkpoint: Path, repo_id: str, *, quiet: bool, as_json: bool, silent: bool = False, **options: Any) -> None:
    from exporter.publishing.push import push as run

    with progress_bars(quiet) as progress:
        done = run(checkpoint, repo_id, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(done), indent=2))
    elif not silent:
        click.echo(console.pushed_text(done))
    if done.note:
        click.echo(done.note, err=True)


@main.command()
@_checkpoint_argument
@_device_map_option
@_json_option
def verify(checkpoint: Path, device_map: str | None, as_json: bool) -> None:
    """Check an export: files, index, buffers, and the recorded probe in a fresh process."""
    with libraries_quiet():
        from exporter.checkpoint.verify import verify as run

        found = run(checkpoint, device_map)
    if as_json:
        click.echo(json.dumps({"checkpoint": str(checkpoint), **dataclasses.asdict(found)}, indent=2))
        return
    click.echo(console.verification_text(checkpoint, found))


@main.command()
@_checkpoint_argument
@click.option("--precision", default=",".join(PRECISIONS), show_default=True, help="With commas between them.")
@_quiet_option
@_json_option
def onnx(checkpoint: Path, precision: str, quiet: bool, as_json: bool) -> None:
    """Write CHECKPOINT/onnx: calibrated graphs for ONNX Runtime and transformers.js, compared with PyTorch."""
    with libraries_quiet():
        entry = _export_onnx(checkpoint, precision, quiet=quiet, silent=as_json)
    if as_json:
        click.echo(json.dumps({"checkpoint": str(checkpoint), **entry}, indent=2))


def _export_onnx(checkpoint: Path, precision: str, *, quiet: bool, silent: bool) -> dict[str, Any]:
    from exporter.onnx.export import export_onnx, parse_precisions

    precisions = parse_precisions(precision)
    with progress_bars(quiet) as progress:
        entry = export_onnx(checkpoint, precisions, progress)
    if not silent:
        Console().print(console.onnx_table(checkpoint / "onnx", entry))
    return entry


@main.command()
@_checkpoint_argument
@click.option("--image", "image_file", required=True, type=click.Path(path_type=Path), help="Picture to show the model.")
@click.option("--prompt", required=True, help="What to ask.")
@_max_new_tokens_option
@_dtype_option
@_device_map_option
@click.option("--precision", type=click.Choice(list(PRECISIONS)), default="fp32", show_default=True, help="Of an ONNX export.")
@_json_option
def generate(checkpoint: Path, image_file: Path, prompt: str, as_json: bool, **options: Any) -> None:
    """One reply, calibrated beside uncalibrated; CHECKPOINT may be an export's onnx folder."""
    from exporter.evaluation.comparison import check_prompt, read_image

    check_prompt(prompt)
    result = _compared(checkpoint, read_image(image_file), prompt, **options)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result), indent=2))
        return
    _print_comparison(result)


def _compared(
    checkpoint: Path, image: Any, prompt: str, *, max_new_tokens: int, dtype: str, device_map: str | None, precision: str
) -> Any:
    from exporter.onnx.runner import OnnxShiftDC, is_onnx_folder

    if is_onnx_folder(checkpoint):
        from exporter.onnx.compare import compare as compare_onnx

        return compare_onnx(OnnxShiftDC(checkpoint, precision), image, prompt, max_new_tokens)
    with libraries_quiet():
        from exporter.checkpoint.open import open_export
        from exporter.evaluation.compare import compare

        return compare(open_export(checkpoint, dtype=dtype, device_map=device_map), image, prompt, max_new_tokens)


def _print_comparison(result: Any) -> None:
    out = Console()
    out.print(f"[bold]uncalibrated[/] ({result.uncalibrated_seconds:.2f} s): ", end="")
    out.print(result.uncalibrated, markup=False)
    out.print(f"[bold]calibrated[/]   ({result.calibrated_seconds:.2f} s): ", end="")
    out.print(result.calibrated, markup=False)
    if result.caption is not None:
        out.print("[bold]its caption[/]: ", end="")
        out.print(result.caption, markup=False)
    out.print(console.shift_table(result))


@main.command()
@_checkpoint_argument
@click.option(
    "--benchmark", default="demo", show_default=True, metavar="NAME|FILE.jsonl", help="demo, a Hub benchmark, or a file."
)
@click.option(
    "--split", type=click.Choice(["development", "test"]), default="test", show_default=True, help="Set of the demo's things."
)
@click.option("--limit", type=click.IntRange(1), help="Questions per cell [default: all].")
@click.option("--defence", "defences", multiple=True, metavar="NAME", help="Repeatable; all for every one [default: four].")
@click.option("--category", "categories", multiple=True, metavar="NAME", help="Repeatable: only questions of these categories.")
@click.option("--judge", default="prefix", show_default=True, metavar="prefix|keywords|GUARD_MODEL", help="Judge of attacks.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder for replies, results and pictures [default: ./<name>-evaluation]."
)
@click.option(
    "--attach/--no-attach", default=True, show_default=True, help="Put figures and pictures into the checkpoint's card."
)
@_max_new_tokens_option
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@_dtype_option
@_device_map_option
@_quiet_option
@_json_option
def evaluate(checkpoint: Path, defences: tuple[str, ...], quiet: bool, as_json: bool, **options: Any) -> None:
    """Attack success, over-refusal, utility and cost, defence by defence, with intervals.

    An interrupted run goes on where it stopped.
    """
    with libraries_quiet():
        from exporter.evaluation.defences import STANDARD
        from exporter.evaluation.evaluate import named_defences
        from exporter.pipeline.evaluate import EvaluationOptions, gather

        chosen = EvaluationOptions(tuple(named_defences(defences or STANDARD)), **options)
        with progress_bars(quiet) as progress:
            found = gather(checkpoint, chosen, progress)
    _print_evidence(found, as_json=as_json)


def _evaluate(plan: Any, *, quiet: bool, silent: bool) -> dict[str, Any]:
    from exporter.evaluation.results_json import as_document
    from exporter.pipeline.evaluate import EvaluationOptions, gather

    chosen = EvaluationOptions(benchmark=plan.recipe.benchmark, dtype=plan.dtype, device_map=plan.device_map)
    with progress_bars(quiet) as progress:
        found = gather(plan.output, chosen, progress)
    _print_evidence(found, as_json=False, quiet=silent)
    return as_document(found.results)


def _print_evidence(found: Any, *, as_json: bool, quiet: bool = False) -> None:
    """Tables or one document on stdout; what to beware of on stderr."""
    if found.set_aside:
        click.echo(f"The replies there were of other settings; they are kept in {found.set_aside.name}.", err=True)
    if as_json:
        from exporter.evaluation.results_json import as_document

        click.echo(json.dumps(as_document(found.results), indent=2))
    elif not quiet:
        out = Console() if sys.stdout.isatty() else Console(width=130)
        out.print(console.defence_table(found.results))
        out.print(console.cell_table(found.results))
        click.echo(console.results_legend(found.results))
        click.echo(found.effect.sentence)
        click.echo(f"Replies, results and pictures: {found.folder}")
    for harm in found.effect.harms:
        click.echo(f"Warning: {harm}", err=True)
    if not found.effect.effective:
        click.echo("Warning: it is not shown that calibration lowers attack success here.", err=True)


@main.command()
@click.argument("name", required=False)
@click.option("--markdown", is_flag=True, help="The table of the README.")
@_json_option
def recipes(name: str | None, markdown: bool, as_json: bool) -> None:
    """The families supported, with what works in each; with NAME one recipe in full."""
    from exporter.models import family_table
    from exporter.models.recipe import load_recipe
    from exporter.runtime.resources import resource

    if name is not None:
        recipe = load_recipe(name)
        text = (resource("recipes") / f"{name}.yaml").read_text("utf-8") if not as_json else recipe.model_dump_json(indent=2)
        click.echo(text.rstrip())
        return
    if markdown:
        click.echo(family_table.markdown())
    elif as_json:
        click.echo(json.dumps(family_table.supported(), indent=2))
    else:
        for row in family_table.supported():
            click.echo(f"{row['name']:16} {', '.join(row['models'])}")


def _print_export(done: Any) -> None:
    click.echo(f"{printable(done.plan.base.name)} is calibrated: {printable(str(done.plan.output))}")
    for warning in done.report["calibration"].get("warnings", ()):
        click.echo(f"Warning: {printable(warning)}", err=True)
    click.echo(console.export_text(done))


if __name__ == "__main__":
    sys.exit(main())
