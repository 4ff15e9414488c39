"""Outputs are whole or absent: two runs at once, killed runs, full disks, read-only folders."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from exporter import pipeline, staging
from exporter.cli import main
from exporter.errors import InputError, WriteError
from exporter.staging import PURPOSES, scratch, staged, write_together

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


def child(work: Callable[[int], None]) -> tuple[int, int]:
    """A copy of this process that does `work(a pipe's end to write to)`: (process id, the other end)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(300)
        try:
            torch.set_num_threads(torch.get_num_threads())  # makes PyTorch's own threads anew, which two threads at once cannot
            work(writing)
        finally:
            os._exit(0)
    os.close(writing)
    return pid, reading


def answer(pid: int, reading: int) -> tuple[int, str]:
    """(status, what it wrote) of a child that has ended; the status of a killed one is negative."""
    with os.fdopen(reading) as stream:
        text = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def replacing(output: Path, at: str, writing: int) -> None:
    """A run that stops at a point."""
    rename = Path.rename

    def stop() -> None:
        os.write(writing, b"!")
        time.sleep(300)

    def stopping(self: Path, target: Path) -> Path:
        takes_its_place = ".partial-" in self.name and Path(target) == output
        if at == "before the swap" or (at == "amid the swap" and takes_its_place):
            stop()
        done = rename(self, target)
        if at == "after the swap" and takes_its_place:
            stop()
        return done

    Path.rename = stopping  # type: ignore[method-assign, assignment]
    with staged(output, True) as folder, scratch(output, "sweep") as other:
        fill(folder)
        (other / "x").write_text("x")
        if at == "at work":
            stop()


@pytest.mark.parametrize(
    ("at", "then"),
    [("at work", OLD), ("before the swap", OLD), ("amid the swap", None), ("after the swap", "new")],
)
def test_killed_anywhere_and_run_again(tmp_path, at, then):
    output = earlier(tmp_path / "out")
    pid, reading = child(partial(replacing, output, at))
    assert os.read(reading, 1) == b"!"
    with pytest.raises(InputError, match="another run is writing"), staged(output, True):
        pass
    os.kill(pid, signal.SIGKILL)
    assert answer(pid, reading) == (-signal.SIGKILL, "")
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


@pytest.mark.parametrize("purpose", PURPOSES)
def test_what_a_killed_run_kept_aside_is_cleaned_up(tmp_path, purpose):
    def work(writing: int) -> None:
        with scratch(tmp_path / "out", purpose) as folder:
            (folder / "x").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)

    assert answer(*child(work))[0] == -signal.SIGKILL
    assert names(tmp_path)[0].startswith(f".out.{purpose}-")
    with staged(tmp_path / "out", False) as folder:
        fill(folder)
    assert names(tmp_path) == ["out"]


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


def export_to(output: Path, base: Path, calibration: Path) -> Any:
    arguments = ["--layers", "1", "--calibration", calibration, "--quiet", "--output", output, base]
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.mark.parametrize("limit", [300, 2_000, 9_000], ids=lambda n: f"{n} bytes")
def test_a_disk_that_is_full(base_folder, calibration_file, tmp_path, limit):
    """A limit on the size of files, which the kernel reports as it does a full disk (EFBIG in place of ENOSPC)."""

    def work(writing: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        done = export_to(tmp_path / "out", base_folder, calibration_file)
        os.write(writing, f"{done.exit_code} {done.stdout}{done.stderr}".encode())

    _, text = answer(*child(work))
    assert text.startswith(f"1 Error: {tmp_path / 'out'} was not written ("), text
    assert text.endswith("see to it and run again.\n") and text.count("\n") == 1
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
    sentence = r"was not written \(Permission denied, at .*\); see to it and run again"
    with pytest.raises(WriteError, match=sentence), staged(tmp_path / "out", False):
        pass
    assert names(tmp_path) == []


def test_evaluate_on_a_disk_that_refuses(make_export, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "evaluation")

    export = make_export().plan.output
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "mkdir", refuse)
    done = CliRunner().invoke(main, ["evaluate", str(export), "--quiet", "--limit", "1"])
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: the system refused to read or to write (No space left on device at evaluation)")
    assert done.stderr.count("\n") == 1
    assert names(tmp_path) == []


POINTS = ("load_vlm", "fit_directions", "record_probe", "bake", "render_card", "verify")


def test_killed_at_every_stage_and_run_again(base_folder, calibration_file, tmp_path):
    for point in POINTS:
        whole = getattr(pipeline, point)

        def dying(*arguments: Any, point: str = point, whole: Any = whole, **options: Any) -> None:
            if point in ("bake", "verify"):
                whole(*arguments, **options)  # its files are there
            os.kill(os.getpid(), signal.SIGKILL)

        def work(writing: int, point: str = point, dying: Any = dying) -> None:
            setattr(pipeline, point, dying)
            export_to(tmp_path / "out", base_folder, calibration_file)

        assert answer(*child(work))[0] == -signal.SIGKILL, point
        left = names(tmp_path)
        assert len(left) == 1 and left[0].startswith(".out.partial-"), (point, left)
    done = export_to(tmp_path / "out", base_folder, calibration_file)
    assert done.exit_code == 0, done.output
    assert names(tmp_path) == ["out"]
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "out")]).exit_code == 0
