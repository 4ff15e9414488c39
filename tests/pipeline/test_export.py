"""The whole flow on checkpoints as they are published, and what it leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny_llava
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from exporter.checkpoint import bake as baking
from exporter.checkpoint.manifest import hashes
from exporter.checkpoint.verify import verify
from exporter.errors import InputError, ShiftDCError, VerificationError
from exporter.modeling.modeling_shiftdc import buffers_sha256
from exporter.pipeline import export as pipeline
from exporter.pipeline.export import export
from exporter.pipeline.plan import ExportOptions, make_plan


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of change of every file."""
    return {
        str(f.relative_to(folder)): (hashlib.sha256(f.read_bytes()).hexdigest(), f.stat().st_mtime_ns)
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "sharded": True},
        {"tied": True},
        {"tied": True, "sharded": True, "generation_config": False},
        {"image_token_index": False},
    ],
    ids=lambda v: "-".join(str(k) for k in v) or "plain",
)
def test_published_forms(variant, tmp_path, make_export):
    base = save_tiny_llava(tmp_path / "base", **variant)
    before = contents(base)
    folder = make_export(base=base, caption_max_new_tokens=4).plan.output
    assert contents(base) == before
    report = json.loads((folder / "shiftdc_report.json").read_text())
    originals = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in base.glob("*.safetensors")}
    assert sorted(report["base_model"]["shards"].values()) == sorted(originals.values())
    model, loading = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    stock = LlavaForConditionalGeneration.from_pretrained(base)
    ids = torch.tensor([[1, 4, 4, 4, 4, 9, 17]])
    inputs = {"input_ids": ids, "pixel_values": torch.ones(1, 3, 28, 28, dtype=model.dtype)}
    assert torch.equal(model(**inputs, shiftdc=False).logits, stock(**inputs).logits)
    assert not torch.equal(model(**inputs, shiftdc_position=torch.tensor([6])).logits, stock(**inputs).logits)
    assert model.dtype == variant.get("dtype", torch.float32)
    assert {p: t.dtype for p, t in model.state_dict().items() if "shiftdc" in p and t.dtype != torch.float32} == {}
    assert not (folder / "model.safetensors").exists()


@pytest.mark.parametrize("linked", [True, False])
def test_a_base_that_changes_after_it_was_hashed(hub_snapshot, base_folder, tmp_path, calibration_file, monkeypatch, linked):
    base = hub_snapshot if linked else shutil.copytree(base_folder, tmp_path / "base")
    there = sorted(f.name for f in tmp_path.iterdir())

    def changed(*arguments, hash_of, **options):
        shard = base / "model.safetensors"
        hash_of(shard)  # by now the thread has read it
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        return baking.bake(*arguments, hash_of=hash_of, **options)

    monkeypatch.setattr("exporter.pipeline.export.bake", changed)
    with pytest.raises(ShiftDCError, match="is not bitwise the base model's" if linked else "changed while it was copied"):
        export(make_plan(str(base), ExportOptions.of(output=tmp_path / "out", layers="1-2", calibration=str(calibration_file))))
    assert sorted(f.name for f in tmp_path.iterdir()) == there


def test_a_failed_export_leaves_nothing(base_folder, tmp_path, calibration_file, monkeypatch):
    def fail(folder, *_):
        assert (folder / "config.json").exists()
        raise VerificationError("on purpose")

    monkeypatch.setattr(pipeline, "verify", fail)
    plan = make_plan(str(base_folder), ExportOptions.of(output=tmp_path / "out", layers="1-2", calibration=str(calibration_file)))
    with pytest.raises(VerificationError):
        export(plan)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("in_a_fresh_process")
def test_an_earlier_export_is_replaced_only_by_a_good_one(make_export, base_folder, tmp_path, calibration_file, monkeypatch):
    output = shutil.copytree(make_export().plan.output, tmp_path / "out")
    before = contents(output)
    settings = {"output": output, "layers": "2", "calibration": str(calibration_file)}
    with pytest.raises(InputError, match="--force to replace it"):
        make_plan(str(base_folder), ExportOptions.of(**settings))
    plan = make_plan(str(base_folder), ExportOptions.of(force=True, **settings))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "verify", lambda *_: (_ for _ in ()).throw(VerificationError("on purpose")))
        with pytest.raises(VerificationError):
            export(plan)
    assert contents(output) == before
    export(plan)
    assert json.loads((output / "config.json").read_text())["shiftdc"]["layers"] == [2]
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_other_folders_are_never_replaced(base_folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(InputError, match="is no export of this tool"):
            make_plan(str(base_folder), ExportOptions.of(output=tmp_path / "mine", force=force))


def test_plans_that_cannot_work(base_folder, tmp_path):
    with pytest.raises(InputError, match="decoder layers 0 to 3"):
        make_plan(str(base_folder), ExportOptions.of(output=tmp_path / "o", layers="2-4"))
    with pytest.raises(InputError, match="lies in the base model's folder"):
        make_plan(str(base_folder), ExportOptions.of(output=base_folder / "out"))
    other = shutil.copytree(base_folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(InputError, match="family 'gpt2', for which there is no recipe"):
        make_plan(str(other), ExportOptions.of(output=tmp_path / "o"))
    with pytest.raises(InputError, match="for family 'llava'"):
        make_plan(str(other), ExportOptions.of(output=tmp_path / "o", recipe="llava"))
    (other / "config.json").write_text(json.dumps({**config, "model_type": "qwen"}))
    with pytest.raises(InputError, match="take Qwen2-VL"):
        make_plan(str(other), ExportOptions.of(output=tmp_path / "o"))


def test_a_checkpoint_that_does_not_fill_the_model(base_folder, tmp_path, calibration_file):
    base = shutil.copytree(base_folder, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["language_model.model.norm.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="1 missing keys"):
        export(make_plan(str(base), ExportOptions.of(output=tmp_path / "out", layers="1", calibration=str(calibration_file))))
    assert not (tmp_path / "out").exists()


def test_no_text_reaches_an_output(make_export):
    """Neither requests nor captions of the calibration set stand in any file."""
    folder = make_export().plan.output
    for file in folder.rglob("*"):
        if file.is_file():
            assert b"keylogger" not in file.read_bytes(), file


class TestVerify:
    @pytest.fixture
    def folder(self, make_export, tmp_path):
        return shutil.copytree(make_export().plan.output, tmp_path / "export")

    @pytest.mark.usefixtures("in_a_fresh_process")
    def test_whole(self, folder):
        found = verify(folder)
        assert found.shards == 1
        assert found.tensors > 50
        assert found.parity["calibrated_logits"] < 1e-3

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda f: flip_a_bit(f / "model-00001-of-00002.safetensors"), "not bitwise the base model's"),
            (lambda f: (f / "model-00001-of-00002.safetensors").unlink(), "is missing"),
            (lambda f: shutil.copy(f / "model-00001-of-00002.safetensors", f / "model.safetensors"), "beside the index"),
            (lambda f: drop_from_index(f), "the index does not say"),
            (lambda f: change_buffer(f, lambda d: d * torch.nan), "not finite"),
            (lambda f: change_buffer(f, lambda d: d * 2), "not of unit norm"),
            (lambda f: signed(f, change_buffer(f, lambda d: -d)), "not those that config.json records"),
            (lambda f: signed(f, recorded(f, change_buffer(f, lambda d: -d))), "the probe's"),
            (lambda f: append(f / "modeling_shiftdc.py", "\n# changed\n"), "not the code of this version"),
            (lambda f: signed(f, set_strength(f, 0.5)), "the probe's calibrated_logits"),
            (lambda f: signed(f, remove_guard(f)), "the stock class LlavaForConditionalGeneration loads it"),
        ],
        ids=["bit", "gone", "single", "index", "nan", "norm", "sign", "recorded sign", "code", "strength", "guard"],
    )
    def test_damage_is_found(self, folder, damage, message):
        damage(folder)
        with pytest.raises(VerificationError, match=message):
            verify(folder)

    def test_no_export(self, tmp_path):
        with pytest.raises(InputError, match=r"no readable shiftdc_report\.json"):
            verify(tmp_path)


def signed(folder: Path, _changed: None) -> None:
    """Make the report agree with files that were changed."""
    report = json.loads((folder / "shiftdc_report.json").read_text())
    (folder / "shiftdc_report.json").write_text(json.dumps({**report, "files": hashes(folder)}))


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def append(file: Path, text: str) -> None:
    file.write_text(file.read_text() + text)


def drop_from_index(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"].popitem()
    file.write_text(json.dumps(index))


def change_buffer(folder: Path, change) -> None:
    tensors = load_file(folder / "shiftdc.safetensors")
    key = next(k for k in tensors if k.endswith("direction"))
    save_file({**tensors, key: change(tensors[key])}, folder / "shiftdc.safetensors", metadata={"format": "pt"})


def recorded(folder: Path, _changed: None) -> None:
    """Make the config agree with buffers that were changed."""
    tensors = load_file(folder / "shiftdc.safetensors")
    config = json.loads((folder / "config.json").read_text())
    names = [f"{config['shiftdc']['traits']['decoder_layers']}.{layer}.shiftdc" for layer in config["shiftdc"]["layers"]]
    hashes = [buffers_sha256(tensors[f"{n}.direction"], tensors[f"{n}.shift"]) for n in names]
    config["shiftdc"]["buffers_sha256"] = hashes
    (folder / "config.json").write_text(json.dumps(config))


def set_strength(folder: Path, strength: float) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["shiftdc"]["strength"] = strength
    (folder / "config.json").write_text(json.dumps(config))


def remove_guard(folder: Path) -> None:
    from exporter.modeling.configuration_shiftdc import ShiftDCLlavaConfig

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(ShiftDCLlavaConfig.shiftdc_unguarded(config)))


ISOLATED = """
import sys
sys.path.insert(0, sys.argv[2])  # site-packages without its .pth files: no editable install
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
try:
    import exporter.modeling  # hatchling leaves a bare exporter/_resources folder there
except ImportError:
    pass
else:
    sys.exit("exporter is importable")
folder = sys.argv[1]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image = Image.new("RGB", (40, 40), (200, 30, 30))
inputs = processor(text="USER: <image>\\nHow? ASSISTANT:", images=image, return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
assert out.shape[1] == inputs["input_ids"].shape[1] + 3, out.shape
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
message = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "How?"}]}]
print(type(model).__name__, isinstance(pipe(text=message, max_new_tokens=3, return_full_text=False)[0]["generated_text"], str))
"""


def test_it_runs_where_this_package_is_not_importable(make_export, tmp_path):
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ISOLATED, str(make_export().plan.output), sysconfig.get_path("purelib")],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ShiftDCLlavaForConditionalGeneration", "True"]
