"""`shiftdc-export ... --push` and `shiftdc-export push`, as typed, against a local Hub; the result is loaded from there."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from hub_write import WRITE, serve
from interpreters import COMMAND_LINE, python

REPLY = """
import sys, torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.tensor([[1, 280, 30, 225, 4, 4, 4, 4, 203, 9, 17, 336, 30]])
pixels = torch.linspace(-2, 2, 3 * 28 * 28).reshape(1, 3, 28, 28)
out = model.generate(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
print(model.shiftdc_reference(ids, pixel_values=pixels).tolist(), out.tolist())
"""


@pytest.fixture
def shell(tmp_path):
    """run(*command, token=...) in `tmp_path`, with a Hub of its own."""
    with serve() as hub:

        def run(*command, token=WRITE):
            environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
            environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
            environment |= {"HF_TOKEN": token} if token else {}
            arguments = [*python(COMMAND_LINE), *map(str, command)]
            return subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

        yield run


def cli(shell, *arguments, **options):
    done = shell("-m", "exporter.cli", *arguments, **options)
    assert WRITE not in done.stdout + done.stderr  # the server quotes the token in every answer
    return done


def test_export_and_push_in_one_command(shell, base_folder, calibration_file, tmp_path):
    export = (base_folder, "--layers", "1-2", "--calibration", calibration_file, "--output", tmp_path / "mine", "--quiet")
    done = cli(shell, *export, "--push")
    assert (done.returncode, "the effect must be measured first" in done.stderr) == (2, True)
    assert not (tmp_path / "mine").exists()
    done = cli(shell, *export, "--push", "--allow-ineffective")
    assert done.returncode == 0, done.stderr
    assert "every file compared with the local one" in done.stdout
    local, remote = (shell("-c", REPLY, where) for where in (tmp_path / "mine", "alice/mine"))
    assert remote.returncode == 0, remote.stderr
    assert remote.stdout.splitlines()[-1] == local.stdout.splitlines()[-1]


def test_push_of_an_export(shell, make_export):
    folder = make_export(caption_max_new_tokens=4).plan.output
    done = cli(shell, "push", folder, "--repo-id", "tiny", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "to alice/tiny:" in done.stdout
    assert "sent" in done.stdout and "shiftdc.safetensors" in done.stdout
    done = cli(shell, "push", folder, "--repo-id", "tiny", "--quiet")
    assert (done.returncode, "--allow-ineffective" in done.stderr) == (2, True)
    done = cli(shell, "push", folder, "--repo-id", "tiny", "--quiet", "--json", "--allow-ineffective")
    assert done.returncode == 0, done.stderr
    assert "shiftdc.safetensors" in json.loads(done.stdout)["sent"]


@pytest.mark.parametrize("command", [["push"], ["--push", "--allow-ineffective"]])
def test_no_token_is_one_sentence_before_any_work(shell, make_export, base_folder, command):
    target = make_export(caption_max_new_tokens=4).plan.output if command[0] == "push" else base_folder
    arguments = [*command, target] if command[0] == "push" else [target, *command, "--layers", "1", "--quiet"]
    done = cli(shell, *arguments, token=None)
    assert done.returncode == 2
    assert "there is no Hugging Face token" in done.stderr
    assert "Traceback" not in done.stderr
