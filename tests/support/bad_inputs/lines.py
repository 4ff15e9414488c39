"""JSONL files: calibration sets and benchmarks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from bad_inputs.workshop import Case, Workshop, sparse

SECRET = "a secret wording"
ROW = {"label": "safe", "request": SECRET, "caption": "a cake"}
QUESTION = {"image": "a.png", "prompt": SECRET, "kind": "benign"}


def whole(
    fit: int = 8, held_out: int = 2, labels: tuple[str, ...] = ("safe", "unsafe"), differ: bool = True
) -> list[dict[str, Any]]:
    return [
        {**ROW, "label": label, "split": split, "caption": f"{split} {i} {label if differ else ''}"}
        for label in labels
        for split, n in (("fit", fit), ("held_out", held_out))
        for i in range(n)
    ]


def lines(*rows: object) -> str:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)


def calibration(*rows: object) -> Callable[[Workshop], list[Any]]:
    return raw(lines(*rows))


def raw(content: str | bytes) -> Callable[[Workshop], list[Any]]:
    return lambda w: w.calibrate(calibration=w.file("set.jsonl", content))


def picture(path: object, prepare: Callable[[Workshop], object] = lambda w: None) -> Callable[[Workshop], list[Any]]:
    """A set whose second row names `path`."""

    def build(w: Workshop) -> list[Any]:
        prepare(w)
        return calibration(ROW, {**ROW, "image": path})(w)

    return build


def all_pictures(content: bytes) -> Callable[[Workshop], list[Any]]:
    """A set that is whole but for the one picture of all rows."""

    def build(w: Workshop) -> list[Any]:
        w.file("a.png", content)
        return calibration(*({**r, "image": "a.png"} for r in whole()))(w)

    return build


def outside(w: Workshop) -> None:
    (w.folder / "link.png").symlink_to("/etc/hostname")


def loop(w: Workshop) -> None:
    (w.folder / "loop.png").symlink_to("loop.png")


def benchmark(*rows: object) -> Callable[[Workshop], list[Any]]:
    return bench_raw(lines(*rows))


def bench_raw(content: str | bytes) -> Callable[[Workshop], list[Any]]:
    return lambda w: evaluate(w, w.file("mine.jsonl", content))


def evaluate(w: Workshop, name: object, *options: object) -> list[Any]:
    return ["evaluate", w.whole_export, "--benchmark", name, "--no-attach", "--quiet", "--output", "evaluation", *options]


NO_PATHS = {"a number": 7, "a fraction": 0.5, "true": True, "a list": ["a.png"], "an object": {"path": "a.png"}}
LINE = ("--calibration: ", "set.jsonl, line 2", "correct the")
FILE = ("--calibration: ", "set.jsonl")
QUESTIONS = ("--benchmark: ", "mine.jsonl")

CASES = [
    Case("no calibration file", lambda w: w.calibrate(calibration="absent.jsonl"), ("no file absent.jsonl", "give builtin")),
    Case("calibration is a folder", lambda w: w.calibrate(calibration=w.folder), ("no regular file", "give a JSONL file")),
    Case("calibration is a pipe", lambda w: w.calibrate(calibration=w.pipe("set.jsonl")), (*FILE, "give a JSONL file")),
    Case("calibration is empty", raw(""), (*FILE, "0 safe rows", "add some")),
    Case("calibration is binary", raw(os.urandom(0) + b"\x80\x81\x82"), (*FILE, "UTF-8", "give a JSONL file")),
    Case("calibration in UTF-16", raw(lines(ROW).encode("utf-16")), (*FILE, "UTF-8", "give a JSONL file")),
    Case(
        "calibration too large",
        lambda w: w.calibrate(calibration=sparse(w.folder / "set.jsonl", 10**10)),
        (*FILE, "bytes", "give a JSONL file"),
    ),
    Case("calibration with half a line", calibration(ROW, '{"label": "sa'), LINE),
    Case("calibration with a list", calibration(ROW, []), LINE),
    Case("calibration of 100,000 brackets", calibration(ROW, "[" * 100_000), LINE),
    Case("calibration with a lone surrogate", calibration(ROW, '{"label": "safe", "request": "\\ud800", "caption": "x"}'), LINE),
    Case("calibration with an unknown label", calibration(ROW, {**ROW, "label": "evil"}), (*LINE, "label")),
    Case("calibration with an empty request", calibration(ROW, {**ROW, "request": ""}), (*LINE, "request")),
    Case("calibration with a number for a request", calibration(ROW, {**ROW, "request": 7}), (*LINE, "request")),
    Case(
        "calibration with nan for a request",
        calibration(ROW, '{"label": "safe", "request": NaN, "caption": "x"}'),
        (*LINE, "request"),
    ),
    Case("calibration with a request without end", calibration(ROW, {**ROW, "request": "x" * 40_000}), (*LINE, "request")),
    Case(
        "calibration without a caption",
        calibration(ROW, {"label": "safe", "request": "x"}),
        ("set.jsonl, line 2", "caption", "add one"),
    ),
    Case("calibration with an unknown key", calibration(ROW, {**ROW, "answer": "x"}), (*LINE, "answer")),
    Case("calibration with an unknown split", calibration(ROW, {**ROW, "split": "train"}), (*LINE, "split")),
    Case(
        "calibration with a key twice",
        calibration(ROW, '{"label": "safe", "request": "a", "request": "b", "caption": "x"}'),
        (*LINE, "a key stands twice"),
    ),
    *(
        Case(f"calibration with {name} for a picture", picture(value), (*LINE, "line 2: image: must be a path, as text; correct"))
        for name, value in NO_PATHS.items()
    ),
    *(
        Case(
            f"benchmark with {name} for a picture",
            benchmark({**QUESTION, "image": value}),
            (*QUESTIONS, "line 1: image: must be a path, as text; correct the line"),
        )
        for name, value in NO_PATHS.items()
    ),
    Case(
        "benchmark with a key twice",
        benchmark('{"image": "a.png", "prompt": "a", "kind": "benign", "kind": "harmful"}'),
        (*QUESTIONS, "line 1", "a key stands twice", "correct the line"),
    ),
    Case("calibration with an absent picture", picture("absent.png"), (*LINE, "absent.png")),
    Case("calibration with a picture above", picture("../a.png"), ("set.jsonl, line 2", "lies outside", "use paths below")),
    Case("calibration with a picture elsewhere", picture("/etc/hostname"), ("line 2", "lies outside", "use paths below")),
    Case("calibration with a link out", picture("link.png", outside), ("line 2", "lies outside", "use paths below")),
    Case("calibration with a loop of links", picture("loop.png", loop), (*LINE,)),
    Case("calibration with a null byte in a path", picture("a\0.png"), (*LINE,)),
    Case("calibration with a path without end", picture("a" * 5000), (*LINE,)),
    Case("calibration with a folder for a picture", picture("out.d", lambda w: (w.folder / "out.d").mkdir()), (*LINE,)),
    Case("calibration of one class", calibration(*whole(labels=("unsafe",))), (*FILE, "0 safe rows", "add some")),
    Case("calibration without held-out rows", calibration(*whole(held_out=0)), (*FILE, "held_out", "add some")),
    Case("calibration with too few rows", calibration(*whole(fit=3)), (*FILE, "3 safe rows", "at least 8")),
    Case(
        "calibration of identical sides", calibration(*whole(differ=False)), (*FILE, "both safe and unsafe", "correct the labels")
    ),
    Case("calibration with text for a picture", all_pictures(b"no picture"), ("a.png", "cannot be decoded", "replace it")),
    Case("no benchmark file", lambda w: evaluate(w, "absent.jsonl"), ("no file absent.jsonl", "correct the path")),
    Case("no such benchmark", lambda w: evaluate(w, "absent"), ("'absent'", "give demo")),
    Case("benchmark is empty", bench_raw(""), (*QUESTIONS, "no questions", "give a file")),
    Case("benchmark is binary", bench_raw(b"\x80"), (*QUESTIONS, "UTF-8", "give a JSONL file")),
    Case("benchmark is a pipe", lambda w: evaluate(w, w.pipe("mine.jsonl")), (*QUESTIONS, "give a JSONL file")),
    Case("benchmark with half a line", benchmark('{"image"'), (*QUESTIONS, "line 1", "correct the line")),
    Case("benchmark of 100,000 braces", benchmark('{"a":' * 100_000), (*QUESTIONS, "line 1", "correct the line")),
    Case(
        "benchmark with an unknown kind", benchmark({**QUESTION, "kind": "odd"}), (*QUESTIONS, "line 1: kind", "correct the line")
    ),
    Case("benchmark without a prompt", benchmark({**QUESTION, "prompt": ""}), (*QUESTIONS, "line 1: prompt", "correct the line")),
    Case(
        "benchmark that contradicts itself",
        benchmark({**QUESTION, "cell": "harmful_image"}),
        (*QUESTIONS, "line 1", "does not go with", "correct the line"),
    ),
    Case(
        "benchmark with a picture above",
        benchmark({**QUESTION, "image": "../a"}),
        (*QUESTIONS, "lies outside", "use paths below"),
    ),
    Case("benchmark with an absent picture", benchmark(QUESTION), (*QUESTIONS, "no image", "correct the path")),
]
