"""Options, names and outputs; exports that are given to other commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bad_inputs.workshop import Case, Workshop, edit_json, replace, sparse

REPORT = "shiftdc_report.json"


def option(**changed: object) -> Callable[[Workshop], list[Any]]:
    return lambda w: w.calibrate(**changed)


def output(prepare: Callable[[Workshop], object], name: str = "there") -> Callable[[Workshop], list[Any]]:
    return lambda w: (prepare(w), w.calibrate(output=name))[1]


def export(command: str, edit: Callable[[Any], object], *options: str) -> Callable[[Workshop], list[Any]]:
    def build(w: Workshop) -> list[Any]:
        folder = w.export()
        edit(folder)
        return [command, "export", *options]

    return build


def report(command: str = "verify", *options: str, **changes: Any) -> Callable[[Workshop], list[Any]]:
    return export(command, lambda f: edit_json(f / REPORT, **changes), *options)


def generate(edit: Callable[[Any], object]) -> Callable[[Workshop], list[Any]]:
    def build(w: Workshop) -> list[Any]:
        from bad_inputs.pictures import saved

        w.file("a.png", saved("PNG"))
        return export("generate", edit, "--image", "a.png", "--prompt", "What is it?")(w)

    return build


def prompted(text: str) -> Callable[[Workshop], list[Any]]:
    return lambda w: ["generate", w.whole_export, "--image", "a.png", "--prompt", text]


def judged(edit: Callable[[Any], object]) -> Callable[[Workshop], list[Any]]:
    """With a damaged folder for a guard model."""

    def build(w: Workshop) -> list[Any]:
        edit(w.base("guard"))
        return ["evaluate", w.whole_export, "--judge", "guard", "--quiet"]

    return build


BASE = {"id": "x", "revision": None, "architecture": "LlavaForConditionalGeneration"}
OUTPUT = ("--output: ", "give")
CHECKPOINT = ("CHECKPOINT: ", REPORT, "give a folder that shiftdc-export wrote")
FIELD = ("CHECKPOINT: ", REPORT, "export again")

CASES = [
    Case("no model's name", option(base=""), ("MODEL: ", "give a Hub id")),
    Case("a model's name without end", option(base="m" * 5000), ("MODEL: ", "Hub id")),
    Case("a model's name with a line break", option(base="a\nb"), ("MODEL: ", "Hub id")),
    Case("a model that is not in the cache", option(base="someone/nothing"), ("someone/nothing", "check the connection")),
    Case("layers beyond the last", option(layers="3-9"), ("--layers: 3-9 ends at 9", "0 to 3")),
    Case("layers without end", option(layers="0-" + "9" * 5000), ("layers in the command line", "A-B", "correct it")),
    Case("layers in words", option(layers="all"), ("layers in the command line", "A-B", "correct it")),
    Case("strength nan", option(strength="nan"), ("strength in the command line", "correct it")),
    Case("strength -1", option(strength="-1"), ("strength in the command line", "correct it")),
    Case("strength 1e9", option(strength="1e9"), ("strength in the command line", "correct it")),
    Case("batch size 0", option(batch_size="0"), ("--batch-size", "expected auto or")),
    Case("batch size in superscript", option(batch_size="\u00b2"), ("--batch-size", "expected auto or")),
    Case("batch size without end", option(batch_size="9" * 5000), ("--batch-size", "expected auto or")),
    Case("an unknown dtype", option(dtype="int8"), ("--dtype", "see --help")),
    Case("an unknown option", lambda w: w.calibrate(colour="red"), ("--colour", "see --help")),
    Case("a device that is none", option(device_map="moon"), ("--device-map: 'moon' is no device; give auto, cpu",)),
    Case("a device nearly", option(device_map="gpu7"), ("--device-map: 'gpu7' is no device; give auto, cpu",)),
    Case("no device", option(device_map=""), ("--device-map: '' is no device; give auto, cpu",)),
    Case("a device that is not there", option(device_map="cuda:99"), ("--device-map: there is no cuda:99 on this machine", "cpu")),
    Case("a device without numbers", option(device_map="meta"), ("--device-map: there is no meta on this machine", "cpu")),
    Case("a device before a model", option(base="someone/nothing", device_map="gpu7"), ("--device-map: 'gpu7' is no device",)),
    *(
        Case(f"{command} on a device that is none", lambda w, command=command, more=more: [
            command, w.whole_export, "--device-map", "gpu7", *more], ("--device-map: 'gpu7' is no device; give auto, cpu",))
        for command, more in {"verify": (), "evaluate": ("--limit", "1"), "generate": ("--image", "a.png", "--prompt", "x")}.items()
    ),
    Case("generate with an empty prompt", prompted(""), ("--prompt: it is empty; give a question",)),
    Case("generate with a blank prompt", prompted(" \n\t"), ("--prompt: it is empty; give a question",)),
    Case("generate with a prompt without end", prompted("a" * 40_000), ("--prompt: it has 40000 characters", "shorten it")),
    Case("generate with a prompt of odd bytes", prompted("a\udc80"), ("--prompt: it is not UTF-8; give it in that encoding",)),
    *(
        Case(f"the command {word}", lambda w, word=word: [word, w.whole_export], (f"no command {word!r}", f"{near!r} is nearest"))
        for word, near in {
            "evalute": "evaluate", "Evaluate": "evaluate", "verfy": "verify", "genrate": "generate", "onx": "onnx", "psh": "push",
            "recipe": "recipes",
        }.items()
    ),
    Case("the command alone", lambda w: ["evalute"], ("no command 'evalute'", "'evaluate' is nearest")),
    Case(
        "a judge that is none, before a benchmark that is none",
        lambda w: ["evaluate", w.whole_export, "--judge", "nobody/guard", "--benchmark", "absent", "--quiet"],
        ("--judge: 'nobody/guard' is neither prefix nor keywords", "give one of these"),
    ),
    Case("a judge without a name", lambda w: ["evaluate", w.whole_export, "--judge", "", "--quiet"], ("--judge: ''", "give one of")),
    Case("a judge that is a base", lambda w: ["evaluate", w.whole_export, "--judge", w.whole_base, "--quiet"], ("--judge: ", "give one")),
    Case("a judge that is damaged", judged(lambda f: replace(f / "config.json", "[" * 100_000)), ("--judge: ", "give one of")),
    Case("a judge with a list for a config", judged(lambda f: replace(f / "config.json", "[]")), ("--judge: ", "give one of")),
    Case("output is a file", output(lambda w: w.file("there", "years of work")), (*OUTPUT, "no export of this tool")),
    Case("output is a folder of another kind", output(lambda w: w.file("there/thesis", "")), (*OUTPUT, "no export of this tool")),
    Case("output is an export", output(lambda w: w.export(), "export"), ("--output: export exists", "--force")),
    Case("output is a link", output(lambda w: (w.folder / "there").symlink_to("/tmp")), (*OUTPUT, "symbolic link")),
    Case("output below a file", output(lambda w: w.file("there", ""), "there/out"), (*OUTPUT, "no folder")),
    Case("output with a name too long", option(output="o" * 250), (*OUTPUT, "at most")),
    Case("output with emoji too long", option(output="\U0001f9ca" * 62), (*OUTPUT, "at most")),
    Case("output with a path too long", option(output="o/" * 3000), (*OUTPUT,)),
    Case("output is the root", option(output="/"), (*OUTPUT,)),
    Case("output in the base", lambda w: (w.base(), w.calibrate("base", output="base/out"))[1], (*OUTPUT, "base model's folder")),
    Case("verify nothing", lambda w: ["verify", "absent"], CHECKPOINT),
    Case("verify a base", lambda w: ["verify", w.whole_base], CHECKPOINT),
    Case("verify a name without end", lambda w: ["verify", "v" * 5000], CHECKPOINT),
    Case("report is no JSON", export("verify", lambda f: replace(f / REPORT, "{")), CHECKPOINT),
    Case("report is a list", export("verify", lambda f: replace(f / REPORT, "[]")), FIELD),
    Case("report of 100,000 brackets", export("verify", lambda f: replace(f / REPORT, "[" * 100_000)), (*CHECKPOINT, "deeply")),
    Case("report too large", export("verify", lambda f: sparse(f / REPORT, 10**9)), (*CHECKPOINT, "bytes")),
    Case("report without its base", report(base_model=None), (*FIELD, "base_model")),
    Case("report with a shard above", report(base_model={**BASE, "shards": {"../x.safetensors": "0" * 64}}), (*FIELD, "shards")),
    Case("report with an absolute shard", report(base_model={**BASE, "shards": {"/etc/passwd": "0" * 64}}), (*FIELD, "shards")),
    Case("report without files", report(files=None), (*FIELD, "files")),
    Case("report with a number for a hash", report(files={"config.json": 7}), (*FIELD, "files")),
    Case("report with a path for a family", report(recipe={"family": "../x"}), (*FIELD, "family")),
    Case("report with text for statistics", report("evaluate", "--quiet", statistics=[{"layer": "x"}]), (*FIELD, "layer")),
    Case("report without layers", report("push", layers={}), ("--push: ", "log in")),
    Case("generate with a config that is none", generate(lambda f: replace(f / "config.json", "[]")), ("CHECKPOINT: ", "export again")),
    Case("generate without a shiftdc block", generate(lambda f: edit_json(f / "config.json", shiftdc=7)), ("CHECKPOINT: ", "again")),
    Case("generate without the tokenizer", generate(lambda f: (f / "tokenizer.json").unlink()), ("CHECKPOINT: ", "tokenizer files")),
    Case(
        "generate with half a shard",
        generate(lambda f: replace(f / "shiftdc.safetensors", (f / "shiftdc.safetensors").read_bytes()[:99])),
        ("CHECKPOINT: ", "export again"),
    ),
    Case("evaluate with an unknown defence", lambda w: ["evaluate", w.whole_export, "--defence", "magic"], ("'magic'", "expected all")),
    Case("evaluate 0 questions", lambda w: ["evaluate", w.whole_export, "--limit", "0"], ("--limit", "see --help")),
    Case("evaluate into a diary", lambda w: (w.file("e/replies.jsonl", "my diary"), [
        "evaluate", w.whole_export, "--output", "e", "--limit", "1", "--quiet"])[1], ("--output: ", "no log of replies", "give another")),
    *(
        Case(f"evaluate over {name}", lambda w, name=name: (w.file(f"e/{name}", "mine"), [
            "evaluate", w.whole_export, "--output", "e", "--limit", "1", "--quiet"])[1],
            (f"--output: e holds {name}", "may be somebody's", "give another"))
        for name in ("results.json", "layers.png", "attack_success.png")
    ),
    Case("evaluate into a file", lambda w: (w.file("e", "mine"), [
        "evaluate", w.whole_export, "--output", "e", "--limit", "1", "--quiet"])[1], ("--output: e is no folder", "give another")),
    Case("evaluate below a file", lambda w: (w.file("e", "mine"), [
        "evaluate", w.whole_export, "--output", "e/f/g", "--limit", "1", "--quiet"])[1], ("--output: e is no folder", "give another")),
    *(
        Case(f"{name} with a name without end", build, ("too long for the file system", "give a shorter one"))
        for name, build in {
            "an adapter": option(adapter="a" * 5000), "a calibration set": option(calibration="c" * 5000),
            "a judge": lambda w: ["evaluate", w.whole_export, "--judge", "j" * 5000, "--quiet"],
            "a picture": lambda w: ["generate", w.whole_export, "--image", "i" * 5000, "--prompt", "x"],
            "results": lambda w: ["evaluate", w.whole_export, "--output", "e" * 5000, "--quiet"],
        }.items()
    ),
    Case("replies with numbers for texts", lambda w: (w.file("e/replies.jsonl", '{"settings": {}}\n{"defence": 1}\n{}\n'), [
        "evaluate", w.whole_export, "--output", "e", "--limit", "1", "--quiet"])[1], ("e/replies.jsonl, line 2", "give another")),
]  # fmt: skip
