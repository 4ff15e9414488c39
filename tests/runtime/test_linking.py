"""Writing into an export never changes the base: clones, links to a Hub cache that are read-only, copies."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.checkpoint.bake import Baked, bake
from exporter.checkpoint.calibrated import Calibrated
from exporter.checkpoint.layout import REPORT
from exporter.cli.console import export_text
from exporter.directions.directions import Directions
from exporter.modeling.configuration_shiftdc import ShiftDCTraits
from exporter.modeling.prompts_shiftdc import PromptFrame
from exporter.models.base import resolve
from exporter.models.recipe import load_recipe
from exporter.pipeline import export as pipeline
from exporter.pipeline.plan import ExportOptions, make_plan, plan_needs, text_config
from exporter.runtime import linking as placing
from exporter.runtime.linking import SHARED, is_hub_blob, link_or_copy, symlink_or_copy, will_be_linked

SHARD = "model-00001-of-00002.safetensors"

#: Of prompts that are never made.
FRAME = PromptFrame(((),), (), (), (), (), (((), (), False),), ((),), ("", ""), "", "", False)
TRAITS = ShiftDCTraits("model.language_model.layers", 64, "vision_feature_select_strategy", image_token_id=4)


@pytest.fixture
def shared_snapshot(hub_snapshot: Path) -> Path:
    """As the Hub's client keeps files of several repositories once: a repository's blobs are links to those of the cache."""
    store = hub_snapshot.parent.parent.parent / "blobs"
    (store / "ab").mkdir(parents=True)
    (store / SHARED).write_text("1\n")
    blob = (hub_snapshot / "model.safetensors").resolve()
    name = "ab" + blob.name[2:]
    blob.rename(store / "ab" / name)
    blob.symlink_to(Path("..") / ".." / "blobs" / "ab" / name)
    return hub_snapshot


def baked(base: Path | str, folder: Path) -> Baked:
    """What an export writes, without a model that is loaded."""
    checkpoint, layers = resolve(str(base)), (1,)
    hidden = int(text_config(checkpoint)["hidden_size"])
    unit = torch.nn.functional.normalize(torch.ones(1, hidden), dim=-1)
    folder.mkdir()
    directions = Directions(layers, unit, torch.ones(1), ())
    return bake(checkpoint, Calibrated(load_recipe("llava"), directions, layers, FRAME, TRAITS), folder)


def in_place(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"!")


def saved_over(file: Path) -> None:
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)


def saved_over_in_place(file: Path) -> None:
    """As older releases of safetensors do."""
    other = file.with_suffix(".other")
    save_file({name: value + 1 for name, value in load_file(file).items()}, other)
    file.write_bytes(other.read_bytes())


@pytest.mark.parametrize("change", [in_place, saved_over, saved_over_in_place])
def test_writing_into_an_export_leaves_its_base_alone(base_folder, tmp_path, change):
    base = shutil.copytree(base_folder, tmp_path / "base")
    before = (base / "model.safetensors").read_bytes()
    assert baked(base, tmp_path / "out").placed == {"copy": len(before)}
    assert (tmp_path / "out" / SHARD).read_bytes() == before
    change(tmp_path / "out" / SHARD)
    assert (tmp_path / "out" / SHARD).read_bytes() != before
    assert (base / "model.safetensors").read_bytes() == before


def test_what_was_done_and_what_it_cost_is_said(make_export, base_folder):
    done, size = make_export(), (base_folder / "model.safetensors").stat().st_size
    assert done.report.base_model.placed == {"copy": size}
    assert json.loads((done.plan.output / REPORT).read_text())["base_model"]["placed"] == {"copy": size}

    def said(way: str) -> str:
        base = done.report.base_model.model_copy(update={"placed": {way: 14_600_000_000}})
        return export_text(replace(done, report=done.report.model_copy(update={"base_model": base})))

    assert "  weights copied: 14.60 GB of new files\n" in said("copy")
    assert "  weights linked to the Hub cache: 14.60 GB that take no room, read-only there and here\n" in said("link")
    assert "  weights cloned by the file system: 14.60 GB that take no room until they are changed\n" in said("clone")


def test_the_packaged_demo_model_is_copied(tmp_path):
    shard = resolve("demo").shards[0]
    assert link_or_copy(shard, tmp_path / "shard") in ("copy", "clone")
    assert not (tmp_path / "shard").samefile(shard)
    in_place(tmp_path / "shard")
    assert hashlib.sha256(shard.read_bytes()).digest() != hashlib.sha256((tmp_path / "shard").read_bytes()).digest()


NOBODY = 65534


def as_nobody(work: Callable[[], object]) -> str:
    """The name of what `work` raises, in a copy of this process that may not write everything."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.setuid(NOBODY)
            work()
            os.write(writing, b"nothing")
        except OSError as error:
            os.write(writing, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        found = stream.read()
    os.waitpid(pid, 0)
    return found


@pytest.mark.parametrize("kept", ["by the repository", "for several"])
def test_files_of_a_hub_cache_are_linked_and_read_only(request, calibration_file, tmp_path, kept):
    base = request.getfixturevalue("hub_snapshot" if kept == "by the repository" else "shared_snapshot")
    blob = (base / "model.safetensors").resolve()
    before = blob.read_bytes()
    if os.geteuid() == 0:
        os.chown(blob, NOBODY, -1)
    needed = plan_needs(
        make_plan(str(base), ExportOptions.of(output=tmp_path / "a" / "out", layers="1", calibration=str(calibration_file)))
    )
    assert needed.copied == 0 and needed.disk < 10**6
    assert baked(base, tmp_path / "out").placed == {"link": len(before)}
    shard = tmp_path / "out" / SHARD
    assert shard.samefile(blob) and not shard.is_symlink()
    assert not blob.stat().st_mode & 0o222
    if os.geteuid() == 0:
        held = os.open(shard, os.O_RDONLY)
        at = f"/proc/self/fd/{held}"  # not by its path, of which some folders are root's alone
        assert as_nobody(lambda: os.open(at, os.O_RDONLY)) == "nothing"
        assert as_nobody(lambda: os.open(at, os.O_RDWR)) == "PermissionError"
        os.close(held)
    else:
        with pytest.raises(PermissionError):
            in_place(shard)
    saved_over(shard)  # a new file under the same name
    assert blob.read_bytes() == before
    shutil.rmtree(tmp_path / "out")  # nothing is in the way of its end
    assert blob.read_bytes() == before


class TestPlace:
    @pytest.fixture
    def blob(self, hub_snapshot):
        return hub_snapshot / "model.safetensors"

    def test_clones_come_first(self, blob, tmp_path, monkeypatch):
        monkeypatch.setattr(placing, "_cloned", lambda source, target: bool(shutil.copyfile(source, target)))
        assert link_or_copy(blob, tmp_path / "x") == "clone"
        assert blob.resolve().stat().st_mode & 0o200  # nothing is shared that could be written

    @pytest.mark.parametrize("error", placing.NO_LINK)
    def test_a_copy_where_links_are_impossible(self, blob, tmp_path, monkeypatch, error):
        def refuse(*_: object) -> None:
            raise OSError(error, "no link")

        monkeypatch.setattr(os, "link", refuse)
        assert link_or_copy(blob, tmp_path / "x") == "copy"
        assert (tmp_path / "x").read_bytes() == blob.read_bytes()

    def test_a_copy_where_the_blob_stays_writable(self, blob, tmp_path, monkeypatch):
        """As of a cache of somebody else, or on a file system without modes."""

        def refuse(*_: object) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(Path, "chmod", refuse)
        assert link_or_copy(blob, tmp_path / "x") == "copy"
        assert not (tmp_path / "x").samefile(blob)

    def test_a_copy_of_somebody_else_s_writable_blob(self, blob, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "geteuid", lambda: blob.stat().st_uid + 1)
        assert not will_be_linked(blob, tmp_path)
        assert link_or_copy(blob, tmp_path / "x") == "copy"

    def test_other_errors_are_not_hidden(self, blob, tmp_path, monkeypatch):
        def refuse(*_: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "link", refuse)
        with pytest.raises(OSError, match="Input/output"):
            link_or_copy(blob, tmp_path / "x")

    @pytest.mark.parametrize(
        "name",
        ["blobs/" + "a" * 64, "models--a--b/blobs/model.safetensors", "models--a--b/other/" + "a" * 64, "blobs/aa/" + "a" * 64],
    )
    def test_what_only_looks_like_a_cache(self, tmp_path, name):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("x")
        assert not is_hub_blob(tmp_path / name)
        assert link_or_copy(tmp_path / name, tmp_path / "x") == "copy"

    def test_what_is_lent_takes_no_room(self, blob, tmp_path, monkeypatch):
        symlink_or_copy(blob, tmp_path / "x")
        assert (tmp_path / "x").is_symlink() and (tmp_path / "x").resolve() == blob.resolve()
        monkeypatch.setattr(Path, "symlink_to", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no")))
        symlink_or_copy(blob, tmp_path / "y")
        assert (tmp_path / "y").read_bytes() == blob.read_bytes()


def test_a_sweep_lends_the_shards(base_folder, calibration_file, tmp_path, monkeypatch):
    def look(folder: Path, *_: object, **__: object) -> None:
        assert (folder / SHARD).is_symlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "load_calibrated", look)
    options = {"layers": "1", "calibration": str(calibration_file), "strength": "auto"}
    with pytest.raises(KeyboardInterrupt):
        pipeline.export(make_plan(str(base_folder), ExportOptions.of(output=tmp_path / "out", **options)))
    assert list(tmp_path.iterdir()) == []
