"""Which places can be an output, what is told of the others, and what becomes of folders whose renaming fails."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

import pytest
from safetensors import SafetensorError
from test_staging import OLD, earlier, fill, names, text_of

from exporter.checkpoint import staging
from exporter.checkpoint.earlier import NOTHING, Stamp
from exporter.checkpoint.layout import REPORT
from exporter.checkpoint.staging import NAME_BYTES, check_output, replaced, scratch, staged, write_together
from exporter.errors import InputError, WriteError
from exporter.runtime.locks import in_use, release, try_lock
from exporter.runtime.marker import MARKER, is_marked, mark


def refused(output: Path, force: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        check_output(output, force)
    return str(caught.value)


class TestPlaces:
    @pytest.mark.parametrize("force", [False, True])
    def test_free_ones(self, tmp_path, force):
        (tmp_path / "empty").mkdir()
        for output in (tmp_path / "empty", tmp_path / "new", tmp_path / "a" / "b" / "new"):
            assert check_output(output, force) is NOTHING
        assert names(tmp_path) == ["empty"]

    def test_an_earlier_export(self, tmp_path):
        output = earlier(tmp_path / "out")
        assert refused(output) == f"--output: {output} exists; give another folder, or --force to replace it."
        found = check_output(output, True)
        assert found.ours.keys() == {"config.json", "README.md", "assets/layers.png", REPORT} and found.others == ()
        assert found.ours["config.json"] == Stamp.of((output / "config.json").stat())

    @pytest.mark.parametrize("kind", ["file", "folder"])
    @pytest.mark.parametrize("force", [False, True])
    def test_somebody_elses(self, tmp_path, kind, force):
        output = tmp_path / "out"
        if kind == "folder":
            output.mkdir()
        (output if kind == "file" else output / "thesis.txt").write_text("years of work")
        assert refused(output, force) == f"--output: {output} exists and is no export of this tool; give another folder."

    def test_names_that_leave_room_for_those_of_siblings(self, tmp_path):
        fits = tmp_path / ("é" * ((NAME_BYTES - 1) // 2)).ljust(NAME_BYTES - (NAME_BYTES - 1) // 2, "x")
        assert len(os.fsencode(fits.name)) == NAME_BYTES
        with staged(fits, False) as folder:
            fill(folder)
        assert names(tmp_path) == [fits.name]
        for name in (f"{fits.name}x", "a\0b"):
            sentence = f"--output: {tmp_path / name} is no usable name; give one of at most {NAME_BYTES} bytes."
            assert refused(tmp_path / name) == sentence

    def test_a_null_character_above(self, tmp_path):
        assert "is no usable name" in refused(tmp_path / "a\0b" / "out")

    def test_links(self, tmp_path):
        (tmp_path / "folder").mkdir()
        link = tmp_path / "link"
        link.symlink_to(tmp_path / "folder")
        assert refused(link) == f"--output: {link} is a symbolic link; give the folder that it stands for."
        assert check_output(link / "out", False) is NOTHING  # that it lies behind one does no harm

    def test_below_a_file(self, tmp_path):
        (tmp_path / "file").write_text("x")
        output = tmp_path / "file" / "a" / "out"
        assert refused(output) == f"--output: {output} lies below {tmp_path / 'file'}, which is no folder; give another folder."

    def test_a_name_above_that_is_too_long(self, tmp_path):
        output = tmp_path / ("x" * 300) / "out"
        assert refused(output) == f"--output: {output} cannot be used (File name too long); give another folder."

    @pytest.mark.parametrize("force", [False, True])
    @pytest.mark.parametrize("missing", [os.W_OK, os.X_OK])
    def test_rights(self, tmp_path, monkeypatch, missing, force):
        """Of the nearest folder that is there; and of an earlier export, the content of which is to go."""
        allowed: dict[Path, int] = {}
        monkeypatch.setattr(os, "access", lambda path, mode: not mode & ~allowed.get(Path(path), os.W_OK | os.X_OK))
        allowed[tmp_path] = (os.W_OK | os.X_OK) & ~missing
        for output in (tmp_path / "out", tmp_path / "a" / "out"):
            assert refused(output, force) == (
                f"--output: {tmp_path} is read-only, or not yours to write; give a folder elsewhere."
            )
        output = earlier(tmp_path / "out")
        allowed = {output: (os.W_OK | os.X_OK) & ~missing}
        sentence = f"--output: {output} is read-only, so it cannot be replaced; give another folder."
        assert refused(output, True) == sentence

    def test_a_relative_path(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with staged(Path("sub/../out"), False) as folder:
            assert folder.parent == tmp_path
            fill(folder)
        assert names(tmp_path) == ["out"]

    def test_a_mount_point(self, tmp_path, monkeypatch):
        (tmp_path / "out").mkdir()
        monkeypatch.setattr(staging, "is_mount_point", lambda place: place == tmp_path / "out")
        assert refused(tmp_path / "out") == (
            f"--output: {tmp_path / 'out'} is a mount point, and a finished export takes its place as a whole; "
            f"give a folder below it, as {tmp_path / 'out' / 'model'}."
        )
        assert check_output(tmp_path / "out" / "model", False) is NOTHING

    def test_what_was_changed_in_an_earlier_export(self, tmp_path):
        output = earlier(tmp_path / "out")
        for number in range(5):
            (output / f"mine{number}").write_text("x")
        assert refused(output, True) == (
            f"--output: {output} holds what is no part of the export there (mine0, mine1, mine2 and 2 more); "
            "move that away, or give another folder."
        )

    def test_a_report_that_cannot_be_read(self, tmp_path):
        output = earlier(tmp_path / "out")
        (output / REPORT).write_text("{}")
        assert refused(output, True) == (
            f"--output: the {REPORT} in {output} does not tell which files are the export's (it has no list of files); "
            "give another folder."
        )


class TestWhatTheSystemRefuses:
    @pytest.mark.parametrize(
        ("error", "told"),
        [
            (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "No space left on device, at /a/b"),
            (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
            (OSError("unpacking failed"), "unpacking failed"),
            (SafetensorError("io: No space"), "io: No space"),
        ],
    )
    @pytest.mark.parametrize("kind", ["staged", "replaced"])
    def test_at_work(self, tmp_path, error, told, kind):
        output = tmp_path / "out"
        folder = staged(output, False) if kind == "staged" else replaced(output, lambda: NOTHING)
        with pytest.raises(WriteError) as caught, folder:
            raise error
        assert str(caught.value) == f"{output} was not written ({told}); see to it and run again."
        assert caught.value.__cause__ is error and names(tmp_path) == []

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
    @pytest.mark.parametrize("call", ["mkdir", "mkdtemp"])
    def test_a_disk_that_is_full_from_the_start(self, tmp_path, monkeypatch, number, call):
        with pytest.raises(WriteError, match=r"was not written \(full, at /x\)"):
            self.refusing(tmp_path, monkeypatch, call, OSError(number, "full", "/x"))

    @pytest.mark.parametrize("call", ["mkdir", "mkdtemp"])
    @pytest.mark.parametrize(
        ("error", "told"),
        [
            (OSError(errno.EPERM, "Operation not permitted", "/x"), "Operation not permitted, at /x"),
            (OSError(errno.EPERM, "Operation not permitted"), "Operation not permitted"),
            (OSError("no"), "no"),
        ],
    )
    def test_a_place_that_takes_no_folder(self, tmp_path, monkeypatch, call, error, told):
        with pytest.raises(InputError) as caught:
            self.refusing(tmp_path, monkeypatch, call, error)
        output = tmp_path / "a" / "out"
        assert str(caught.value) == f"--output: no folder can be made at {output} ({told}); give a folder elsewhere."
        assert caught.value.__cause__ is error

    def refusing(self, tmp_path, monkeypatch, call, error):
        def refuse(*_, **__):
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(Path if call == "mkdir" else staging.tempfile, call, refuse)
            with staged(tmp_path / "a" / "out", False):
                raise AssertionError
        assert names(tmp_path) == []

    @pytest.mark.parametrize("call", ["mark", "try_lock", "chmod"])
    def test_half_a_folder_is_none(self, tmp_path, monkeypatch, call):
        def refuse(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(Path if call == "chmod" else staging, call, refuse)
        with pytest.raises(KeyboardInterrupt), scratch(tmp_path / "out", "sweep"):
            raise AssertionError
        assert names(tmp_path) == []


class TestSiblings:
    def test_others_may_read_what_is_exported(self, tmp_path):
        with staged(tmp_path / "out", False) as folder:
            fill(folder)
        assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755

    @pytest.mark.parametrize("kind", ["partial", "sweep"])
    def test_it_is_in_use_while_it_is_written(self, tmp_path, kind):
        output = tmp_path / "out"
        with staged(output, False) if kind == "partial" else scratch(output, kind) as folder:
            assert re.fullmatch(rf"\.out\.{kind}-\w{{8}}", folder.name) and folder.parent == tmp_path
            assert in_use(folder) and is_marked(folder)
            (folder / "x").write_text("x")
        assert not in_use(output) and not in_use(folder)

    def test_a_run_that_ended_is_not_waited_for(self, tmp_path):
        for end in (None, ZeroDivisionError):
            for make in (lambda: staged(tmp_path / "out", True), lambda: scratch(tmp_path / "out", "sweep")):
                before = os.listdir("/proc/self/fd")
                with pytest.raises(ZeroDivisionError), make():
                    raise end or ZeroDivisionError
                assert os.listdir("/proc/self/fd") == before  # its lock is let go

    @pytest.mark.parametrize("name", [".out.partial-abcdefgh", ".out.verify-abcdefgh", "out"])
    def test_another_run_is_alive(self, tmp_path, name):
        """It holds the lock of its sibling, and of its output once it has swapped."""
        folder = tmp_path / name
        folder.mkdir()
        mark(folder)
        if name == "out":
            (folder / MARKER).unlink()
        lock = try_lock(folder)
        output = tmp_path / "out"
        with pytest.raises(InputError) as caught, staged(output, False):
            raise AssertionError
        release(lock)
        assert str(caught.value) == (
            f"--output: another run is writing to {output} now; wait for its end, or give another folder."
        )
        with staged(output, False) as made:
            fill(made)
        assert names(tmp_path) == ["out"]

    def test_a_lock_on_a_folder_of_another_output(self, tmp_path):
        folder = tmp_path / ".out2.partial-abcdefgh"
        folder.mkdir()
        mark(folder)
        lock = try_lock(folder)
        with staged(tmp_path / "out", False) as made:
            fill(made)
        release(lock)
        assert names(tmp_path) == [folder.name, "out"]

    def test_a_folder_above_that_another_run_makes_meanwhile(self, tmp_path, monkeypatch):
        missing = staging._missing

        def made_by_another(folder):
            found = missing(folder)
            folder.mkdir(parents=True, exist_ok=True)
            return found

        monkeypatch.setattr(staging, "_missing", made_by_another)
        with staged(tmp_path / "a" / "b" / "out", False) as folder:
            fill(folder)
        assert names(tmp_path / "a" / "b") == ["out"]


class TestReplaced:
    def test_what_is_there_is_looked_at_before_and_after(self, tmp_path):
        output = earlier(tmp_path / "onnx")
        looked = []

        def check():
            looked.append(text_of(output))
            return check_output(output, True)

        with replaced(output, check) as folder:
            fill(folder)
            assert text_of(output) == OLD and looked == [OLD] * 2
        assert text_of(output) == "new" and looked == [OLD] * 3
        assert names(tmp_path) == ["onnx"]

    @pytest.mark.parametrize("when", [1, 2, 3])
    def test_it_may_not_be_replaced(self, tmp_path, when):
        output = earlier(tmp_path / "onnx")
        looks = []

        def check():
            looks.append(1)
            if len(looks) == when:
                raise InputError("not mine")
            return NOTHING

        with pytest.raises(InputError, match="not mine"), replaced(output, check):
            assert when == 3
        assert text_of(output) == OLD and names(tmp_path) == ["onnx"]


class TestSwap:
    def test_a_new_export_that_cannot_take_its_place(self, tmp_path, monkeypatch):
        """What stood there stands there again, and is nobody's leftover."""
        output, rename = earlier(tmp_path / "out"), Path.rename

        def refuse(self, target):
            if ".partial-" in self.name:
                raise OSError(errno.EBUSY, "Device or resource busy", str(self))
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", refuse)
        with pytest.raises(WriteError, match="Device or resource busy"), staged(output, True) as folder:
            fill(folder)
        assert text_of(output) == OLD and not (output / MARKER).exists() and names(tmp_path) == ["out"]

    def test_what_is_moved_away_is_marked_until_it_is_gone(self, tmp_path, monkeypatch):
        """So that the next run puts it back, if this one is killed between the two steps."""
        output, rename, seen = earlier(tmp_path / "out"), Path.rename, []

        def watch(self, target):
            seen.append((self.name.split("-")[0], is_marked(self), Path(target).name.split("-")[0]))
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", watch)
        with staged(output, True) as folder:
            fill(folder)
        assert seen == [
            ("out", True, ".out.old"), (".out.partial", True, "out"), (".out.old", True, ".out.before")
        ]  # fmt: skip
        assert not (output / MARKER).exists()

    def test_an_earlier_export_that_takes_no_marker(self, tmp_path, monkeypatch):
        output = earlier(tmp_path / "out")

        def refuse(folder):
            if folder == output:
                raise OSError(errno.EROFS, "Read-only file system")
            mark(folder)

        monkeypatch.setattr(staging, "mark", refuse)
        with staged(output, True) as folder:
            fill(folder)
        assert text_of(output) == "new" and names(tmp_path) == ["out"]

    @pytest.mark.parametrize("there", [True, False])
    def test_what_a_killed_run_had_moved_away(self, tmp_path, there):
        """It comes back, unless the new export has taken its place."""
        old, output = tmp_path / ".out.old-abcdefgh", tmp_path / "out"
        earlier(old)
        mark(old)
        if there:
            output.mkdir()
            fill(output, "newer")
        with pytest.raises(InputError, match="--force"), staged(output, False):
            raise AssertionError
        if not there:
            assert text_of(output) == OLD and not is_marked(output)
        with pytest.raises(ZeroDivisionError), staged(output, True):
            raise ZeroDivisionError
        assert names(tmp_path) == ["out"] and text_of(output) == ("newer" if there else OLD)

    @pytest.mark.parametrize("purpose", ["old", "before"])
    def test_what_a_killed_run_had_begun_to_delete(self, tmp_path, caplog, purpose):
        """Without its report nothing in it is known to be the tool's; what is left is told once, and never touched again."""
        gone = tmp_path / f".out.{purpose}-abcdefgh"
        gone.mkdir()
        (gone / "thesis.txt").write_text("years of work")
        mark(gone)
        earlier(tmp_path / "out")
        with staged(tmp_path / "out", True) as folder:
            fill(folder)
        kept = tmp_path / ".out.before-abcdefgh"
        assert caplog.messages == [
            f"{tmp_path / 'out'} is in place. Of what it replaced, some files cannot be deleted, or were no part of it "
            f"(thesis.txt); they are in {kept}."
        ]
        assert names(kept) == ["thesis.txt"] and names(tmp_path) == [kept.name, "out"]


class TestWriteTogether:
    def test_contents(self, tmp_path):
        write_together(tmp_path, {"a/b/c": "é", "d": b"\xff"})
        assert (tmp_path / "a" / "b" / "c").read_bytes() == "é".encode() and (tmp_path / "d").read_bytes() == b"\xff"
        write_together(tmp_path, {"a/b/c": "new"})
        assert (tmp_path / "a" / "b" / "c").read_text() == "new"
        assert names(tmp_path) == ["a", "d"] and names(tmp_path / "a" / "b") == ["c"]

    def test_they_are_put_in_place_in_their_order_once_all_are_written(self, tmp_path, monkeypatch):
        moved, replace = [], Path.replace

        def watch(self, target):
            moved.append(target.name)
            assert {"z", "a"} <= {f.name.removesuffix(".partial") for f in tmp_path.iterdir()}
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", watch)
        write_together(tmp_path, {"z": "1", "a": "2"})
        assert moved == ["z", "a"]

    def test_an_interruption_leaves_nothing(self, tmp_path, monkeypatch):
        (tmp_path / "a").write_text("before")
        write = Path.write_bytes

        def interrupted(self, data):
            write(self, data)
            if self.name == "b.partial":
                raise KeyboardInterrupt

        monkeypatch.setattr(Path, "write_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_together(tmp_path, {"a": "1", "b": "2", "c": "3"})
        assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "before"
