"""PEFT adapters: merged bit for bit, kept apart without a silent way around them, refused where they do not fit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys

import pytest
import torch
from bad_inputs.workshop import sparse
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import save_tiny_llava
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaForConditionalGeneration

from exporter.checkpoint.adapter import merge, resolve_adapter
from exporter.checkpoint.verify import verify
from exporter.cli.commands import main
from exporter.errors import InputError, VerificationError
from exporter.models.base import resolve
from exporter.pipeline.export import export
from exporter.pipeline.plan import ExportOptions, make_plan
from exporter.publishing.card_metadata import Inherited, inherit

INPUTS = {"input_ids": torch.tensor([[1, 4, 4, 4, 4, 9, 17]]), "pixel_values": torch.ones(1, 3, 28, 28)}
TARGETS = r".*language_model.layers.3.*(q_proj|up_proj)"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """In four shards, bfloat16."""
    return save_tiny_llava(tmp_path_factory.mktemp("adapted") / "tiny-base", dtype=torch.bfloat16, sharded=True)


@pytest.fixture(scope="module")
def make_adapter(base, tmp_path_factory):
    def make(**options):
        torch.manual_seed(0)
        settings = {"r": 2, "target_modules": TARGETS, "init_lora_weights": False, **options}
        tuned = get_peft_model(LlavaForConditionalGeneration.from_pretrained(base), LoraConfig(**settings))
        folder = tmp_path_factory.mktemp("adapter") / "tuned"
        tuned.save_pretrained(folder, save_embedding_layers=False)
        return folder

    return make


@pytest.fixture(scope="module")
def adapter(make_adapter):
    return make_adapter()


def by_peft(base, adapter):
    return PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base), adapter).merge_and_unload()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "r": 4},
        {"use_dora": True},
        {"target_modules": r".*(vision_tower.*fc1|multi_modal_projector.*linear_1|lm_head)"},
        {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"up_proj": 7}},
    ],
    ids=["lora", "rslora", "dora", "everywhere", "patterns"],
)
def test_merging_equals_peft_to_the_bit(base, make_adapter, tmp_path, options):
    folder = make_adapter(**options)
    checkpoint = resolve(str(base))
    merged = merge(checkpoint, resolve_adapter(str(folder), checkpoint), tmp_path)
    found = LlavaForConditionalGeneration.from_pretrained(merged.folder).state_dict()
    expected, before = by_peft(base, folder).state_dict(), LlavaForConditionalGeneration.from_pretrained(base).state_dict()
    assert all(torch.equal(found[k], expected[k]) and found[k].dtype == torch.bfloat16 for k in expected)
    assert any(not torch.equal(found[k], before[k]) for k in before)


def test_the_merged_checkpoint_has_the_base_s_licence(base, adapter, tmp_path):
    folder = shutil.copytree(base, tmp_path / "tiny-base")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n")
    (folder / "LICENSE").write_text("Do what you like.")
    (tmp_path / "merged").mkdir()
    checkpoint = resolve(str(folder))
    merged = merge(checkpoint, resolve_adapter(str(adapter), checkpoint), tmp_path / "merged")
    assert inherit(merged) == inherit(checkpoint) == Inherited(("other",), "mine", "LICENSE", ())
    assert (merged.folder / "LICENSE").read_text() == "Do what you like."


@pytest.fixture(scope="module")
def exported(base, adapter, calibration_file, tmp_path_factory):
    """export(keep) -> folder, made once each."""
    made = {}

    def make(keep):
        if keep not in made:
            output = tmp_path_factory.mktemp("out") / "calibrated"
            settings = {"layers": "1-2", "calibration": str(calibration_file), "caption_max_new_tokens": 4}
            made[keep] = export(
                make_plan(str(base), ExportOptions.of(output=output, adapter=str(adapter), keep_adapter=keep, **settings))
            ).plan.output
        return made[keep]

    return make


def test_the_merged_export(base, adapter, exported):
    before = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in base.iterdir()}
    folder = exported(False)
    assert {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in base.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]  # nothing temporary is left
    shards = [(f, folder / f.name) for f in base.glob("model-*.safetensors")]
    assert not any(shard.samefile(f) or shard.is_symlink() for f, shard in shards)
    same = [f.read_bytes() == shard.read_bytes() for f, shard in shards]
    assert any(same) and not all(same)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    inputs = {**INPUTS, "pixel_values": INPUTS["pixel_values"].bfloat16()}
    assert torch.equal(model(**inputs, shiftdc=False).logits, by_peft(base, adapter)(**inputs).logits)
    about = json.loads((folder / "shiftdc_report.json").read_text())["adapter"]
    assert (about["id"], about["merged"], len(about["sha256"])) == ("tuned", True, 64)
    card = (folder / "README.md").read_text()
    assert "`tuned`" in card and about["sha256"][:16] in card and "bit for bit" not in card
    assert str(adapter.parent) not in card + (folder / "shiftdc_report.json").read_text()


class TestKeptApart:
    @pytest.fixture
    def folder(self, exported, tmp_path):
        return shutil.copytree(exported(True), tmp_path / "copy")

    def test_it_is_loaded_with_the_checkpoint(self, base, adapter, exported):
        folder = exported(True)
        assert all((folder / f.name).read_bytes() == f.read_bytes() for f in base.glob("model-*.safetensors"))
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        inputs = {**INPUTS, "pixel_values": INPUTS["pixel_values"].bfloat16()}
        stock = LlavaForConditionalGeneration.from_pretrained(base)
        stock.load_adapter(str(adapter))
        assert torch.equal(model(**inputs, shiftdc=False).logits, stock(**inputs).logits)
        bare = LlavaForConditionalGeneration.from_pretrained(base)
        assert not torch.equal(model(**inputs, shiftdc=False).logits, bare(**inputs).logits)
        assert not torch.equal(model(**inputs, shiftdc_position=torch.tensor([6])).logits, stock(**inputs).logits)
        assert "needs PEFT" in (folder / "README.md").read_text()
        with pytest.raises(ValueError, match="without the model"):
            model.save_pretrained(folder.parent / "again")

    def test_without_peft_it_does_not_load(self, folder, monkeypatch):
        AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        shared = sys.modules[next(c.__module__ for c in type(model).__mro__ if c.__name__ == "ShiftDCMixin")]
        monkeypatch.setattr(shared, "is_peft_available", lambda: False)
        with pytest.raises(ImportError, match="pip install peft"):
            AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)

    def test_a_lost_adapter(self, folder):
        shutil.rmtree(folder / "adapter")
        with pytest.raises((OSError, ValueError), match="adapter"):
            AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        with pytest.raises(VerificationError, match=r"adapter/adapter_config\.json is missing"):
            verify(folder)

    def test_half_an_adapter(self, folder):
        file = folder / "adapter" / "adapter_model.safetensors"
        factors = load_file(file)
        factors.pop(min(factors))
        save_file(factors, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="incomplete"):
            AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        with pytest.raises(VerificationError, match=r"adapter_model\.safetensors was changed"):
            verify(folder)

    def test_from_a_config_alone_it_does_not_run(self, folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
        with pytest.raises(ValueError, match="together with its PEFT adapter"):
            model(**INPUTS)


def change_config(folder, **changes):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def change_factors(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def write_config(folder, content):
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").write_bytes(content)


def pipe(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)  # who opens it to read waits for ever


#: Matches nothing, after more steps than there are atoms.
ENDLESS = r"([a-z0-9_.]+)+!"


def to_pickle(folder):
    torch.save({}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "has no readable adapter_config.json"),
        (lambda f: write_config(f, b'{"peft_type": ' + b"[" * 100_000), "has no readable adapter_config.json (it is nested too"),
        (lambda f: sparse(f / "adapter_config.json", 10**9), "has no readable adapter_config.json (it has more than"),
        (lambda f: write_config(f, b'{"a": "\xff"}'), "has no readable adapter_config.json (byte 7 is not UTF-8"),
        (lambda f: pipe(f, "adapter_config.json"), "has no readable adapter_config.json (it is no regular file)"),
        (lambda f: pipe(f, "adapter_model.safetensors"), "has no adapter_model.safetensors"),
        (lambda f: write_config(f, b"[]"), "names no peft_type"),
        (lambda f: change_config(f, peft_type=["LORA"]), "names no peft_type"),
        (
            lambda f: change_config(f, base_model_name_or_path=["x"]),
            "base_model_name_or_path in the adapter_config.json of tuned is a",
        ),
        (lambda f: change_config(f, base_model_name_or_path=7), "is a int and no text; correct it"),
        (lambda f: change_config(f, base_model_name_or_path=0), "is a int and no text; correct it"),
        (lambda f: change_config(f, base_model_name_or_path="a\0b"), "was trained on a\\x00b"),
        (lambda f: change_config(f, base_model_name_or_path="a\ud800b"), "was trained on a\\ud800b"),
        (lambda f: change_config(f, base_model_name_or_path="b" * 100_000), "was trained on bbb"),
        (lambda f: change_config(f, target_modules=ENDLESS), "is not matched within 0.3 seconds; correct it"),
        (lambda f: change_config(f, exclude_modules=ENDLESS), "is not matched within 0.3 seconds; correct it"),
        (lambda f: change_config(f, rank_pattern={ENDLESS: 2}), "is not matched within 0.3 seconds; correct it"),
        (lambda f: change_config(f, target_modules="("), "does not fit tiny-base"),
        (lambda f: change_config(f, target_modules=7), "does not fit tiny-base"),
        (lambda f: change_config(f, r="many"), "does not fit tiny-base"),
        (lambda f: change_config(f, rank_pattern=[1]), "does not fit tiny-base"),
        (lambda f: change_config(f, megatron_config={"x": 1}, megatron_core="antigravity"), "names code (megatron_core)"),
        (lambda f: change_config(f, peft_type="LOHA"), "is of type LOHA, expected LORA"),
        (to_pickle, "only a pickle file"),
        (lambda f: change_config(f, base_model_name_or_path="someone/else"), "was trained on someone/else"),
        (lambda f: change_config(f, modules_to_save=["lm_head"]), "more than low-rank factors (modules_to_save)"),
        (lambda f: change_config(f, bias="all"), "more than low-rank factors (bias)"),
        (lambda f: change_config(f, target_modules=["nowhere"]), "does not fit tiny-base"),
        (lambda f: change_factors(f, lambda t: {k: v[:, :-1].contiguous() for k, v in t.items()}), "does not fit tiny-base"),
        (lambda f: change_factors(f, lambda t: dict(list(t.items())[1:])), "it lacks some of the factors"),
        (lambda f: change_factors(f, lambda t: {**t, "base_model.model.x.lora_A.weight": torch.ones(2)}), "it holds"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 99), "is not a whole safetensors file"),
    ],
    ids=[
        "config",
        "deep",
        "large",
        "bytes",
        "pipe",
        "weights a pipe",
        "list",
        "type a list",
        "base a list",
        "base a number",
        "base 0",
        "base with NUL",
        "base with half a character",
        "base without end",
        "endless targets",
        "endless exclusion",
        "endless ranks",
        "no pattern",
        "targets a number",
        "rank a word",
        "ranks a list",
        "code",
        "type",
        "pickle",
        "base",
        "modules",
        "bias",
        "targets",
        "shapes",
        "missing",
        "left over",
        "damaged",
    ],
)
def test_adapters_that_do_not_fit_are_one_sentence(base, adapter, calibration_file, tmp_path, monkeypatch, damage, message):
    monkeypatch.setattr("exporter.checkpoint.adapter.LIMIT", 0.3)
    folder = shutil.copytree(adapter, tmp_path / "tuned")
    damage(folder)
    arguments = [base, "--adapter", folder, "--calibration", calibration_file, "--output", tmp_path / "out", "--layers", "1"]
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.startswith("Error: --adapter: ") and done.stderr.endswith(".\n") and len(done.stderr) < 2000
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_tied_weights_are_not_merged_apart(tmp_path):
    base = save_tiny_llava(tmp_path / "tied", tied=True)
    tuned = get_peft_model(LlavaForConditionalGeneration.from_pretrained(base), LoraConfig(r=2, target_modules=["lm_head"]))
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(InputError, match="shares its weight"):
        resolve_adapter(str(tmp_path / "adapter"), resolve(str(base)))


def test_keeping_needs_an_adapter(base, tmp_path):
    with pytest.raises(InputError, match="no adapter to keep"):
        make_plan(str(base), ExportOptions.of(output=tmp_path / "out", keep_adapter=True))
