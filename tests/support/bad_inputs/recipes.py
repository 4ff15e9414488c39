"""Recipes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

from bad_inputs.workshop import Case, Workshop, edit_json, sparse
from exporter.runtime.resources import resource

LLAVA = (resource("recipes") / "llava.yaml").read_text("utf-8")


def text(content: str | bytes) -> Callable[[Workshop], list[Any]]:
    return lambda w: w.calibrate(None, "--recipe", w.file("mine.yaml", content))


def values(**changes: Any) -> Callable[[Workshop], list[Any]]:
    return text(yaml.safe_dump({**yaml.safe_load(LLAVA), **changes}, allow_unicode=True))


def without_layers(build: Callable[[Workshop], list[Any]]) -> Callable[[Workshop], list[Any]]:
    """The command without --layers, which would win over the recipe's."""

    def call(w: Workshop) -> list[Any]:
        arguments = build(w)
        at = arguments.index("--layers")
        return arguments[:at] + arguments[at + 2 :]

    return call


def folder_of_that_name(w: Workshop) -> list[Any]:
    (w.folder / "mine.yaml").mkdir()
    return w.calibrate(None, "--recipe", "mine.yaml")


def of_no_family(w: Workshop) -> list[Any]:
    """`prompts` is a module of the modeling code, and no family."""
    edit_json(w.base() / "config.json", model_type="prompts")
    recipe = w.file("mine.yaml", yaml.safe_dump({**yaml.safe_load(LLAVA), "family": "prompts"}))
    return w.calibrate("base", "--recipe", recipe)


LAUGHS = "a: &a [x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20))
CAPTION, COUNTERPART = "Describe: {request}", "{request} {caption}"
WRONG = ("Recipe: ", "mine.yaml", "correct it")
UNREADABLE = ("mine.yaml", "cannot be read as YAML", "correct the file")

CASES = [
    Case("no such recipe file", lambda w: w.calibrate(None, "--recipe", "absent.yaml"), ("no file absent.yaml", "give a name")),
    Case("no such recipe", lambda w: w.calibrate(None, "--recipe", "nope"), ("'nope'", "expected one of")),
    Case("recipe is a folder", folder_of_that_name, (*UNREADABLE, "no regular file")),
    Case("recipe is a pipe", lambda w: w.calibrate(None, "--recipe", w.pipe("mine.yaml")), (*UNREADABLE, "no regular file")),
    Case("recipe is empty", text(""), WRONG),
    Case("recipe is a number", text("7"), WRONG),
    Case("recipe is a list", text("- llava\n"), WRONG),
    Case("recipe is no YAML", text("family: [llava"), UNREADABLE),
    Case("recipe with a tab", text("family:\n\t- llava"), UNREADABLE),
    Case("recipe is not UTF-8", text(b"family: \xff\xfe"), (*UNREADABLE, "byte 8")),
    Case("recipe with null bytes", text(b"family: \0"), UNREADABLE),
    Case("recipe with aliases that grow", text(LAUGHS), (*UNREADABLE, "aliases")),
    Case("recipe that holds itself", text("a: &a [*a]"), (*UNREADABLE, "aliases")),
    Case("recipe of 20,000 brackets", text("a: " + "[" * 20_000), (*UNREADABLE, "too deeply")),
    Case("recipe with a key twice", text(LLAVA + "family: llava\n"), (*UNREADABLE, "twice")),
    Case("recipe that builds objects", text("family: !!python/object/apply:os.system ['true']"), UNREADABLE),
    Case("recipe with a date that is none", text(LLAVA + "benchmark: 2026-13-45\n"), UNREADABLE),
    Case("recipe with an empty integer", text("family: !!int ''"), UNREADABLE),
    *(
        Case(
            f"recipe with {name} number without end",
            text(f"{LLAVA}strength: {number}\n"),
            (*UNREADABLE, "more than 100 characters"),
        )
        for name, number in {
            "a hexadecimal": "0x" + "f" * 200_000,
            "an octal": "0" + "7" * 200_000,
            "a binary": "0b" + "1" * 200_000,
            "a decimal": "9" * 200_000,
            "a sexagesimal": "1" + ":59" * 60_000,
            "a negative": "-0x" + "f" * 200_000,
            "a fractional": "0." + "1" * 200_000,
        }.items()
    ),
    Case(
        "recipe with a tag on a number without end", text("family: !!int '0x" + "f" * 9_000 + "'"), (*UNREADABLE, "more than 100")
    ),
    Case("recipe with a number without end for a key", text("? 0x" + "f" * 9_000 + "\n: 1"), UNREADABLE),
    Case(
        "recipe too large", lambda w: w.calibrate(None, "--recipe", sparse(w.folder / "mine.yaml", 10**9)), (*UNREADABLE, "bytes")
    ),
    Case("recipe with an unknown key", values(colour="red"), (*WRONG, "colour")),
    Case("recipe with a number for the family", values(family=7), (*WRONG, "family")),
    Case("recipe with a path for the family", values(family="../llava"), (*WRONG, "family")),
    Case("recipe of another family", lambda w: w.calibrate(None, "--recipe", "gemma3"), ("family 'gemma3'", "choose another")),
    Case("recipe of no family", of_no_family, ("has no class for family 'prompts'", "see 'shiftdc-export recipes'")),
    Case("recipe with strength nan", values(strength=float("nan")), (*WRONG, "strength")),
    Case("recipe with strength inf", values(strength=float("inf")), (*WRONG, "strength")),
    Case("recipe with a negative strength", values(strength=-0.5), (*WRONG, "strength")),
    Case("recipe with a huge strength", values(strength=1e300), (*WRONG, "strength")),
    Case("recipe with layers the wrong way round", without_layers(values(layers="9-3")), (*WRONG, "layers", "A at most B")),
    Case("recipe with negative layers", without_layers(values(layers="-1")), (*WRONG, "layers", "A-B")),
    Case("recipe with layers in superscript", without_layers(values(layers="\u00b2-\u00b3")), (*WRONG, "layers", "A-B")),
    Case("recipe with an unknown gate", values(gate="both"), (*WRONG, "gate")),
    Case("recipe without caption tokens", values(caption_max_new_tokens=0), (*WRONG, "caption_max_new_tokens")),
    Case("recipe with a million caption tokens", values(caption_max_new_tokens=10**6), (*WRONG, "caption_max_new_tokens")),
    Case(
        "recipe with a prompt without a slot",
        values(prompts={"caption": CAPTION, "text_counterpart": "What?"}),
        (*WRONG, "prompts.text_counterpart", "{request}"),
    ),
    Case(
        "recipe with a slot twice",
        values(prompts={"caption": CAPTION, "text_counterpart": COUNTERPART * 2}),
        (*WRONG, "prompts.text_counterpart", "each once"),
    ),
]
