"""Outputs are whole or absent: two runs at once, killed runs, full disks, read-only folders."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from children import answer, child
from click.testing import CliRunner

from exporter.checkpoint import earlier as earlier_module
from exporter.checkpoint import staging
from exporter.checkpoint.earlier import PARTIAL
from exporter.checkpoint.layout import REPORT
from exporter.checkpoint.staging import PURPOSES, check_output, scratch, staged, write_together
from exporter.cli.commands import main
from exporter.errors import InputError
from exporter.pipeline import export as pipeline
from exporter.pipeline import measure
from exporter.pipeline.plan import ExportOptions, make_plan
from exporter.runtime import marker
from exporter.runtime.hashing import sha256
from exporter.runtime.marker import MARKER, is_marked, mark

OLD = "an earlier export"


def names(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir())


def fill(folder: Path, text: str = "new") -> None:
    """What counts as an export: files, and a report that lists them."""
    (folder / "assets").mkdir()
    files = {"config.json": text, "README.md": f"The card of {text}.", "assets/layers.png": "a picture"}
    for name, content in files.items():
        (folder / name).write_text(content)
    hashed = {name: hashlib.sha256(content.encode()).hexdigest() for name, content in files.items()}
    (folder / REPORT).write_text(json.dumps({"files": hashed}))


def earlier(output: Path) -> Path:
    output.mkdir()
    fill(output, OLD)
    return output


def text_of(output: Path) -> str:
    return (output / "config.json").read_text()


def tree(folder: Path) -> dict[str, str]:
    return {f.relative_to(folder).as_posix(): f.read_text() for f in folder.rglob("*") if f.is_file()}


def test_the_output_appears_at_the_end(tmp_path):
    output = tmp_path / "sub" / "out"
    with staged(output, False) as folder:
        assert folder.parent == output.parent
        fill(folder)
        assert not output.exists()
    assert names(output.parent) == ["out"]
    assert text_of(output) == "new"


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
    assert text_of(output) == then if then else not output.exists()
    assert len(names(tmp_path)) > 1  # leftovers
    if then is None:  # what stood there comes back, and is not replaced unasked
        with pytest.raises(InputError, match="--force to replace it"), staged(output, False):
            pass
        assert text_of(output) == OLD
        assert MARKER not in names(output)
    with staged(output, True) as folder:
        assert names(tmp_path) == sorted(["out", folder.name])
        fill(folder)
    assert names(tmp_path) == ["out"]
    assert text_of(output) == "new"


def test_other_outputs_leftovers_are_left_alone(tmp_path):
    others = [".out2.partial-abcdefgh", ".out", ".out.partial"]
    for name in others:
        (tmp_path / name).mkdir()
    mark(tmp_path / ".out2.partial-abcdefgh")
    with staged(tmp_path / "out", False) as folder:
        fill(folder)
    assert names(tmp_path) == sorted([*others, "out"])


@pytest.mark.parametrize("force", [False, True])
def test_folders_that_are_only_named_like_ours_are_left_alone(tmp_path, force):
    mine = [f".out.{purpose}-mine" for purpose in (*PURPOSES, "old", "before")]
    for name in mine:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
        (tmp_path / name / MARKER).write_text("mine")  # a marker is known by its words
    (tmp_path / ".out.partial-linked").symlink_to(tmp_path / ".out.partial-mine")
    if force:
        earlier(tmp_path / "out")
    with staged(tmp_path / "out", force) as folder:
        fill(folder)
    assert names(tmp_path) == sorted([*mine, ".out.partial-linked", "out"])
    assert all((tmp_path / name / "thesis.txt").read_text() == "years of work" for name in mine)


def test_ours_are_marked_from_the_start_and_outputs_are_not(tmp_path):
    earlier(tmp_path / "out")
    with staged(tmp_path / "out", True) as folder, scratch(tmp_path / "out", "sweep") as other:
        assert is_marked(folder) and is_marked(other)
        fill(folder)
    assert names(tmp_path / "out") == ["README.md", "assets", "config.json", REPORT]


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


@pytest.mark.parametrize("kind", ["partial", "replaced"])
def test_killed_amid_clearing_up_the_next_run_finds_what_to_delete(tmp_path, monkeypatch, kind):
    """The marker goes last, when nothing else is there."""
    left = []

    def killed(folder: Path) -> None:
        if folder != tmp_path / "out":
            left.append([str(f) for f in folder.rglob("*") if f.name != MARKER])
            assert is_marked(folder)

    earlier(tmp_path / "out")
    for module in (marker, staging, earlier_module):
        monkeypatch.setattr(module, "unmark", killed)
    with suppress(ZeroDivisionError), staged(tmp_path / "out", True) as folder:
        fill(folder)
        if kind == "partial":
            raise ZeroDivisionError
    assert [name for found in left for name in found if not name.endswith("/assets")] == [] and left
    monkeypatch.undo()
    with staged(tmp_path / "out", True) as folder:
        fill(folder)
    assert names(tmp_path) == ["out"]


def test_what_cannot_be_cleared_away_does_not_stop_a_run(tmp_path, monkeypatch):
    leftover = tmp_path / ".out.partial-abcdefgh"
    leftover.mkdir()
    mark(leftover)
    (leftover / "x").write_text("x")
    unlink = Path.unlink

    def refuse(self: Path, missing_ok: bool = False) -> None:
        if self == leftover / "x":
            raise PermissionError(errno.EPERM, "Operation not permitted", str(self))
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    with staged(tmp_path / "out", False) as folder:
        fill(folder)
    monkeypatch.undo()
    assert names(tmp_path) == [leftover.name, "out"] and is_marked(leftover)
    with staged(tmp_path / "out", True) as folder:
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


def write(name: str) -> Callable[[Path], object]:
    def add(output: Path) -> None:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("years of work")

    return add


#: What its owner may have put into an export, and how a refusal names it.
OF_THE_OWNER = {
    "thesis": (write("thesis.txt"), "thesis.txt"),
    "repository": (write(".git/refs/heads/main"), "(.git)"),
    "calibration set": (write("set.jsonl"), "set.jsonl"),
    "replies": (write("replies.jsonl"), "replies.jsonl"),
    "hidden": (write(".env"), ".env"),
    "among ours": (write("assets/mine.png"), "assets/mine.png"),
    "card": (write("README.md"), "README.md (changed since)"),
    "weights": (write("config.json"), "config.json (changed since)"),
    "empty folder": (lambda out: (out / "plans").mkdir(), "plans"),
    "link": (lambda out: (out / "more").symlink_to("/etc"), "more"),
    "link in the place of ours": (
        lambda out: ((out / "config.json").rename(out.parent / "c"), (out / "config.json").symlink_to(out.parent / "c")),
        "config.json",
    ),
    "another tool's marker": (lambda out: (write("x/thesis")(out), write(f"x/{MARKER}")(out)), "(x)"),
}


class TestNothingOfTheOwnerIsLost:
    @pytest.mark.parametrize("what", OF_THE_OWNER)
    def test_it_is_refused_by_name_before_anything_is_done(self, tmp_path, what):
        add, named = OF_THE_OWNER[what]
        output = earlier(tmp_path / "out")
        add(output)
        before = tree(output)
        with pytest.raises(InputError, match=re.escape(named) + r".*; move that away, or give another folder\.$"):
            check_output(output, True)
        with pytest.raises(InputError), staged(output, True):
            raise AssertionError
        assert tree(output) == before
        assert names(tmp_path) == ["c", "out"] if "in the place" in what else ["out"]

    def test_before_a_model_is_even_looked_for(self, tmp_path):
        write("thesis.txt")(earlier(tmp_path / "out"))
        with pytest.raises(InputError, match="thesis"):
            make_plan("someone/nothing", ExportOptions.of(output=tmp_path / "out", force=True))

    @pytest.mark.parametrize("report", ["{", "[]", "{}", '{"files": ["x"]}', '{"files": {"x": 1}}'])
    def test_a_report_that_lists_nothing(self, tmp_path, report):
        output = earlier(tmp_path / "out")
        (output / REPORT).write_text(report)
        with pytest.raises(InputError, match="does not tell which files are the export's"):
            check_output(output, True)

    def test_what_killed_runs_left_in_it_is_ours(self, tmp_path):
        output = earlier(tmp_path / "out")
        (output / f"README.md{PARTIAL}").write_text("half a card")
        (output / ".onnx.partial-abcdefgh").mkdir()
        mark(output / ".onnx.partial-abcdefgh")
        (output / ".onnx.partial-abcdefgh" / "x.onnx").write_text("half a graph")
        with staged(output, True) as folder:
            fill(folder)
        assert names(tmp_path) == ["out"] and text_of(output) == "new"

    def test_content_that_another_name_keeps_may_go(self, tmp_path):
        """As a shard that is a link of a Hub cache: it need not be read."""
        output = earlier(tmp_path / "out")
        os.link(output / "config.json", tmp_path / "blob")
        (tmp_path / "blob").write_text("another")
        with staged(output, True) as folder:
            fill(folder)
        assert (tmp_path / "blob").read_text() == "another"

    def test_files_are_hashed_once(self, tmp_path, monkeypatch):
        hashed = []
        monkeypatch.setattr("exporter.checkpoint.earlier.sha256", lambda file: hashed.append(file.name) or sha256(file))
        output = earlier(tmp_path / "out")
        check_output(output, True)
        with staged(output, True) as folder:
            fill(folder)
        assert sorted(hashed) == ["README.md", "config.json", "layers.png"]

    def test_what_comes_while_it_is_at_work_stops_it(self, tmp_path):
        output = earlier(tmp_path / "out")
        with pytest.raises(InputError, match=r"thesis\.txt"), staged(output, True) as folder:
            fill(folder)
            write("thesis.txt")(output)
        assert names(tmp_path) == ["out"] and text_of(output) == OLD

    @pytest.mark.parametrize("at", ["before the swap", "after the swap"])
    @pytest.mark.parametrize("name", ["thesis.txt", "README.md", "assets/mine.png"])
    def test_what_comes_amid_the_swap_is_kept_beside(self, tmp_path, monkeypatch, caplog, at, name):
        output = earlier(tmp_path / "out")
        rename = Path.rename

        def busy(self: Path, target: Path) -> Path:
            if at == "before the swap" and self == output:
                write(name)(output)
            done = rename(self, target)
            if at == "after the swap" and self == output:
                write(name)(target)  # who has the folder open goes on writing there
            return done

        monkeypatch.setattr(Path, "rename", busy)
        with staged(output, True) as folder:
            fill(folder)
        monkeypatch.undo()
        kept = next(f for f in tmp_path.iterdir() if f.name.startswith(".out.before-"))
        assert tree(kept) == {name: "years of work"}
        assert text_of(output) == "new"
        assert f"{output} is in place" in caplog.text and f"({name}); they are in {kept}" in caplog.text
        with staged(output, True) as folder:  # and the next run leaves it there
            fill(folder, "newer")
        assert tree(kept) == {name: "years of work"} and text_of(output) == "newer"

    def test_what_comes_into_an_empty_folder_is_kept_beside(self, tmp_path, monkeypatch):
        output = tmp_path / "out"
        output.mkdir()
        monkeypatch.setattr(staging, "mark", lambda folder: write("thesis.txt")(folder) if folder == output else mark(folder))
        with staged(output, False) as folder:
            fill(folder)
        assert [tree(f) for f in tmp_path.iterdir() if f != output] == [{"thesis.txt": "years of work"}]

    def test_what_cannot_be_deleted_is_told(self, tmp_path, monkeypatch, caplog):
        output = earlier(tmp_path / "out")
        unlink = Path.unlink

        def refuse(self: Path, missing_ok: bool = False) -> None:
            if self.name == "layers.png":
                raise PermissionError(errno.EPERM, "Operation not permitted", str(self))
            unlink(self, missing_ok)

        monkeypatch.setattr(Path, "unlink", refuse)
        with staged(output, True) as folder:
            fill(folder)
        assert text_of(output) == "new"
        (kept,) = (f for f in tmp_path.iterdir() if f != output)
        assert names(kept) == ["assets"]
        assert caplog.messages == [
            f"{output} is in place. Of what it replaced, some files cannot be deleted, or were no part of it "
            f"(assets/layers.png); they are in {kept}."
        ]

    def test_a_folder_that_cannot_be_changed_is_refused_first(self, tmp_path, monkeypatch):
        output = earlier(tmp_path / "out")
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != output)
        with pytest.raises(InputError, match="is read-only, so it cannot be replaced; give another folder"):
            check_output(output, True)


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


@pytest.fixture
def on_ram(disk):
    """The disk, with the output on it mounted: mount(name, *options) -> the folder."""
    folder = disk("-t", "tmpfs", "tmpfs")
    mounts = []

    def mount(name: str, *options: str) -> Path:
        (folder / name).mkdir(exist_ok=True)
        mounted(folder / name, *options)
        mounts.append(folder / name)
        return folder / name

    yield mount
    for at in reversed(mounts):
        subprocess.run(["umount", "-l", str(at)], capture_output=True, check=False)


REMEDY = (
    r"^--output: .*/a b is a mount point, and a finished export takes its place as a whole; "
    r"give a folder below it, as .*/a b/model\.$"
)


@pytest.mark.parametrize("kind", ["another disk", "the same disk", "a small file system in an export"])
def test_a_mount_point_is_refused_before_anything_is_done(on_ram, tmp_path, kind):
    """As of `docker run -v host:/out`. A blank in the name, which the kernel's table writes as \\040."""
    if kind == "the same disk":  # where the device's number does not tell
        other = on_ram("other", "-t", "tmpfs", "tmpfs")
        (other / "a b").mkdir()
        (other / "host").mkdir()
        mounted(other / "a b", "--bind", str(other / "host"))
        output = other / "a b"
    else:
        output = on_ram("a b", "-t", "tmpfs", "tmpfs")
    if kind.startswith("a small"):
        fill(output)
    for force in (False, True):
        with pytest.raises(InputError, match=REMEDY):
            check_output(output, force)
        with pytest.raises(InputError, match=REMEDY), staged(output, force):
            raise AssertionError
    with staged(output / "model", False) as folder:
        fill(folder)
    assert text_of(output / "model") == "new"


def test_a_mount_point_for_who_cannot_mount(tmp_path, monkeypatch):
    (tmp_path / "a b").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "a b")
    with pytest.raises(InputError, match=REMEDY):
        make_plan("someone/nothing", ExportOptions.of(output=tmp_path / "a b"))
    monkeypatch.undo()
    (tmp_path / "mountinfo").write_text(f"36 35 98:0 /host {tmp_path}/a\\040b rw,noatime - ext4 /dev/root rw\n")
    monkeypatch.setattr("exporter.runtime.mounts.TABLE", tmp_path / "mountinfo")
    with pytest.raises(InputError, match=REMEDY):
        make_plan("someone/nothing", ExportOptions.of(output=tmp_path / "a b"))


def test_a_place_that_cannot_hold_folders(base_folder, calibration_file, disk):
    """A file system without folders; and one of which a part is refused, so that what was made goes again."""
    folder = disk("-t", "mqueue", "none")
    done = export_to(folder / "out", base_folder, calibration_file)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(f"Error: --output: no folder can be made at {folder / 'out'} (Operation not permitted, at ")
    assert names(folder) == []


@pytest.mark.parametrize("call", ["mkdtemp", "chmod", "write_text", "open"])
def test_a_place_that_takes_half_of_it(base_folder, calibration_file, tmp_path, monkeypatch, call):
    """Folders and no files, or no modes, as of some network shares."""
    whole = {"mkdtemp": staging.tempfile.mkdtemp, "chmod": Path.chmod, "write_text": Path.write_text, "open": os.open}

    def refuse(*arguments: Any, **options: Any) -> Any:
        if ".partial-" in f"{arguments[:1]}{options.get('prefix')}":
            raise OSError(errno.EPERM, "Operation not permitted")
        return whole[call](*arguments, **options)

    monkeypatch.setattr({"mkdtemp": staging.tempfile, "open": os}.get(call, Path), call, refuse)
    done = export_to(tmp_path / "sub" / "out", base_folder, calibration_file)
    assert done.exit_code == 2, done.stderr
    assert done.stderr.startswith(
        f"Error: --output: no folder can be made at {tmp_path / 'sub' / 'out'} (Operation not permitted)"
    )
    monkeypatch.undo()
    assert names(tmp_path) == []


def test_a_folder_that_refuses(base_folder, calibration_file, tmp_path, monkeypatch):
    """As a read-only folder, for who may do everything and cannot mount."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    done = export_to(tmp_path / "out", base_folder, calibration_file)
    assert (done.exit_code, "is read-only" in done.stderr) == (2, True)
    monkeypatch.undo()

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(staging.tempfile, "mkdtemp", refuse)
    sentence = r"^--output: no folder can be made at .*out \(Permission denied, at .*\); give a folder elsewhere\.$"
    with pytest.raises(InputError, match=sentence), staged(tmp_path / "out", False):
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


#: What a run calls, and the module that calls it.
POINTS = {
    "load_vlm": measure,
    "fit_directions": measure,
    "record_probe": measure,
    "bake": pipeline,
    "render_card": pipeline,
    "verify": pipeline,
}


def test_killed_at_every_stage_and_run_again(base_folder, calibration_file, tmp_path):
    for point, module in POINTS.items():
        whole = getattr(module, point)

        def dying(*arguments: Any, point: str = point, whole: Any = whole, **options: Any) -> None:
            if point in ("bake", "verify"):
                whole(*arguments, **options)  # its files are there
            os.kill(os.getpid(), signal.SIGKILL)

        def work(writing: int, module: Any = module, point: str = point, dying: Any = dying) -> None:
            setattr(module, point, dying)
            export_to(tmp_path / "out", base_folder, calibration_file)

        assert answer(*child(work))[0] == -signal.SIGKILL, point
        left = names(tmp_path)
        assert len(left) == 1 and left[0].startswith(".out.partial-"), (point, left)
    done = export_to(tmp_path / "out", base_folder, calibration_file)
    assert done.exit_code == 0, done.output
    assert names(tmp_path) == ["out"]
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "out")]).exit_code == 0
