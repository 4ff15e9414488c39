"""Which base checkpoints are taken, and what the others are told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny import save_tiny_llava

from exporter.errors import InputError
from exporter.models.base import resolve
from exporter.pipeline.plan import ExportOptions, make_plan
from exporter.runtime.safetensors_header import read_header


@pytest.fixture
def folder(base_folder, tmp_path):
    return shutil.copytree(base_folder, tmp_path / "base")


def edit(file: Path, **changes):
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, **changes}))


def test_headers_without_loading(folder):
    base = resolve(str(folder))
    header = base.headers[folder / "model.safetensors"]
    assert header["language_model.lm_head.weight"].dtype == "F32"
    assert header["language_model.lm_head.weight"].shape[1] == 32
    assert base.size == sum(t.bytes for t in header.values())


def test_no_such_folder():
    for name in ("./absent", "/absent/there", "a/b/c"):
        with pytest.raises(InputError, match="there is no folder"):
            resolve(name)


def test_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match=r"holds no config\.json"):
        resolve(str(tmp_path))


def test_broken_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        resolve(str(folder))
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match="no JSON object"):
        resolve(str(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match="names no model_type"):
        resolve(str(folder))


def test_pickle_weights_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"only pickle files \(pytorch_model\.bin"):
        resolve(str(folder))


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no safetensors weights"):
        resolve(str(folder))


def test_no_chat_template(tmp_path):
    with pytest.raises(InputError, match="has no chat template"):
        make_plan(str(save_tiny_llava(tmp_path / "base", chat_template=None)), ExportOptions.of(output=tmp_path / "out"))


def test_calibrated_already(make_export):
    with pytest.raises(InputError, match="is calibrated already"):
        resolve(str(make_export().plan.output))


@pytest.mark.parametrize("keep", [3, 100, -8])
def test_cut_short(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        read_header(file)


class TestIndex:
    @pytest.fixture
    def sharded(self, tmp_path):
        folder = save_tiny_llava(tmp_path / "sharded", sharded=True)
        assert len(list(folder.glob("*.safetensors"))) > 2
        return folder

    def test_whole(self, sharded):
        assert len(resolve(str(sharded)).shards) == len(list(sharded.glob("*.safetensors")))

    def test_missing_shard(self, sharded):
        next(iter(sorted(sharded.glob("*.safetensors")))).unlink()
        with pytest.raises(InputError, match="which is missing"):
            resolve(str(sharded))

    @pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "sub/x.safetensors", "weights.bin"])
    def test_paths_never_leave_the_folder(self, sharded, name):
        index = sharded / "model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"]
        edit(index, weight_map={**weight_map, next(iter(weight_map)): name})
        with pytest.raises(InputError, match="expected safetensors files of the same folder"):
            resolve(str(sharded))

    def test_a_tensor_that_is_not_there(self, sharded):
        index = sharded / "model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"]
        edit(index, weight_map={**weight_map, "ghost": next(iter(weight_map.values()))})
        with pytest.raises(InputError, match="lacks ghost"):
            resolve(str(sharded))

    def test_an_index_without_a_map(self, sharded):
        edit(sharded / "model.safetensors.index.json", weight_map={})
        with pytest.raises(InputError, match="no usable weight_map"):
            resolve(str(sharded))
