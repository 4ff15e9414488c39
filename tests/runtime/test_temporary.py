"""Temporary folders: this user's alone, and none left for good."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile

import pytest
from children import answer, child

from exporter.checkpoint import verify_worker
from exporter.runtime.temporary import temporary


@pytest.fixture(autouse=True)
def system(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_there_for_a_while(system):
    with temporary("x") as folder:
        (folder / "file").write_text("x")
        assert (system / f"shiftdc-{os.getuid()}").stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


def test_what_a_killed_run_left_goes_with_the_next_and_what_is_in_use_stays():
    def work(writing):
        with temporary("x") as folder:
            (folder / "file").write_text("x")
            os.write(writing, str(folder).encode())
            signal.pause()

    pid, reading = child(work)
    left = os.read(reading, 1000).decode()
    with temporary("y"):
        assert os.path.exists(f"{left}/file")
    os.kill(pid, signal.SIGKILL)
    answer(pid, reading)
    with temporary("y"):
        assert not os.path.exists(left)


def test_what_is_not_ours_stays(system):
    root = system / f"shiftdc-{os.getuid()}"
    (root / "thesis").mkdir(mode=0o700, parents=True)
    root.chmod(0o700)
    (root / "thesis" / "chapter.txt").write_text("years of work")
    (root / "notes.txt").write_text("more")
    with temporary("x"):
        pass
    assert sorted(f.name for f in root.rglob("*")) == ["chapter.txt", "notes.txt", "thesis"]


@pytest.mark.parametrize("killed", [False, True])
def test_the_process_that_verifies_ends_with_its_parent(make_export, killed):
    folder = make_export().plan.output
    reading, writing = os.pipe()
    command = [sys.executable, verify_worker.__file__, str(folder)]
    with os.fdopen(writing, "w") as held, subprocess.Popen(command, stdin=reading, stdout=subprocess.PIPE) as process:
        os.close(reading)
        if killed:  # what the system does with a killed parent's files
            held.close()
        printed, _ = process.communicate()
    assert (process.returncode, bool(printed)) == ((1, False) if killed else (0, True))


@pytest.mark.parametrize("kind", ["link", "file", "open"])
def test_a_place_that_may_be_somebody_elses_is_not_used(system, kind):
    root, other = system / f"shiftdc-{os.getuid()}", system / "other"
    other.mkdir()
    (other / "precious").mkdir()
    if kind == "link":
        root.symlink_to(other)
    elif kind == "file":
        root.write_text("x")
    else:
        root.mkdir()
        root.chmod(0o777)
    with temporary("x") as folder:
        assert folder.parent == system
    assert (other / "precious").exists()
