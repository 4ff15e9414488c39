"""Base models: configs, indexes, safetensors, tokenizers, processors, weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bad_inputs.workshop import Case, Workshop, edit_json, replace, safetensors, sparse, tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def damaged(edit: Callable[[Path], object], sharded: bool = False) -> Callable[[Workshop], list[Any]]:
    """An export of a base that `edit` has changed."""

    def build(w: Workshop) -> list[Any]:
        base = w.base(sharded=sharded)
        edit(base)
        return w.calibrate("base")

    return build


def config(**changes: Any) -> Callable[[Workshop], list[Any]]:
    return damaged(lambda base: edit_json(base / "config.json", **changes))


def text_config(**changes: Any) -> Callable[[Workshop], list[Any]]:
    def edit(base: Path) -> None:
        values = json.loads((base / "config.json").read_text())
        edit_json(base / "config.json", text_config={**values["text_config"], **changes})

    return damaged(edit)


def content(name: str, text: str | bytes) -> Callable[[Workshop], list[Any]]:
    return damaged(lambda base: replace(base / name, text))


def gone(*patterns: str) -> Callable[[Workshop], list[Any]]:
    def edit(base: Path) -> None:
        for file in [f for p in patterns for f in base.glob(p)]:
            file.unlink()

    return damaged(edit)


def linked(name: str, target: str) -> Callable[[Workshop], list[Any]]:
    def edit(base: Path) -> None:
        (base / name).unlink()
        (base / name).symlink_to(target)

    return damaged(edit)


def elsewhere(w: Workshop) -> list[Any]:
    """The weights are a link to another folder."""
    base = w.base()
    (base / SINGLE).rename(w.folder / "elsewhere.safetensors")
    (base / SINGLE).symlink_to(w.folder / "elsewhere.safetensors")
    return w.calibrate(base)


def index(edit: Callable[[dict[str, str]], Any]) -> Callable[[Workshop], list[Any]]:
    """A sharded base with another weight_map."""
    return damaged(lambda base: edit_json(base / INDEX, weight_map=edit(weight_map(base))), sharded=True)


def weight_map(base: Path) -> dict[str, str]:
    return json.loads((base / INDEX).read_text())["weight_map"]


def first_named(name: Any) -> Callable[[dict[str, str]], dict[str, Any]]:
    return lambda m: {**m, min(m): name}


def drop_a_shard(base: Path) -> None:
    min(base.glob("*.safetensors")).unlink()


def tensor_in_two(base: Path) -> None:
    one, two = sorted(base.glob("*.safetensors"))[:2]
    held = load_file(one)
    twice = {**load_file(two), min(held): held[min(held)]}
    two.unlink()
    save_file(twice, two, metadata={"format": "pt"})


def key_twice(base: Path) -> None:
    text = (base / INDEX).read_text()
    name = min(weight_map(base))
    replace(base / INDEX, text.replace('"weight_map": {', f'"weight_map": {{"{name}": "../x.safetensors",'))


def shard(data: bytes) -> Callable[[Workshop], list[Any]]:
    return content(SINGLE, data)


def cut(keep: int) -> Callable[[Workshop], list[Any]]:
    return damaged(lambda base: replace(base / SINGLE, (base / SINGLE).read_bytes()[:keep]))


def longer(base: Path) -> None:
    replace(base / SINGLE, (base / SINGLE).read_bytes() + b"\0" * 8)


def huge_header(base: Path) -> None:
    sparse(base / SINGLE, 10**9)
    with (base / SINGLE).open("r+b") as file:
        file.write((90_000_000).to_bytes(8, "little"))


def pickle_only(base: Path) -> None:
    (base / SINGLE).rename(base / "pytorch_model.bin")


def weights(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Callable[[Workshop], list[Any]]:
    def edit(base: Path) -> None:
        tensors = {name: change(name, value) for name, value in load_file(base / SINGLE).items()}
        (base / SINGLE).unlink()
        save_file(tensors, base / SINGLE, metadata={"format": "pt"})

    return damaged(edit)


def no_padding(base: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (base / name).exists():
            edit_json(base / name, pad_token=None)


def nested(depth: int) -> str:
    return '{"model_type": "llava", "a": ' + "[" * depth + "]" * depth + "}"


def mapped(name: str, path: str) -> Case:
    return Case(name, index(first_named(path)), (INDEX, "files of the same folder", "do not use"))


CONFIG = ("MODEL: ", "config.json", "fetch the checkpoint again")
UNUSABLE = ("MODEL: the config.json of base cannot be used", "restore it")
SHARD = ("MODEL: ", SINGLE, "not a whole safetensors file", "fetch it again")
PROCESSOR = ("MODEL: ", "processor", "restore its")
TEMPLATE = ("MODEL: its prompts cannot be composed", "restore its chat template")
PROMPT = ("MODEL: base cannot read a prompt with an image", "restore its")
NUMBERS = ("MODEL: ", "not finite", "fetch it again")

CASES = [
    Case("no folder", lambda w: w.calibrate("./absent"), ("no folder ./absent", "give a Hub id")),
    Case("an empty folder", lambda w: (w.folder / "base").mkdir() or w.calibrate("base"), ("holds no config.json", "give the folder")),
    Case("a file for a model", lambda w: w.calibrate(w.file("./sub/base/x", "") and "./sub/base/x"), ("no folder ./sub/base/x", "give")),
    Case("config is empty", content("config.json", ""), CONFIG),
    Case("config is a list", content("config.json", "[]"), CONFIG),
    Case("config is not UTF-8", content("config.json", b'{"a": "\xff"}'), (*CONFIG, "byte 7")),
    Case("config of 100,000 brackets", content("config.json", nested(100_000)), (*CONFIG, "too deeply")),
    Case("config with a number of 10,000 digits", content("config.json", '{"model_type": ' + "9" * 10_000 + "}"), CONFIG),
    Case("config too large", damaged(lambda base: sparse(base / "config.json", 10**9)), (*CONFIG, "bytes")),
    Case("config is a link out", linked("config.json", "/etc/hostname"), ("config.json", "leads out of", "copy that file")),
    Case("config is a dangling link", linked("config.json", "nowhere"), ("config.json", "give the folder")),
    Case("config is a pipe", damaged(lambda base: (base / "config.json").unlink() or os.mkfifo(base / "config.json")), CONFIG),
    Case("config without a model type", config(model_type=None), ("names no model_type", "give a transformers checkpoint")),
    Case("config with a number for a model type", config(model_type=7), ("names no model_type", "give a transformers checkpoint")),
    Case("config of an unknown family", config(model_type="gpt2"), ("'gpt2'", "'shiftdc-export recipes'")),
    Case("config of a family that is refused", config(model_type="florence2"), ("MODEL: ", "florence2", "encoder-decoder", "decoders")),
    Case("config with a surrogate for a family", config(model_type="\ud800"), ("'\\ud800'", "'shiftdc-export recipes'")),
    Case("config of a calibrated model", config(model_type="shiftdc_llava"), ("calibrated already", "give its base model")),
    Case("an export for a base", lambda w: w.calibrate(w.whole_export), ("calibrated already", "give its base model")),
    Case("config with a list for the text model", config(text_config=[]), UNUSABLE),
    Case("config with text for the layers", text_config(num_hidden_layers="four"), UNUSABLE),
    Case("config without layers", text_config(num_hidden_layers=0), UNUSABLE),
    Case("config with -3 layers", text_config(num_hidden_layers=-3), ("text_config.num_hidden_layers", "is -3", "again")),
    Case("config with a billion layers", text_config(num_hidden_layers=10**9), ("text_config.num_hidden_layers", "tensors", "again")),
    Case(
        "config that asks for code of the Hub",
        config(attn_implementation="someone/kernel"),
        ("attn_implementation", "never run", "remove the entry"),
    ),
    Case("config with another width", text_config(hidden_size=64), ("MODEL: base", "llava", "again")),
    Case("config with another vocabulary", text_config(vocab_size=9999), ("MODEL: base", "llava", "again")),
    Case("config with another patch size", damaged(
        lambda base: edit_json(base / "processor_config.json", patch_size=7)), PROMPT),
    Case("index is no JSON", damaged(lambda base: replace(base / INDEX, "{"), sharded=True), (INDEX, "fetch the checkpoint again")),
    Case("index without a map", index(lambda m: None), ("no usable weight_map", "fetch the checkpoint again")),
    Case("index with a list for a map", index(lambda m: sorted(m)), ("no usable weight_map", "fetch the checkpoint again")),
    Case("index with numbers for files", index(first_named(7)), ("no usable weight_map", "fetch the checkpoint again")),
    Case("index with a key twice", damaged(key_twice, sharded=True), (INDEX, "twice", "fetch the checkpoint again")),
    mapped("index with a path above", "../evil.safetensors"),
    mapped("index with an absolute path", "/etc/passwd"),
    mapped("index with a path below", "sub/x.safetensors"),
    mapped("index with a pickle", "weights.bin"),
    Case("index with a name with a null byte", index(first_named("a\0.safetensors")), (INDEX, "is missing", "again")),
    Case("index with a tensor that is not there", index(lambda m: {**m, "ghost": min(m.values())}), ("lacks ghost", "again")),
    Case("a shard is missing", damaged(drop_a_shard, sharded=True), ("is missing", "fetch the checkpoint again")),
    Case("a tensor in two shards", damaged(tensor_in_two, sharded=True), ("is both in", "fetch the checkpoint again")),
    Case("weights are a link out", elsewhere, ("leads out of the checkpoint", "copy that file")),
    Case("weights are a dangling link", linked(SINGLE, "nowhere"), ("no safetensors", "convert")),
    Case("weights are a folder", damaged(lambda base: (base / SINGLE).unlink() or (base / SINGLE).mkdir()), SHARD),
    Case("only a pickle", damaged(pickle_only), ("only pickle files", "convert the checkpoint")),
    Case("a pickle under another name", shard(b"PK\x03\x04" + b"\0" * 200), SHARD),
    Case("safetensors of no bytes", shard(b""), SHARD),
    Case("safetensors of 3 bytes", cut(3), SHARD),
    Case("safetensors without data", cut(2000), SHARD),
    Case("safetensors cut short", cut(-8), SHARD),
    Case("safetensors that go on", damaged(longer), SHARD),
    Case("safetensors whose header is said to be endless", shard(safetensors({}, length=2**63)), (*SHARD, "longer than the file")),
    Case("safetensors with 90 MB of header", damaged(huge_header), (*SHARD, "more than")),
    Case("safetensors with text for a header", shard(safetensors(b"not JSON")), SHARD),
    Case("safetensors with a list for a header", shard(safetensors([])), SHARD),
    Case("safetensors with 100,000 brackets", shard(safetensors(b"[" * 100_000)), SHARD),
    Case("safetensors that overlap", shard(safetensors({"a": tensor(), "b": tensor()}, bytes(4))), (*SHARD, "overlap")),
    Case("safetensors with a gap", shard(safetensors({"a": tensor(4, 8)}, bytes(8))), (*SHARD, "gap")),
    Case("safetensors from a negative byte", shard(safetensors({"a": tensor(-4, 0)})), (*SHARD, "data_offsets")),
    Case("safetensors that end before they start", shard(safetensors({"a": tensor(4, 0)}, bytes(4))), (*SHARD, "data_offsets")),
    Case("safetensors at half a byte", shard(safetensors({"a": tensor(0, 4.5)}, bytes(4))), (*SHARD, "data_offsets")),
    Case(
        "safetensors with a name twice",
        shard(safetensors(b'{"a": %s, "a": %s}' % ((json.dumps(tensor()).encode(),) * 2), bytes(4))),
        (*SHARD, "twice"),
    ),
    Case("safetensors of an unknown type", shard(safetensors({"a": tensor(dtype="F33")}, bytes(4))), (*SHARD, "dtype")),
    Case("safetensors of a wrong size", shard(safetensors({"a": tensor(shape=[3])}, bytes(4))), (*SHARD, "shape [3]")),
    Case("safetensors of a negative shape", shard(safetensors({"a": tensor(shape=[-1, -1])}, bytes(4))), (*SHARD, "shape")),
    Case("safetensors of no tensors", shard(safetensors({})), ("holds no tensors", "fetch the checkpoint again")),
    Case("weights of one tensor", shard(safetensors({"a": tensor()}, bytes(4))), ("MODEL: ", "again")),
    Case("weights that are nan", weights(lambda n, t: t * torch.nan), NUMBERS),
    Case("one weight that is inf", weights(lambda n, t: t + torch.inf if n.endswith("lm_head.weight") else t), NUMBERS),
    Case("weights that are all zero", weights(lambda n, t: t * 0), ("same mean activation", "two sides differ")),
    Case("no tokenizer", gone("tokenizer*"), PROCESSOR),
    Case("tokenizer is no JSON", content("tokenizer.json", "{"), PROCESSOR),
    Case("tokenizer is empty", content("tokenizer.json", "{}"), PROCESSOR),
    Case("tokenizer config is a list", content("tokenizer_config.json", "[]"), PROCESSOR),
    Case("tokenizer is a link out", linked("tokenizer.json", "/etc/hostname"), ("tokenizer.json", "leads out of", "copy that file")),
    Case("no padding token", damaged(no_padding), ("MODEL: its prompts cannot be composed", "padding", "restore its")),
    Case("no processor config", gone("processor_config.json", "preprocessor_config.json"), PROCESSOR),
    Case("processor config is no JSON", content("processor_config.json", "{"), PROCESSOR),
    Case("no chat template", gone("chat_template.jinja"), ("no chat template", "add one")),
    Case("chat template cut short", content("chat_template.jinja", "{% for m in"), TEMPLATE),
    Case("chat template that leaves the sandbox", content("chat_template.jinja", "{{ ''.__class__.__mro__ }}"), TEMPLATE),
    Case("chat template without the image", content("chat_template.jinja", "{{ messages[0].content[-1].text }}"), ("MODEL: ", "template")),
    Case("chat template without the request", content("chat_template.jinja", "<image> Hello"), ("MODEL: ", "template")),
]  # fmt: skip
