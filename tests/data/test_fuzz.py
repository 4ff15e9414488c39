"""Readers of files that come from others: any bytes give a value or an InputError, and nothing else."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from exporter.checkpoint.report import read_report
from exporter.data import benchmarks_file, calibration_sets
from exporter.errors import InputError
from exporter.evaluation.replies import ReplyLog
from exporter.models.base import BaseCheckpoint, resolve
from exporter.models.recipe import load_recipe
from exporter.models.shards import INDEX
from exporter.publishing.card_metadata import inherit
from exporter.runtime.resources import resource
from exporter.runtime.safetensors_header import read_header

bounded = settings(
    max_examples=150,
    deadline=None,
    derandomize="CI" in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NAMES = ("family", "label", "request", "caption", "image", "split", "prompt", "kind", "cell", "weight_map", "settings", "defence",
         "question", "text", "seconds", "__metadata__", "dtype", "shape", "data_offsets", "base_model", "shards", "recipe",
         "files", "layers", "statistics", "license", "language")  # fmt: skip
VALUES = ("safe", "unsafe", "benign", "harmful", "F32", "BF16", "fit", "llava", "../x", "/etc/passwd", "a.safetensors", "nan")
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(VALUES)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), inner, max_size=5),
    max_leaves=12,
)
documents = trees.map(lambda value: json.dumps(value).encode())
#: Bytes, documents, documents with a few bytes changed, and many lines of them.
anything = (
    st.binary(max_size=200)
    | documents
    | st.tuples(documents, st.integers(0, 300), st.binary(max_size=3)).map(
        lambda t: t[0][: t[1]] + t[2] + t[0][t[1] + len(t[2]) :]
    )
    | st.lists(documents, max_size=4).map(b"\n".join)
)


def survives(read, *arguments) -> None:
    try:
        read(*arguments)
    except InputError as error:
        assert len(str(error)) < 3000
        assert str(error).endswith(".")


@bounded
@given(anything)
@example(b"a: !!timestamp x")
@example(b"? [a]\n: b")
@example(b"a: !!binary \xc3\xa9")
@example(b"a: 0x")
@example(b"a: !!float ''\n")
@example(b"{? {a: b} : c}")
def test_recipes(tmp_path, data):
    file = tmp_path / "r.yaml"
    file.write_bytes(data)
    survives(load_recipe, str(file))


LLAVA = (resource("recipes") / "llava.yaml").read_text("utf-8")


@bounded
@given(st.sampled_from(("models", "layers", "strength", "prompts", "benchmark", "caption_max_new_tokens")), trees)
def test_recipes_that_are_nearly_right(tmp_path, key, value):
    file = tmp_path / "r.yaml"
    file.write_text(LLAVA.replace(f"\n{key}:", "\nremoved:") + f"\n{key}: {json.dumps(value)}\n", "utf-8")
    survives(load_recipe, str(file))


@bounded
@given(anything)
@example(json.dumps({"label": "safe", "request": "x", "caption": "y", "image": "\0"}).encode())
@example(json.dumps({"label": "safe", "request": "x", "caption": "y", "image": "a/" * 3000}).encode())
def test_calibration_sets(tmp_path, data):
    file = tmp_path / "c.jsonl"
    file.write_bytes(data)
    survives(calibration_sets.read_calibration, file)


@bounded
@given(anything)
def test_benchmarks(tmp_path, data):
    file = tmp_path / "b.jsonl"
    file.write_bytes(data)
    survives(benchmarks_file.read_benchmark, file)


@bounded
@given(anything, st.none() | st.integers(0, 2**64 - 1), st.binary(max_size=8))
@example(b'{"a": {"dtype": "F32", "shape": [1e3], "data_offsets": [0, 4]}}', None, bytes(4))
@example(b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 4]}}' % (b"9" * 4000), None, bytes(4))
@example(b'{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}', None, bytes(4))
@example(b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [false, 4]}}', None, bytes(4))
def test_safetensors_headers(tmp_path, header, length, data):
    file = tmp_path / "s.safetensors"
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    survives(read_header, file)


@bounded
@given(anything, st.sampled_from(("config.json", INDEX, "tokenizer_config.json")))
def test_configs_and_indexes(tmp_path, data, name):
    for file, content in {
        "config.json": b'{"model_type": "llava"}',
        INDEX: b'{"weight_map": {"a": "m.safetensors"}}',
        name: data,
    }.items():
        (tmp_path / file).write_bytes(content)
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    survives(resolve, str(tmp_path))


@pytest.fixture(scope="module")
def report(make_export):
    return json.loads((make_export().plan.output / "shiftdc_report.json").read_text())


@bounded
@given(anything)
def test_reports(tmp_path, data):
    (tmp_path / "shiftdc_report.json").write_bytes(data)
    survives(read_report, tmp_path)


@bounded
@given(st.sampled_from(("base_model", "layers", "recipe", "calibration", "statistics", "versions", "files", "evaluation")), trees)
def test_reports_that_are_nearly_right(tmp_path, report, key, value):
    (tmp_path / "shiftdc_report.json").write_text(json.dumps({**report, key: value}))
    survives(read_report, tmp_path)


def test_the_report_itself_is_read(tmp_path, report):
    (tmp_path / "shiftdc_report.json").write_text(json.dumps(report))
    assert json.loads(read_report(tmp_path).text()) == report


@bounded
@given(anything)
@example(b'{"settings": 1}\n{"defence": "a", "question": "b", "text": "c", "seconds": {"d": NaN}}\n{}\n')
def test_replies(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("log")
    (folder / "replies.jsonl").write_bytes(data)
    survives(ReplyLog, folder, {"shards": 1})


@bounded
@given(anything)
@example(b"license: &a [*a]")
def test_cards_of_base_models(tmp_path, data):
    (tmp_path / "README.md").write_bytes(b"---\n" + data + b"\n---\n")
    found = inherit(BaseCheckpoint("x", None, Path(tmp_path), {}, ()))
    assert found.license or found.problem
