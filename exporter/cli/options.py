"""Arguments and options of the commands, and how their values are read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from exporter.errors import InputError
from exporter.onnx.interface import SUFFIXES as PRECISIONS

Command = TypeVar("Command", bound=Callable[..., object])


def _device_map(context: click.Context, parameter: click.Parameter, given: str | None) -> str | None:
    if given is not None:
        from exporter.models.devices import check_device_map

        check_device_map(given)
    return given


def _batch_size(context: click.Context, parameter: click.Parameter, given: str) -> int | None:
    if given == "auto":
        return None
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", given):
        raise InputError(f"--batch-size: expected auto or a whole number from 1, found {given!r}.")
    return int(given)


def together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator; --help lists them in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


DTYPES = click.Choice(["auto", "float32", "bfloat16", "float16"])
PATH = click.Path(path_type=Path)

checkpoint = click.argument("checkpoint", type=PATH)
device_map = click.option(
    "--device-map", metavar="auto|DEVICE", callback=_device_map, help="accelerate's device_map, or one device."
)
dtype = click.option("--dtype", type=DTYPES, default="auto", show_default=True)
max_new_tokens = click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
quiet = click.option("--quiet", is_flag=True, help="No progress on stderr.")
as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
recipe = click.option("--recipe", metavar="NAME|FILE", help="Recipe [default: the model family's].")
experimental_family = click.option(
    "--experimental-family", is_flag=True, help="Try a model type that is new in transformers: what it needs is measured."
)
revision = click.option("--revision", help="Branch, tag or commit of a Hub model.")
precision = click.option("--precision", default=",".join(PRECISIONS), show_default=True, help="With commas between them.")

push = together(
    click.option("--allow-ineffective", is_flag=True, help="Push although no effect, or a harm, was measured."),
    click.option("--create-pr", is_flag=True, help="Push as a pull request."),
    click.option("--private", is_flag=True, help="Create the repository as private."),
    click.option(
        "--repo-id", metavar="[OWNER/]NAME", help="Repository on the Hub [default: the export's name, under your account]."
    ),
)

method = together(
    recipe,
    experimental_family,
    click.option(
        "--calibration",
        metavar="builtin|harmless|FILE.jsonl|UNSAFE+SAFE",
        help="Calibration set; harmless: without harmful data; UNSAFE+SAFE: e.g. mm-safetybench+llava-instruct.",
    ),
    revision,
    click.option(
        "--reference", type=click.Choice(["caption", "text", "blank", "static"]), help="Where the target coordinate comes from."
    ),
    click.option(
        "--rule", type=click.Choice(["sequential", "precomputed"]), help="Corrections from running or from clean activations."
    ),
    click.option(
        "--gate",
        type=click.Choice(["one-sided", "two-sided"]),
        help="two-sided is the paper; one-sided never moves an input toward safe.",
    ),
    click.option(
        "--caption-style",
        type=click.Choice(["request", "describe", "naming"]),
        help="What the model is asked for: a caption in view of the request, one for every question, or a name.",
    ),
    click.option("--layers", metavar="auto|A-B", help="Decoder layers, from 0, both ends included."),
    click.option(
        "--strength", metavar="X|auto", help="Share of the shift that is taken out (1.0: all); auto: by a sweep, with the layers."
    ),
)

measuring = together(
    click.option(
        "--dtype",
        type=DTYPES,
        default="auto",
        show_default=True,
        help="For measuring; the exported weights stay as they are.",
    ),
    device_map,
    click.option("--load-in-4bit", is_flag=True, help="Measure directions on the model quantised by bitsandbytes."),
    click.option("--load-in-8bit", is_flag=True, help="The same with 8 bits."),
    click.option(
        "--adapter", metavar="FOLDER|ID[@REVISION]", help="PEFT LoRA adapter to calibrate with, merged into the export."
    ),
    click.option("--keep-adapter", is_flag=True, help="Leave it unmerged in the export, which then needs PEFT to load."),
    click.option("--allow-inexact-prompts", is_flag=True, help="Export although composed prompts differ from the template's."),
    click.option(
        "--batch-size",
        metavar="auto|N",
        default="auto",
        show_default=True,
        callback=_batch_size,
        help="Prompts in one batch.",
    ),
)

benchmark = together(
    click.option(
        "--benchmark", default="demo", show_default=True, metavar="NAME|FILE.jsonl", help="demo, a Hub benchmark, or a file."
    ),
    click.option(
        "--split",
        type=click.Choice(["development", "test"]),
        default="test",
        show_default=True,
        help="Half of the demo's objects.",
    ),
    click.option("--limit", type=click.IntRange(1), help="Questions per cell [default: all]."),
    click.option("--defence", "defences", multiple=True, metavar="NAME", help="Repeatable; all for every one [default: four]."),
    click.option(
        "--category", "categories", multiple=True, metavar="NAME", help="Repeatable: only questions of these categories."
    ),
    click.option("--judge", default="prefix", show_default=True, metavar="prefix|keywords|GUARD_MODEL", help="Judge of attacks."),
    click.option("--output", type=PATH, help="Folder for replies, results and pictures [default: ./<name>-evaluation]."),
    click.option(
        "--attach/--no-attach", default=True, show_default=True, help="Put figures and pictures into the checkpoint's card."
    ),
)
