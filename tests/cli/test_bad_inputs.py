"""Every bad input ends in one sentence that names the place and the mend, with exit code 2, and leaves the disk as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bad_inputs import CASES, Workshop
from bad_inputs.lines import SECRET
from click.testing import CliRunner
from interpreters import COMMAND_LINE, python
from tiny import save_tiny_llava

from exporter.cli.commands import main

#: Run as a person would, in a process of its own, the first in a fresh interpreter; the others in this one, for speed.
IN_A_SHELL = ("recipe with aliases that grow", "calibration of one class", "picture of 50,000 x 50,000", "weights that are nan")


@pytest.fixture(scope="module")
def whole(base_folder, calibration_file, make_export, tmp_path_factory):
    sharded = save_tiny_llava(tmp_path_factory.mktemp("sharded") / "base", sharded=True)
    return base_folder, sharded, make_export(caption_max_new_tokens=8).plan.output, calibration_file


@pytest.fixture
def workshop(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return Workshop(tmp_path, *whole)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below, links and pipes too, with size and time of change."""
    found = {}
    for at, folders, files in os.walk(folder):
        for name in (*folders, *files):
            status = (Path(at) / name).lstat()
            found[str((Path(at) / name).relative_to(folder))] = (status.st_size, status.st_mtime_ns)
    return found


def one_sentence(case, code: int, stdout: str, stderr: str) -> None:
    assert "Traceback" not in stdout + stderr, stderr
    assert code == 2, (code, stdout, stderr)
    assert stdout == ""
    assert stderr.startswith("Error: ") and stderr.endswith(".\n") and stderr.count("\n") == 1, stderr
    assert not [w for w in case.words if w not in stderr], stderr
    assert SECRET not in stderr
    assert len(stderr) < 2000


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_bad_input(case, workshop):
    arguments = [os.fspath(a) for a in case.build(workshop)]
    before = listing(workshop.folder)
    if case.name in IN_A_SHELL:
        interpreter = [sys.executable] if case.name == IN_A_SHELL[0] else python(COMMAND_LINE)
        command = [*interpreter, "-m", "exporter.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        code, stdout, stderr = done.returncode, done.stdout, done.stderr
    else:
        done = CliRunner().invoke(main, arguments)
        assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
        code, stdout, stderr = done.exit_code, done.stdout, done.stderr
    one_sentence(case, code, stdout, stderr)
    assert listing(workshop.folder) == before


def test_the_corpus_is_large_and_names_differ():
    assert len({c.name for c in CASES}) == len(CASES) >= 110
    assert {c.name for c in CASES} >= set(IN_A_SHELL)
