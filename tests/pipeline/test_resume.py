"""A run that is killed goes on where it stopped, bit for bit; memory that runs out halves the batch."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from interpreters import RUN_CLI, python
from safetensors.torch import load_file, save_file

import exporter
from exporter.data.calibration_sets import load_calibration
from exporter.data.hub_datasets import PictureOfRepository, PictureOfRow
from exporter.data.pictures import PictureFile
from exporter.directions.fit import fit_directions
from exporter.errors import InputError
from exporter.models.base import BaseCheckpoint, resolve
from exporter.models.loading import load_vlm
from exporter.models.recipe import load_recipe
from exporter.pipeline import fingerprint as fingerprints
from exporter.pipeline.export import export
from exporter.pipeline.fingerprint import base_identity, calibration_identity, code_identity, fingerprint, open_store
from exporter.pipeline.plan import ExportOptions, make_plan
from exporter.runtime.batches import Batches, out_of_memory
from exporter.runtime.store import CACHE, FINGERPRINT, Store

RECIPE = load_recipe("llava")


@pytest.fixture(scope="module")
def vlm(base_folder):
    return load_vlm(resolve(str(base_folder)), RECIPE)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def fit(vlm, calibration_file, store=None, **options):
    calibration = load_calibration(str(calibration_file))
    runner = Batches(store=store)
    return fit_directions(vlm, calibration, RECIPE.prompts, runner=runner, **options)


class TestStore:
    @pytest.fixture
    def store(self, cache):
        return Store.open({"a": 1})

    def test_what_is_kept_is_found(self, store):
        value = torch.randn(3, 2)
        store.put("held-out text-1", value)
        assert torch.equal(Store.open({"a": 1}).get("held-out text-1"), value)
        assert Store.open({"a": 2}).get("held-out text-1") is None
        assert store.get("other") is None

    def test_what_was_found_is_counted(self, store):
        store.put("a", torch.ones(2))
        store.put("b", torch.ones(2))
        assert store.found == 0
        for name in ("a", "missing", "b"):
            store.get(name)
        assert store.found == 2

    def test_files_are_named_after_the_fingerprint_in_whatever_order_that_is_given(self, cache):
        store = Store.open({"b": 1, "a": "ü"})
        store.put("held-out text-1", torch.ones(2))
        text = (store.folder / FINGERPRINT).read_text("utf-8")
        assert json.loads(text) == {"a": "ü", "b": 1}
        assert store.folder == cache / hashlib.sha256(text.encode()).hexdigest()[:32]
        assert Store.open({"a": "ü", "b": 1}).folder == store.folder
        assert {f.name for f in store.folder.iterdir()} == {FINGERPRINT, "held-out-text-1.safetensors"}

    def test_where_nobody_says_otherwise_it_lies_in_the_home_folder(self, tmp_path, monkeypatch):
        monkeypatch.delenv(CACHE, raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert Store.open({}).folder.parent == tmp_path / ".cache" / "shiftdc-export"

    def test_only_the_owner_may_read(self, store):
        store.put("x", torch.ones(2))
        assert {f.stat().st_mode & 0o777 for f in store.folder.glob("*.safetensors")} == {0o600}
        assert store.folder.stat().st_mode & 0o777 == 0o700

    @pytest.mark.parametrize("place", [3, 20, -1])
    def test_damage_is_found(self, store, place):
        store.put("x", torch.ones(8))
        file = store.folder / "x.safetensors"
        data = bytearray(file.read_bytes())
        data[place] ^= 1
        file.write_bytes(data)
        assert store.get("x") is None
        file.write_bytes(data[:20])
        assert store.get("x") is None

    def test_another_value_under_the_old_checksum(self, store):
        store.put("x", torch.ones(8))
        save_file({"value": torch.zeros(8)}, store.folder / "x.safetensors", metadata={"sha256": "0" * 64})
        assert store.get("x") is None

    def test_cleared(self, store):
        store.put("x", torch.ones(2))
        store.clear()
        assert not store.folder.exists()
        store.clear()
        shutil.rmtree(store.folder.parent)
        store.put("x", torch.ones(2))  # another run of the same kind may still be at work
        assert store.get("x") is not None
        assert store.folder.stat().st_mode & 0o777 == 0o700

    def test_a_cache_that_cannot_be_written(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv(CACHE, str(tmp_path / "file"))
        with pytest.raises(InputError, match="cannot be written"):
            Store.open({})
        monkeypatch.delenv(CACHE)
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
        assert Store.open({}).folder is None  # nobody asked for it: the run goes on without

    def test_a_full_disk_ends_the_keeping_only(self, store, monkeypatch):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("exporter.runtime.store.save_file", full)
        store.put("x", torch.ones(2))
        assert store.folder is None
        assert store.get("x") is None


def test_interrupted_directions_go_on_to_the_same_bits(vlm, calibration_file, cache, monkeypatch):
    whole = fit(vlm, calibration_file, batch_size=3)
    calls = []
    forward = type(vlm.model.model).forward

    def counted(self, *args, **kwargs):
        calls.append(1)
        if stop_at == len(calls):
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(vlm.model.model), "forward", counted)
    stop_at = 0
    fit(vlm, calibration_file, batch_size=3)
    total = len(calls)
    done = 0
    for stop_at in (5, 1, 9, 0):
        calls.clear()
        store = Store.open({"run": 1})
        if stop_at:
            with pytest.raises(KeyboardInterrupt):
                fit(vlm, calibration_file, store, batch_size=3)
            done += stop_at - 1
        else:
            resumed = fit(vlm, calibration_file, store, batch_size=3)
    assert len(calls) == total - done  # nothing was computed twice
    assert store.found == done
    assert torch.equal(resumed.direction, whole.direction)
    assert torch.equal(resumed.shift, whole.shift)
    assert resumed.statistics == whole.statistics


def test_no_text_is_kept(vlm, calibration_file, cache):
    store = Store.open({"run": 1})
    fit(vlm, calibration_file, store)
    kept = b"".join(f.read_bytes() for f in store.folder.iterdir())
    assert len(kept) > 10_000
    for word in (b"poison", b"grenade", b"How do I"):
        assert word not in kept


def test_the_fingerprint_tells_runs_apart(base_folder, calibration_file, tmp_path):
    def of(base=base_folder, calibration=calibration_file, **options):
        return fingerprint(
            make_plan(str(base), ExportOptions.of(output=tmp_path / "out", layers="1", calibration=str(calibration), **options))
        )

    assert of() == of()
    assert of(strength=0.5) == of()  # activations do not depend on it
    more = tmp_path / "more.jsonl"
    more.write_text(calibration_file.read_text().replace("cake", "pie"))
    assert of() != of(calibration=more)
    assert of() != of(dtype="bfloat16")
    assert of() != of(batch_size=2)
    assert of() != of(load_in_8bit=True)
    before = of()
    os.utime(base_folder / "model.safetensors", ns=(1, 1))
    assert of() != before


@pytest.fixture(scope="module")
def plan(base_folder, calibration_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("plan") / "out"
    return make_plan(str(base_folder), ExportOptions.of(output=output, layers="1", calibration=str(calibration_file)))


def test_a_store_says_what_its_activations_depend_on(plan, cache):
    text = (open_store(plan).folder / FINGERPRINT).read_text("utf-8")
    found = json.loads(text)
    assert text == json.dumps(fingerprint(plan), indent=2, sort_keys=True)
    assert found.keys() == {"base", "adapter", "calibration", "recipe", "captions", "arithmetic", "code"}
    assert found["base"].keys() == {"name", "revision", "weights", "files"}
    assert found["calibration"].keys() == {"source", "texts", "images"}
    assert found["recipe"].keys() == {"family", "prompts", "layers"}
    assert found["code"] == code_identity()


def test_each_part_of_a_plan_is_in_the_fingerprint(plan, monkeypatch):
    recipe, prompts, calibration = plan.recipe, plan.recipe.prompts, plan.calibration

    def with_recipe(**changes):
        return replace(plan, recipe=recipe.model_copy(update=changes))

    def adapted(sha256, kept=False):
        return replace(plan, adapter=SimpleNamespace(sha256=sha256), keep_adapter=kept)

    captioned = tuple(r.model_copy(update={"caption": f"{r.caption}."}) for r in calibration.rows)
    others = {
        "as it is": plan,
        "weights of an adapter": adapted("a"),
        "of another": adapted("b"),
        "not merged": adapted("b", kept=True),
        "source": replace(plan, calibration=replace(calibration, sha256="another")),
        "captions, written elsewhere": replace(plan, calibration=replace(calibration, rows=captioned)),
        "the caption's wording": with_recipe(prompts=prompts.model_copy(update={"caption": "Describe it: {request}"})),
        "the counterpart's": with_recipe(prompts=prompts.model_copy(update={"text_counterpart": "{request} {caption}"})),
        "which wording": with_recipe(caption_style="describe"),
        "the caption's length": with_recipe(caption_max_new_tokens=7),
        "layers": with_recipe(layers="2"),
        "dtype": replace(plan, dtype="float16"),
        "places": replace(plan, device_map="auto"),
        "quantised": replace(plan, quantised=8),
        "batches": replace(plan, batch_size=3),
        "base": replace(plan, base=replace(plan.base, name="another")),
    }
    found = {name: json.dumps(fingerprint(other), sort_keys=True) for name, other in others.items()}
    monkeypatch.setattr(fingerprints, "code_identity", lambda: {"code": "another"})
    found["code"] = json.dumps(fingerprint(plan), sort_keys=True)
    same = {name: [n for n, text in found.items() if text == found[name]] for name in found}
    assert all(names == [name] for name, names in same.items()), same


def test_a_base_is_told_apart_by_each_of_its_files(tmp_path):
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json")
    for name in names:
        (tmp_path / name).write_text("{}")
    shard = tmp_path / "model.safetensors"
    shard.write_text("weights")

    def of(revision=None):
        return base_identity(BaseCheckpoint("base", revision, tmp_path, {}, (shard,)))

    for name in names:
        before = of()
        (tmp_path / name).write_text(f'{{"of": "{name}"}}')
        assert of() != before, name
    before, published = of(), of("1" * 40)
    os.utime(shard, ns=(1, 1))
    assert of() != before and of("1" * 40) == published != of("2" * 40)
    before = of()
    shard.write_text("more weights")
    os.utime(shard, ns=(1, 1))
    assert of() != before


def test_a_calibration_set_is_told_apart_by_its_images(calibration_file, tmp_path):
    calibration, picture = load_calibration(str(calibration_file)), tmp_path / "a.png"
    picture.write_bytes(b"one")
    rows = tuple(r.model_copy(update={"image": PictureFile(picture, "the image")}) for r in calibration.rows)
    before = calibration_identity(replace(calibration, rows=rows))
    picture.write_bytes(b"two")
    after = calibration_identity(replace(calibration, rows=rows))
    assert {k for k in before if before[k] != after[k]} == {"images"}
    assert {k for k in before if before[k] != calibration_identity(calibration)[k]} == {"images"}


def test_which_row_shows_an_image_is_told_apart(calibration_file, tmp_path):
    calibration, picture = load_calibration(str(calibration_file)), tmp_path / "a.png"
    picture.write_bytes(b"one")

    def shown_beside(number):
        rows = list(calibration.rows)
        rows[number] = rows[number].model_copy(update={"image": PictureFile(picture, "the image")})
        return calibration_identity(replace(calibration, rows=tuple(rows)))

    assert shown_beside(0) == shown_beside(0) != shown_beside(1)


def test_pictures_of_the_demo_and_of_the_hub_have_an_identity():
    rows = load_calibration("demo").rows
    assert len({row.image.identity() for row in rows}) > 0.99 * len(rows)
    pictures = [
        PictureOfRow({}, "image", row, f"maker/set, row {row}", commit) for row in (0, 1) for commit in ("1" * 40, "2" * 40)
    ]
    pictures += [PictureOfRepository("maker/set", commit, path) for path in "ab" for commit in ("1" * 40, "2" * 40)]
    assert len({picture.identity() for picture in pictures}) == len(set(pictures)) == 8


def test_code_is_told_apart_by_any_of_its_files(tmp_path, monkeypatch):
    (tmp_path / "modeling").mkdir()
    files = tmp_path / "errors.py", tmp_path / "modeling" / "modeling_shiftdc.py"
    for file in files:
        file.write_text("1")
    monkeypatch.setattr(exporter, "__file__", str(tmp_path / "__init__.py"))
    found = [code_identity.__wrapped__()]
    for file in files:
        file.write_text("2")
        found.append(code_identity.__wrapped__())
    assert [{k for k in a if a[k] != b[k]} for a, b in itertools.pairwise(found)] == [{"code"}] * 2
    assert {"torch", "transformers", "torchvision", "device", "shiftdc-export"} <= found[0].keys()


def test_killed_at_random_points(base_folder, calibration_file, tmp_path, cache, vlm):
    """A real process, killed while it writes; then the run that goes on is that of an undisturbed one."""
    arguments = [
        "--layers",
        "1-2",
        "--batch-size",
        "1",
        "--calibration",
        calibration_file,
        "--output",
        tmp_path / "out",
        "--quiet",
    ]
    command = [*python(RUN_CLI), Path(__file__).parents[1] / "support" / "run_cli.py", base_folder, *arguments]
    kept = 0
    for _ in range(2):
        process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE)
        wanted, deadline = kept + random.randint(1, 12), time.monotonic() + 120
        while process.poll() is None and len(kept_files(cache)) < wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.communicate()  # which ends when nobody can write any more
        assert kept < len(kept_files(cache))
        kept = len(kept_files(cache))
        assert not (tmp_path / "out").exists()
    options = {"layers": "1-2", "calibration": str(calibration_file), "batch_size": 1}
    done = export(make_plan(str(base_folder), ExportOptions.of(output=tmp_path / "out", **options)))
    assert done.report.resumed_batches == kept
    assert not any(cache.iterdir())  # nothing is kept once the export is there
    undisturbed = fit(vlm, calibration_file, layers=[1, 2], batch_size=1)
    found = load_file(tmp_path / "out" / "shiftdc.safetensors")
    for layer in (1, 2):
        expected = dict(zip(("direction", "shift"), undisturbed.of(layer), strict=True))
        assert all(torch.equal(found[f"model.language_model.layers.{layer}.shiftdc.{k}"], v) for k, v in expected.items())


def kept_files(cache: Path) -> list[Path]:
    return list(cache.glob("*/*.safetensors"))


class TestOutOfMemory:
    @pytest.fixture
    def error(self):
        """What PyTorch raises on this machine."""
        with pytest.raises(RuntimeError) as caught:
            torch.empty(1 << 60)
        return caught.value

    @pytest.fixture
    def limited(self, vlm, error):
        """Memory for this many prompts at a time; the sizes of batches that were tried."""
        tried = []

        def limit(size):
            def check(module, args, kwargs):
                tried.append(len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]))
                if tried[-1] > size:
                    raise error

            handle = vlm.decoder_layers[2].register_forward_pre_hook(check, with_kwargs=True)
            handles.append(handle)
            return tried

        handles = []
        yield limit
        for handle in handles:
            handle.remove()

    def test_batches_are_halved_and_stay_so(self, vlm, calibration_file, limited):
        expected = fit(vlm, calibration_file, batch_size=8)
        tried = limited(2)
        found = fit(vlm, calibration_file, batch_size=8)
        assert torch.allclose(found.direction, expected.direction, atol=1e-5)
        assert torch.allclose(found.shift, expected.shift, atol=1e-4)
        assert tried[:4] == [8, 4, 2, 2]
        assert tried[3:11] == [2] * 8  # 16 prompts of the first stage, and none was tried in a larger batch again

    def test_one_prompt_that_does_not_fit(self, vlm, calibration_file, limited):
        limited(0)
        with pytest.raises(InputError, match="one prompt does not fit into memory"):
            fit(vlm, calibration_file, batch_size=4)

    def test_other_errors_are_not_taken_for_it(self, error):
        assert out_of_memory(error)
        assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
        assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
