"""Outputs are whole or absent: two runs at once, killed runs, full disks, read-only folders."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from exporter import staging
from exporter.cli import main
from exporter.errors import InputError, WriteError
from exporter.staging import scratch, staged, write_together

OLD = "an earlier export"


def names(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir())


def earlier(output: Path) -> Path:
    """What counts as an earlier export."""
    output.mkdir()
    (output / "shiftdc_report.json").write_text(OLD)
    return output


def fill(folder: Path) -> None:
    (folder / "shiftdc_report.json").write_text("new")


def test_the_output_appears_at_the_end(tmp_path):
    output = tmp_path / "sub" / "out"
    with staged(output, False) as folder:
        assert folder.parent == output.parent
        fill(folder)
        assert not output.exists()
    assert names(output.parent) == ["out"]
    assert (output / "shiftdc_report.json").read_text() == "new"


def test_nothing_is_left_of_a_failure_not_even_new_parents(tmp_path):
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "a" / "b" / "out", False):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_two_runs_for_one_output(tmp_path):
    with staged(tmp_path / "out", False) as folder:
        fill(folder)
        with pytest.raises(InputError, match=r"another run is writing to .*out now; wait"), staged(tmp_path / "out", False):
            pass
        with staged(tmp_path / "out2", False) as other:  # another output is another matter
            fill(other)
    assert names(tmp_path) == ["out", "out2"]


RUN = """
import sys, time
from pathlib import Path
from exporter import staging
output, at = Path(sys.argv[1]), sys.argv[2]
rename, rmtree = Path.rename, staging.shutil.rmtree

def stop():
    print("ready", flush=True)
    time.sleep(60)

def stopping(self, target):
    if at == "before the swap" or (at == "amid the swap" and ".partial-" in self.name and Path(target) == output):
        stop()
    done = rename(self, target)
    if at == "after the swap" and ".partial-" in self.name:
        stop()
    return done

Path.rename = stopping
with staging.staged(output, True) as folder, staging.scratch(output, "sweep") as other:
    (folder / "shiftdc_report.json").write_text("new")
    (other / "x").write_text("x")
    if at == "at work":
        stop()
"""


def start(output: Path, at: str) -> subprocess.Popen[str]:
    """A run in a process of its own, which has come to `at`."""
    run = subprocess.Popen([sys.executable, "-c", RUN, str(output), at], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stdout.readline() == "ready\n"
    return run


@pytest.mark.parametrize(
    ("at", "then"),
    [("at work", OLD), ("before the swap", OLD), ("amid the swap", None), ("after the swap", "new")],
)
def test_killed_anywhere_and_run_again(tmp_path, at, then):
    output = earlier(tmp_path / "out")
    run = start(output, at)
    with pytest.raises(InputError, match="another run is writing"), staged(output, True):
        pass
    run.kill()
    run.wait()
    assert (output / "shiftdc_report.json").read_text() == then if then else not output.exists()
    assert len(names(tmp_path)) > 1  # leftovers
    if then is None:  # what stood there comes back, and is not replaced unasked
        with pytest.raises(InputError, match="--force to replace it"), staged(output, False):
            pass
        assert (output / "shiftdc_report.json").read_text() == OLD
    with staged(output, True) as folder:
        assert names(tmp_path) == sorted(["out", folder.name])
        fill(folder)
    assert names(tmp_path) == ["out"]
    assert (output / "shiftdc_report.json").read_text() == "new"


def test_other_outputs_leftovers_are_left_alone(tmp_path):
    for name in (".out2.partial-abcdefgh", ".out", ".out.partial"):
        (tmp_path / name).mkdir()
    with staged(tmp_path / "out", False) as folder:
        fill(folder)
    assert names(tmp_path) == [".out", ".out.partial", ".out2.partial-abcdefgh", "out"]


def test_scratch_folders_end_with_their_use(tmp_path):
    with pytest.raises(ZeroDivisionError), scratch(tmp_path / "out", "sweep") as folder:
        (folder / "x").write_text("x")
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_a_folder_that_came_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(InputError, match="is no export of this tool"), staged(tmp_path / "out", True) as folder:
        fill(folder)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert names(tmp_path) == ["out"]


class TestWriteTogether:
    def test_all_or_nothing(self, tmp_path, monkeypatch):
        write_together(tmp_path, {"assets/a": b"1", "b": "2"})
        write = Path.write_bytes

        def full(self, data):
            if self.name == "b.partial":
                write(self, data[:1])
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(self, data)

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            write_together(tmp_path, {"assets/a": b"new", "b": "new"})
        assert sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()) == ["assets/a", "b"]
        assert (tmp_path / "assets" / "a").read_bytes() + (tmp_path / "b").read_bytes() == b"12"


FULL = """
import resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from exporter.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
main(sys.argv[2:])
"""


@pytest.mark.parametrize("limit", [0, 2_000, 30_000], ids=lambda n: f"{n} bytes")
def test_a_disk_that_is_full(base_folder, calibration_file, tmp_path, limit):
    """A limit on the size of files, which the kernel reports as it does a full disk (EFBIG in place of ENOSPC)."""
    arguments = ("--layers", "1", "--calibration", calibration_file, "--quiet", "--output", tmp_path / "out", base_folder)
    command = [sys.executable, "-c", FULL, str(limit), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(f"Error: {tmp_path / 'out'} was not written (")
    assert done.stderr.endswith("see to it and run again.\n") and done.stderr.count("\n") == 1
    assert names(tmp_path) == []


def mounted(folder: Path, *options: str) -> None:
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    """Mounts a file system on a folder: disk(*options of mount)."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> Path:
        mounted(folder, *options)
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def export_to(output: Path, base: Path, calibration: Path) -> object:
    arguments = ["--layers", "1", "--calibration", calibration, "--quiet", "--output", output, base]
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_a_small_disk(base_folder, calibration_file, disk):
    folder = disk("-t", "tmpfs", "-o", "size=64k", "tmpfs")
    done = export_to(folder / "out", base_folder, calibration_file)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "No space left on device" in done.stderr
    assert names(folder) == []


def test_a_read_only_disk(base_folder, calibration_file, disk):
    folder = disk("-t", "tmpfs", "-o", "ro", "tmpfs")
    done = export_to(folder / "out", base_folder, calibration_file)
    assert done.exit_code == 2
    assert done.stderr == f"Error: --output: {folder} is read-only, or not yours to write; give a folder elsewhere.\n"


def test_a_folder_that_refuses(base_folder, calibration_file, tmp_path, monkeypatch):
    """As a read-only folder, for who may do everything and cannot mount."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    done = export_to(tmp_path / "out", base_folder, calibration_file)
    assert (done.exit_code, "is read-only" in done.stderr) == (2, True)
    monkeypatch.undo()

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(staging.tempfile, "mkdtemp", refuse)
    with pytest.raises(WriteError, match=r"was not written \(Permission denied, at .*\); see to it and run again"):
        with staged(tmp_path / "out", False):
            pass
    assert names(tmp_path) == []


def test_evaluate_on_a_disk_that_refuses(make_export, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "evaluation")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "mkdir", refuse)
    done = CliRunner().invoke(main, ["evaluate", str(make_export().plan.output), "--quiet", "--limit", "1"])
    assert done.exit_code == 1
    assert (
        done.stderr
        == "Error: the system refused to read or to write (No space left on device at evaluation); see to it and run again.\n"
    )
    assert names(tmp_path) == []


POINTS = ("load_vlm", "fit_directions", "record_probe", "bake", "render_card", "verify")
KILLED = """
import os, signal, sys
from exporter import pipeline
from exporter.cli import main
point = sys.argv[1]
whole = getattr(pipeline, point)

def dying(*arguments, **options):
    if point in ("bake", "verify"):
        whole(*arguments, **options)  # its files are there
    os.kill(os.getpid(), signal.SIGKILL)

setattr(pipeline, point, dying)
main(sys.argv[2:])
"""


def test_killed_at_every_stage_and_run_again(base_folder, calibration_file, tmp_path):
    arguments = ["--layers", "1", "--calibration", calibration_file, "--quiet", "--output", tmp_path / "out", base_folder]
    for point in POINTS:
        done = subprocess.run([sys.executable, "-c", KILLED, point, *map(str, arguments)], capture_output=True, check=False)
        assert done.returncode == -9, (point, done.stderr)
        left = names(tmp_path)
        assert len(left) == 1 and left[0].startswith(".out.partial-"), (point, left)
    done = export_to(tmp_path / "out", base_folder, calibration_file)
    assert done.exit_code == 0, done.output
    assert names(tmp_path) == ["out"]
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "out")]).exit_code == 0
