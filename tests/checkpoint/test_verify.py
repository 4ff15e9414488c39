"""What `verify` checks of files before it runs any code of them, and the process in which it does."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from bare_export import bare_export
from safetensors.torch import load_file, save_file

from exporter.checkpoint import verify as verifying
from exporter.checkpoint.layout import REPORT, SHARD
from exporter.checkpoint.manifest import hashes
from exporter.checkpoint.verify import Verification, verify
from exporter.errors import InputError, VerificationError
from exporter.models.shards import INDEX
from exporter.runtime.marker import MARKER

PARITY = {"logits": 0.25, "uncalibrated_exact": True}
#: In place of the worker: writes down how it was started, waits for the end of its stdin where it is told to, and answers.
WORKER = """
import json, os, sys
from pathlib import Path
folder, *placement = sys.argv[1:]
seen = {
    "argv": sys.argv[1:], "environment": dict(os.environ), "isolated": sys.flags.isolated, "python": sys.executable,
    "there": [Path(os.environ["HF_MODULES_CACHE"]).is_dir(), os.listdir(os.environ["HF_MODULES_CACHE"])],
}
(Path(__file__).parent / "seen.json").write_text(json.dumps(seen))
"""
ANSWER = f"""
print("a library says something")
print({json.dumps(json.dumps({"failures": [], "parity": PARITY}))})
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return bare_export(tmp_path / "export")


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """worker(code): what the process runs behind WORKER; worker.seen(): how it was started."""
    (tmp_path / "worker").mkdir()
    file = tmp_path / "worker" / "worker.py"

    def write(code: str) -> None:
        file.write_text(WORKER + code)

    write(ANSWER)
    write.seen = lambda: json.loads(file.with_name("seen.json").read_text())
    write.started = lambda: file.with_name("seen.json").exists()
    monkeypatch.setattr(verifying, "WORKER", file)
    return write


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def sign(folder: Path) -> None:
    """Make the report agree with files that were changed."""
    edit(folder / REPORT, files=hashes(folder))


def complaint(folder: Path) -> str:
    """Of a folder that must fail before its code is run."""
    with pytest.raises(VerificationError) as caught:
        verify(folder)
    sentence = str(caught.value)
    assert sentence.startswith(f"{folder} failed its checks: ") and sentence.endswith(".")
    return sentence.removeprefix(f"{folder} failed its checks: ").removesuffix(".")


@pytest.mark.parametrize("shards", [1, 3])
def test_an_export_that_is_whole(tmp_path, worker, shards):
    folder = bare_export(tmp_path / "export", shards)
    assert verify(folder) == Verification(shards, 2 * shards, PARITY)
    (folder / "README.md").write_text("A card.")
    sign(folder)
    (folder / "README.md").write_text("My words.")
    assert verify(folder).edited == ("README.md",)


class TestWeights:
    @pytest.fixture(autouse=True)
    def nothing_is_run(self, worker):
        yield
        assert not worker.started()

    def test_a_single_file(self, folder):
        (folder / "model.safetensors").write_bytes((folder / SHARD).read_bytes())
        sign(folder)
        assert complaint(folder) == "model.safetensors lies beside the index and would be loaded in its place"

    def test_no_index(self, folder):
        (folder / INDEX).unlink()
        sign(folder)
        assert complaint(folder) == f"{INDEX} is missing"

    @pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", SHARD])
    def test_a_shard_that_is_missing(self, folder, name):
        (folder / name).unlink()
        sign(folder)
        assert f"{name} is missing" in complaint(folder).split("; ")

    @pytest.mark.parametrize("index", ["{", "", "\udcff"])
    def test_an_index_that_cannot_be_read(self, folder, index):
        (folder / INDEX).write_text(index, "utf-8", "surrogateescape")
        sign(folder)
        sentence = rf"^CHECKPOINT: {folder} has no readable {re.escape(INDEX)} \(.+\); give a folder that shiftdc-export wrote\.$"
        with pytest.raises(InputError, match=sentence) as caught:
            verify(folder)
        assert caught.value.__cause__ is not None

    def test_an_index_that_is_no_object(self, folder):
        (folder / INDEX).write_text("[]")
        sign(folder)
        with pytest.raises(InputError, match=rf"^CHECKPOINT: {folder / INDEX} holds no JSON object; export again\.$"):
            verify(folder)

    @pytest.mark.parametrize(
        ("change", "wrong"),
        [
            (lambda m: {}, "a.0"),
            (lambda m: None, "a.0"),
            (lambda m: ["a.0"], "a.0"),
            (lambda m: {**m, "b.0": SHARD}, "b.0"),
            (lambda m: {k: v for k, v in m.items() if k != "b.0"}, "b.0"),
            (lambda m: {**m, "lm_head": SHARD}, "lm_head"),
        ],
    )
    def test_an_index_that_says_something_else(self, folder, change, wrong):
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        edit(folder / INDEX, weight_map=change(weight_map))
        sign(folder)
        assert complaint(folder) == f"the index does not say what the shards hold ({wrong})"

    def test_all_that_is_wrong_is_told_at_once(self, folder):
        (folder / "tokenizer.json").unlink()
        (folder / "model.safetensors").write_bytes(b"")
        found = complaint(folder).split("; ")
        assert found == [
            "model.safetensors is not part of the export",
            "tokenizer.json is missing",
            "model.safetensors lies beside the index and would be loaded in its place",
        ]


KEY = "model.language_model.layers.{}.shiftdc.{}"


class TestBuffers:
    @pytest.fixture(autouse=True)
    def nothing_is_run(self, worker):
        yield
        assert not worker.started()

    def change(self, folder, **tensors):
        """`direction_1=...`; None takes it out of the shard and out of the index."""
        buffers = load_file(folder / SHARD)
        for name, tensor in tensors.items():
            kind, layer = name.split("_")
            buffers[KEY.format(layer, kind)] = tensor
        buffers = {k: v for k, v in buffers.items() if v is not None}
        save_file(buffers, folder / SHARD, metadata={"format": "pt"})
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        weight_map = {k: v for k, v in weight_map.items() if v != SHARD} | dict.fromkeys(buffers, SHARD)
        edit(folder / INDEX, weight_map=weight_map)
        sign(folder)

    @pytest.mark.parametrize("missing", ["direction", "shift"])
    def test_missing(self, folder, missing):
        self.change(folder, **{f"{missing}_1": None})
        assert complaint(folder) == f"{KEY.format(1, missing)} is missing"

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_no_numbers(self, folder, value):
        self.change(folder, direction_3=torch.tensor([1.0, value, 0, 0]), shift_1=torch.tensor(value))
        assert complaint(folder) == f"{KEY.format(1, 'shift')} is not finite; {KEY.format(3, 'direction')} is not finite"

    @pytest.mark.parametrize("length", [0.0, 0.998, 1.002])
    def test_not_of_unit_norm(self, folder, length):
        self.change(folder, direction_1=torch.tensor([length, 0, 0, 0]))
        assert complaint(folder) == f"{KEY.format(1, 'direction')} is not of unit norm"

    def test_all_of_them_in_order(self, folder):
        self.change(folder, direction_3=torch.zeros(4), direction_1=torch.zeros(4), shift_3=None, shift_1=None)
        assert complaint(folder) == "; ".join(
            [f"{KEY.format(n, 'shift')} is missing" for n in (1, 3)]
            + [f"{KEY.format(n, 'direction')} is not of unit norm" for n in (1, 3)]
        )

    @pytest.mark.parametrize("block", [None, {}, [], {"layers": []}, {"layers": {"1": 1}}, {"layers": 3}])
    def test_no_block(self, folder, block):
        edit(folder / "config.json", shiftdc=block)
        sign(folder)
        assert complaint(folder) == "config.json has no usable shiftdc block"


@pytest.mark.parametrize("length", [0.9995, 1.0005])
def test_a_direction_may_be_rounded(folder, worker, length):
    TestBuffers().change(folder, direction_1=torch.tensor([length, 0, 0, 0]))
    assert verify(folder).shards == 1


def test_a_shift_may_have_any_size(folder, worker):
    TestBuffers().change(folder, shift_1=torch.tensor(7.0))
    assert verify(folder).shards == 1


NOT_OURS = "is not the code of this version of shiftdc-export, so it was not run"


class TestCode:
    @pytest.fixture(autouse=True)
    def nothing_is_run(self, worker):
        yield
        assert not worker.started()

    def test_other_code(self, folder):
        (folder / "modeling_shiftdc.py").write_text("x = 1\n")
        (folder / "a").mkdir()
        (folder / "a" / "evil.py").write_text("x = 1\n")
        (folder / "inputs_shiftdc.py").unlink()
        sign(folder)
        names = ("a/evil.py", "inputs_shiftdc.py", "modeling_shiftdc.py")
        assert complaint(folder) == "; ".join(f"{name} {NOT_OURS}" for name in names)

    @pytest.mark.parametrize("key", ["architectures", "model_type", "auto_map"])
    def test_other_classes(self, folder, key):
        edit(folder / "config.json", **{key: None})
        sign(folder)
        assert complaint(folder).split("; ")[0] == f"config.json names other classes or code ({key})"

    def test_another_architecture(self, folder):
        report = json.loads((folder / REPORT).read_text())
        edit(folder / REPORT, base_model={**report["base_model"], "architecture": "pipeline"})
        assert complaint(folder) == "the report names another architecture than LlavaForConditionalGeneration"

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("config.json", {"text_config": {"auto_map": {}}}),
            ("processor_config.json", {"auto_map": {}}),
            ("qformer_tokenizer/tokenizer_config.json", [{"custom_pipelines": {}}]),
        ],
    )
    def test_names_of_code(self, folder, name, content):
        if name == "config.json":
            edit(folder / name, **content)
        else:
            (folder / name).write_text(json.dumps(content))
        sign(folder)
        assert complaint(folder) == f"{name} names code (auto_map)"

    def test_a_config_that_is_a_list(self, folder):
        (folder / "qformer_tokenizer" / "config.json").write_text('[{"auto_map": 1}]')
        sign(folder)
        assert complaint(folder) == "qformer_tokenizer/config.json names code (auto_map)"


@pytest.mark.parametrize("name", ["notes.json", "qformer_tokenizer/config.json"])
@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[1]", "null"])
def test_files_that_name_no_code(folder, worker, name, content):
    """tokenizer.json, which has an entry of the name here, is large, and transformers looks for no code in it."""
    assert "auto_map" in (folder / "tokenizer.json").read_text()
    (folder / name).write_text(content)
    sign(folder)
    assert verify(folder).shards == 1


def test_no_report(tmp_path, worker):
    with pytest.raises(InputError, match=r"no readable shiftdc_report\.json"):
        verify(tmp_path)


def test_another_format(folder, worker):
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", shiftdc={**config["shiftdc"], "version": 2})
    with pytest.raises(InputError, match="is of format version 2"):
        verify(folder)


class TestFreshProcess:
    def test_how_it_is_started(self, folder, worker, monkeypatch):
        """Isolated, without network and without tokens, and not as a rank of a torchrun; its code goes into a folder that is gone
        afterwards."""
        given = {
            "HF_TOKEN": "t",
            "MY_TOKEN_FILE": "t",
            "LOCAL_RANK": "1",
            "RANK": "1",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        }
        for name, value in {**given, "KEPT": "k", "HF_HUB_OFFLINE": "0"}.items():
            monkeypatch.setenv(name, value)
        verify(folder)
        seen = worker.seen()
        environment = seen["environment"]
        assert seen["argv"] == [str(folder)] and seen["isolated"] == 1
        assert not given.keys() & environment.keys() and environment["KEPT"] == "k"
        assert environment["HF_HUB_OFFLINE"] == "1" and environment["TRANSFORMERS_VERBOSITY"] == "error"
        assert seen["there"] == [True, [MARKER]]
        modules = Path(environment["HF_MODULES_CACHE"])
        assert modules.name.startswith("verify-") and not modules.exists() and not modules.is_relative_to(folder.parent)

    @pytest.mark.parametrize("beside", [None, "elsewhere"])
    def test_where_what_is_offloaded_lies(self, folder, worker, tmp_path, beside):
        """On the disk of the export, where there is room for it."""
        place = None if beside is None else tmp_path / beside / "out"
        if place is not None:
            place.parent.mkdir()
        verify(folder, "auto", place)
        path, device_map, offload = worker.seen()["argv"]
        assert (path, device_map) == (str(folder), "auto")
        near = place or folder
        assert Path(offload).parent == near.parent and Path(offload).name.startswith(f".{near.name}.verify-")
        assert worker.seen()["environment"]["HF_MODULES_CACHE"] == offload and not Path(offload).exists()

    def test_it_knows_when_its_parent_ends(self, folder, worker):
        """Its stdin is a pipe that nobody writes into; of a parent that ends, its end is closed with it."""
        worker(
            f"""
import select
info = os.fstat(0)
waits = not select.select([0], [], [], 0)[0]
print({json.dumps("x")})
print(json.dumps({{"failures": [], "parity": {{"pipe": __import__("stat").S_ISFIFO(info.st_mode), "waits": waits}}}}))
"""
        )
        before = os.listdir("/proc/self/fd") if Path("/proc/self/fd").is_dir() else []
        assert verify(folder).parity == {"pipe": True, "waits": True}
        assert not before or os.listdir("/proc/self/fd") == before  # and here it is closed

    def test_what_it_found_fails_the_export(self, folder, worker):
        worker('print(json.dumps({"failures": ["one", "two"], "parity": {}}))')
        assert complaint(folder) == "one; two"

    def test_a_process_that_fails(self, folder, worker):
        worker('print(\'{"failures": [], "parity": {}}\')\nraise ValueError("the reason")')
        sentence = rf"^{folder} does not load in a fresh process with transformers alone: ValueError: the reason$"
        with pytest.raises(VerificationError, match=sentence):
            verify(folder)

    @pytest.mark.parametrize("end", ["os._exit(3)", "os.kill(os.getpid(), 9)"])
    def test_a_process_that_ends_without_a_word(self, folder, worker, end):
        worker(end)
        with pytest.raises(VerificationError, match=r"with transformers alone: no message$"):
            verify(folder)
