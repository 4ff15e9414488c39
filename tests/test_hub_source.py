"""MODEL as a Hub id: a local Hub, the real client, a process of its own (HF_ENDPOINT is read at import)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from hub import COMMIT, serve


@pytest.fixture
def hub(base_folder, tmp_path):
    folder = shutil.copytree(base_folder, tmp_path / "repository")
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    (folder / "modeling_evil.py").write_text("raise SystemExit('never run')")
    with serve({"org/tiny": folder, "org/secret": folder}, gated=frozenset({"org/secret"})) as url:
        yield url


def run(url, cwd, *arguments):
    environment = {
        **os.environ, "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cwd / "cache"), "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "exporter.cli", *map(str, arguments)]
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["org/absent"], "neither an existing folder nor a model on the Hub"),
        (["org/secret"], "org/secret is gated"),
        (["org/tiny", "--revision", "v9"], "has no revision 'v9'"),
        (["not an id"], "of the form owner/name"),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence(hub, tmp_path, arguments, message):
    done = run(hub, tmp_path, *arguments, "--dry-run")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_no_hub_in_reach(tmp_path):
    done = run("http://127.0.0.1:9", tmp_path, "org/tiny", "--dry-run")
    assert done.returncode == 2, done.stderr
    assert "the Hub cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr
