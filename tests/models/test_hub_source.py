"""MODEL as a Hub id: a local Hub, the real client, a process of its own (HF_ENDPOINT is read at import)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest
from hub import COMMIT, serve
from interpreters import COMMAND_LINE, python
from tiny import save_tiny_llava


@pytest.fixture(scope="module")
def hub(base_folder, tmp_path_factory):
    folder = shutil.copytree(base_folder, tmp_path_factory.mktemp("hub") / "repository")
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    (folder / "modeling_evil.py").write_text("raise SystemExit('never run')")
    with serve({"org/tiny": folder, "org/secret": folder}, gated=frozenset({"org/secret"})) as url:
        yield url


def run(url, cwd, *arguments):
    environment = {
        **os.environ, "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cwd / "cache"), "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    command = [*python(COMMAND_LINE), "-m", "exporter.cli", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)


def test_a_hub_id_is_fetched_and_exported(hub, tmp_path, calibration_file):
    done = run(hub, tmp_path, "org/tiny", "--layers", "1", "--calibration", calibration_file, "--quiet", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["base_model"]["id"] == "org/tiny"
    assert report["base_model"]["revision"] == COMMIT
    card = (tmp_path / "tiny-shiftdc" / "README.md").read_text()
    assert "base_model: org/tiny" in card
    fetched = {f.name for f in (tmp_path / "cache").rglob("*")}
    assert "config.json" in fetched
    assert not fetched & {"pytorch_model.bin", "modeling_evil.py"}


@pytest.fixture
def sharded(tmp_path):
    """Shards with an index, and beside them what other programs load: the same weights in one file, graphs, the maker's own."""
    folder = save_tiny_llava(tmp_path / "sharded", sharded=True)
    for other in (
        "consolidated.safetensors",
        "onnx/model.safetensors",
        "onnx/tokenizer.json",
        "original/tokenizer.model",
        "params.json",
    ):
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_bytes(b"not asked for")
    (folder / "qformer_tokenizer").mkdir()
    (folder / "qformer_tokenizer" / "vocab.txt").write_text("a")
    return folder


def fetched(cache):
    """Paths below the snapshot."""
    snapshot = next(cache.rglob("snapshots/*"))
    return {f.relative_to(snapshot).as_posix() for f in snapshot.rglob("*") if not f.is_dir()}


def test_what_the_index_and_the_processor_need_is_fetched_and_nothing_else(sharded, tmp_path):
    with serve({"org/sharded": sharded}) as url:
        done = run(url, tmp_path, "org/sharded", "--dry-run")
        assert done.returncode == 0, done.stderr
        there = fetched(tmp_path / "cache")
        shards = {f.name for f in sharded.glob("model-*.safetensors")}
        assert len(shards) > 2
        assert {f for f in there if f.endswith(".safetensors")} == shards
        assert "qformer_tokenizer/vocab.txt" in there
        assert not {f for f in there if f.startswith(("onnx", "original", "params", "consolidated"))}
        size = sum((sharded / name).stat().st_size for name in shards)
        assert f"org/sharded: fetching {size / 1e9:.2f} GB of weights in {len(shards)} files.\n" in done.stderr
        again = run(url, tmp_path, "org/sharded", "--dry-run")
        assert (again.returncode, "fetching" in again.stderr) == (0, False)
    offline = run("http://127.0.0.1:9", tmp_path, "org/sharded", "--dry-run")
    assert offline.returncode == 0, offline.stderr


def test_one_file_wins_over_an_index(hub, tmp_path):
    done = run(hub, tmp_path, "org/tiny", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "in 1 file.\n" in done.stderr


@pytest.mark.parametrize("broken", ["processor class", "tokenizer", "config", "weights"])
def test_what_small_files_tell_is_told_before_weights_are_fetched(sharded, tmp_path, broken):
    name, content = {
        "processor class": ("processor_config.json", '{"processor_class": "MyVLProcessor"}'),
        "tokenizer": ("tokenizer.json", '{"model": 1}'),
        "config": ("config.json", '{"model_type": "llava", "image_token_index": "x", "text_config": 3}'),
        "weights": ("model.safetensors.index.json", '{"weight_map": {"a": "absent.safetensors"}}'),
    }[broken]
    (sharded / name).write_text(content)
    with serve({"org/sharded": sharded}) as url:
        done = run(url, tmp_path, "org/sharded", "--output", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not [f for f in fetched(tmp_path / "cache") if f.endswith(".safetensors")]


@pytest.fixture(scope="module")
def nothing_fetched(tmp_path_factory):
    """One folder for tests that fetch nothing."""
    return tmp_path_factory.mktemp("nothing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["org/absent"], "neither an existing folder nor a model on the Hub"),
        (["org/secret"], "org/secret is gated"),
        (["org/tiny", "--revision", "v9"], "has no revision 'v9'"),
        (["not an id"], "of the form owner/name"),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence(hub, nothing_fetched, arguments, message):
    done = run(hub, nothing_fetched, *arguments, "--dry-run")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_no_hub_in_reach(tmp_path):
    done = run("http://127.0.0.1:9", tmp_path, "org/tiny", "--dry-run")
    assert done.returncode == 2, done.stderr
    assert "the Hub cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr
