"""Errors keep their cause, and no trace quotes a request or a reply."""

from __future__ import annotations

import json
import struct
import traceback

import pytest

from exporter.data.benchmarks_file import read_benchmark
from exporter.data.calibration_sets import load_calibration
from exporter.errors import InputError, refusing
from exporter.evaluation.replies import ReplyLog
from exporter.models.recipe import load_recipe
from exporter.runtime.safetensors_header import read_header

SECRET = "whatever stands here is shown to nobody"


def trace(error):
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    "line",
    [
        json.dumps({"label": SECRET, "kind": SECRET, "prompt": SECRET, "request": SECRET, "image": SECRET}),
        json.dumps({"label": "safe", "kind": "harmful", "request": [SECRET], "prompt": [SECRET], "image": "a.png"}),
        f'{{"request": "{SECRET}", "request": "{SECRET}", "prompt": "{SECRET}"}}',
        f'{{"request": "{SECRET}", "prompt": "{SECRET}"',
    ],
    ids=["values", "lists", "twice", "cut"],
)
@pytest.mark.parametrize("read", [lambda file: read_benchmark(file), lambda file: load_calibration(str(file))])
def test_no_trace_quotes_a_request(tmp_path, read, line):
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match="line 1") as raised:
        read(tmp_path / "rows.jsonl")
    assert "InputError" in trace(raised.value) and SECRET not in trace(raised.value)


@pytest.mark.parametrize(
    "lines", [[{"settings": {}}, {"text": SECRET}, {}], [{"text": SECRET}], []], ids=["reply", "first", "none"]
)
def test_no_trace_quotes_a_reply(tmp_path, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines) or f'{{"{SECRET}'
    (tmp_path / "replies.jsonl").write_text(text)
    with pytest.raises(InputError, match="--output") as raised:
        ReplyLog(tmp_path, {})
    assert SECRET not in trace(raised.value)


def test_no_trace_quotes_a_file_in_yaml(tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"family: [{SECRET}\nmodels: }}")
    with pytest.raises(InputError, match="cannot be read as YAML") as raised:
        load_recipe(str(tmp_path / "recipe.yaml"))
    assert SECRET not in trace(raised.value)


def test_causes_are_kept(tmp_path):
    with pytest.raises(InputError, match=r"x \(KeyError: 'a'\); y") as raised, refusing("x", "y"):
        raise KeyError("a")
    assert isinstance(raised.value.__cause__, KeyError)
    (tmp_path / "a.safetensors").write_bytes(b"abc")
    with pytest.raises(InputError, match="not a whole safetensors file") as raised:
        read_header(tmp_path / "a.safetensors")
    assert isinstance(raised.value.__cause__, struct.error)


def test_memory_is_no_matter_of_the_file():
    with pytest.raises(MemoryError), refusing("x", "y"):
        raise MemoryError
