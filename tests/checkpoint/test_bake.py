"""What `bake` writes, file by file, from a base of a few numbers."""

from __future__ import annotations

import hashlib
import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bare_export import COMPANIONS, FRAME, HIDDEN, LAYERS, TRAITS, bare_base, bare_calibrated
from safetensors import safe_open
from safetensors.torch import load_file

from exporter.checkpoint import bake as baking
from exporter.checkpoint.bake import Baked, bake, identity, shiftdc_block
from exporter.errors import InputError
from exporter.modeling.configuration_shiftdc import FORMAT_VERSION, STOCK_CLASS_GUARD, ShiftDCSettings
from exporter.modeling.modeling_shiftdc import buffers_sha256
from exporter.models.families import family
from exporter.runtime.hashing import sha256

SHARD, INDEX = "shiftdc.safetensors", "model.safetensors.index.json"
RENAMED = "model-00001-of-00002.safetensors"


@pytest.fixture
def base(tmp_path):
    return bare_base(tmp_path / "base")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


class TestBlock:
    def test_what_the_shipped_code_reads(self, base):
        calibrated = bare_calibrated(strength=0.5, gate="two-sided", rule="precomputed", reference="text")
        hashes = [buffers_sha256(*pair) for pair in zip(torch.eye(2, HIDDEN), torch.tensor([0.5, 1.5]), strict=True)]
        assert shiftdc_block(calibrated, base) == {
            "version": FORMAT_VERSION,
            "reference": "text",
            "rule": "precomputed",
            "gate": "two-sided",
            "strength": 0.5,
            "layers": list(LAYERS),
            "buffers_sha256": hashes,
            "traits": TRAITS.as_json(),
            "caption_max_new_tokens": calibrated.recipe.caption_tokens,
            "prompt": FRAME.as_json(),
            "base_model": {"id": "owner/base", "revision": "abc"},
        }

    def test_an_adapter(self, base, tmp_path):
        assert shiftdc_block(bare_calibrated(), base, tmp_path)["adapter"] == "adapter"


def test_all_files_and_their_rights(base, folder):
    bake(base, bare_calibrated(), folder)
    code = {file.name for file in family("llava").files}
    found = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    assert found == {RENAMED, SHARD, INDEX, "config.json", *code, *COMPANIONS}
    for file in family("llava").files:
        assert (folder / file.name).read_bytes() == file.read_bytes()
    assert stat.S_IMODE((folder / SHARD).stat().st_mode) == 0o644  # as the others, for whoever shares the folder


def test_the_shard_of_directions(base, folder):
    bake(base, bare_calibrated(), folder)
    path = "model.language_model.layers"
    tensors = load_file(folder / SHARD)
    assert {k: v.tolist() for k, v in tensors.items()} == {
        f"{path}.1.shiftdc.direction": [1, 0, 0, 0],
        f"{path}.1.shiftdc.shift": 0.5,
        f"{path}.3.shiftdc.direction": [0, 1, 0, 0],
        f"{path}.3.shiftdc.shift": 1.5,
    }
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    with safe_open(folder / SHARD, "pt") as stored:
        assert stored.metadata() == {"format": "pt"}  # transformers loads no other


def test_directions_that_lie_crosswise_in_memory(base, folder):
    calibrated = bare_calibrated()
    crosswise = replace(calibrated.directions, direction=torch.eye(HIDDEN, 2).T)
    bake(base, replace(calibrated, directions=crosswise), folder)
    assert load_file(folder / SHARD)["model.language_model.layers.3.shiftdc.direction"].tolist() == [0, 1, 0, 0]


def test_the_index_says_what_the_shards_hold(base, folder):
    bake(base, bare_calibrated(), folder)
    text = (folder / INDEX).read_text()
    index = json.loads(text)
    assert index["metadata"] == {"total_size": 3 * 4 + 2 * 2 + 2 * (HIDDEN + 1) * 4}
    keys = [f"model.language_model.layers.{n}.shiftdc.{name}" for n in LAYERS for name in ("direction", "shift")]
    assert index["weight_map"] == {"a.0": RENAMED, "b.0": RENAMED, **dict.fromkeys(keys, SHARD)}
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    assert text == json.dumps(index, indent=2) + "\n"


class TestShards:
    def test_names_hashes_and_bytes(self, tmp_path, folder):
        """One file gets a name that is no longer preferred to the index; several keep theirs."""
        base = bare_base(tmp_path / "three", 3)
        baked = bake(base, bare_calibrated(), folder)
        assert list(baked.hashes) == [f"model-{n}-of-3.safetensors" for n in (1, 2, 3)]
        assert baked.hashes == {f.name: sha256(f) for f in base.shards}
        assert {name: sha256(folder / name) for name in baked.hashes} == baked.hashes
        assert sum(baked.placed.values()) == sum(f.stat().st_size for f in base.shards)
        assert baked.placed.keys() <= {"copy", "clone"}

    def test_hashes_that_are_known_are_not_computed(self, base, folder, monkeypatch):
        """While a shard and its link are one file."""
        monkeypatch.setattr(baking, "link_or_copy", lambda source, target: target.hardlink_to(source) or "link")
        monkeypatch.setattr(baking, "sha256", None)
        baked = bake(base, bare_calibrated(), folder, hash_of=lambda file: f"hash of {file.name}")
        assert baked == Baked({RENAMED: "hash of model.safetensors"}, {"link": base.shards[0].stat().st_size})

    def test_a_shard_that_changes_meanwhile(self, base, folder):
        sentence = rf"^MODEL: {base.shards[0]} changed while it was copied; leave the base folder alone and run again\.$"
        with pytest.raises(InputError, match=sentence):
            bake(base, bare_calibrated(), folder, hash_of=lambda _: hashlib.sha256(b"before").hexdigest())

    def test_in_a_folder_that_is_soon_deleted(self, base, folder):
        baked = bake(base, bare_calibrated(), folder, temporary=True)
        assert (folder / RENAMED).is_symlink() and (folder / RENAMED).samefile(base.shards[0])
        assert baked == Baked({RENAMED: sha256(base.shards[0])}, {})
        assert "a.0" in json.loads((folder / INDEX).read_text())["weight_map"]


def test_an_adapter_goes_along(base, folder, tmp_path):
    adapter = tmp_path / "lora"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt"):
        (adapter / name).write_text(name)
    bake(base, bare_calibrated(), folder, adapter=adapter)
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(f.name for f in (folder / "adapter").iterdir()) == names
    assert [(folder / "adapter" / name).read_text() for name in names] == names
    assert config(folder)["shiftdc"]["adapter"] == "adapter"


class TestCompanions:
    def bake(self, tmp_path, folder, name, text):
        base = bare_base(tmp_path / "base")
        (base.folder / name).write_text(text)
        bake(base, bare_calibrated(), folder)
        return (folder / name).read_text()

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("tokenizer_config.json", '{"a":   1}'),
            ("LICENSE", '{"auto_map": 1}'),
            ("tokenizer.json", '{"auto_map":   1}'),
            ("qformer_tokenizer/tokenizer_config.json", "[1,2]"),
        ],
    )
    def test_byte_for_byte(self, tmp_path, folder, name, text):
        assert self.bake(tmp_path, folder, name, text) == text

    def test_without_names_of_code(self, tmp_path, folder):
        given = {"b": [{"auto_map": 1, "c": "模"}, 2], "custom_pipelines": {}, "d": {"e": {"auto_map": {}}}}
        kept = {"b": [{"c": "模"}, 2], "d": {"e": {}}}
        text = self.bake(tmp_path, folder, "tokenizer_config.json", json.dumps(given))
        assert text == json.dumps(kept, indent=2) + "\n"


class TestConfig:
    def test_ours_over_the_bases(self, tmp_path, folder):
        auto_map = {"AutoModel": "evil--code.Evil"}
        base = bare_base(tmp_path / "base", auto_map=auto_map, text_config={"auto_map": auto_map, "n": 1}, kept=[1])
        bake(base, bare_calibrated(), folder)
        found = config(folder)
        assert (folder / "config.json").read_text() == json.dumps(found, indent=2) + "\n"
        block = found.pop("shiftdc")
        assert block.pop("guarded") == {"value": "full"}
        assert block == shiftdc_block(bare_calibrated(), base)
        assert found == {
            **identity(family("llava")),
            "text_config": {"n": 1},
            "kept": [1],
            "vision_feature_select_strategy": STOCK_CLASS_GUARD,
        }

    def test_classes_and_code(self):
        assert identity(family("blip-2")) == {
            "architectures": ["ShiftDCBlip2ForConditionalGeneration"],
            "model_type": "shiftdc_blip-2",
            "auto_map": {
                "AutoConfig": "configuration_shiftdc.ShiftDCBlip2Config",
                "AutoModelForImageTextToText": "modeling_shiftdc_blip.ShiftDCBlip2ForConditionalGeneration",
            },
        }

    def test_the_shipped_code_takes_it(self, base, folder):
        bake(base, bare_calibrated(), folder)
        read = family("llava").config.from_pretrained(folder)
        assert ShiftDCSettings.of(read).layers == LAYERS and read.vision_feature_select_strategy == "full"
