"""Every silent way of getting an uncalibrated model out of an export ends in an error."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    pipeline,
)

from exporter.checkpoint.open import open_export
from exporter.checkpoint.verify import verify
from exporter.errors import InputError
from exporter.modeling import configuration_shiftdc
from exporter.modeling.configuration_shiftdc import FORMAT_VERSION, TRANSFORMERS, ShiftDCLlavaConfig, require_transformers
from exporter.modeling.modeling_shiftdc import (
    ShiftDCCorrection,
    ShiftDCLlavaForConditionalGeneration,
    ShiftDCMixin,
    buffers_sha256,
)

ROOT = Path(__file__).parents[2]
CAPTIONS = {"gate": "two-sided", "caption_max_new_tokens": 8, "strength": 3.0}
BUFFER = "model.language_model.layers.1.shiftdc.direction"


@pytest.fixture
def export(make_export, tmp_path):
    """A copy of an export that a test may damage."""
    return shutil.copytree(make_export().plan.output, tmp_path / "export")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def damage_buffer(folder, tensor):
    buffers = load_file(folder / "shiftdc.safetensors")
    if tensor is None:
        del buffers[BUFFER]
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        del index["weight_map"][BUFFER]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        buffers[BUFFER] = tensor
    save_file(buffers, folder / "shiftdc.safetensors", metadata={"format": "pt"})


def load(folder, **options):
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **options)


def test_the_undamaged_copy_loads(export):
    assert type(load(export)).__name__ == "ShiftDCLlavaForConditionalGeneration"


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModel, AutoConfig])
def test_auto_classes_without_trust_name_it(export, auto):
    with pytest.raises(ValueError, match="trust_remote_code"):
        auto.from_pretrained(export, trust_remote_code=False)


def test_pipeline_without_trust_names_it(export):
    with pytest.raises(ValueError, match="trust_remote_code"):
        pipeline("image-text-to-text", model=str(export), trust_remote_code=False)


def test_auto_model_with_trust_gives_no_backbone(export):
    """The bare backbone would be uncalibrated."""
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModel.from_pretrained(export, trust_remote_code=True)


@pytest.mark.parametrize("stock", [LlavaForConditionalGeneration, LlavaModel, LlavaConfig])
def test_stock_classes_are_told_what_it_is(export, stock):
    with pytest.raises(Exception, match="calibrated by ShiftDC"):
        stock.from_pretrained(export)


def test_the_guard_stands_between_the_stock_class_and_success(export):
    """Without it the stock class loads: the test above would otherwise pass for another reason."""
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(ShiftDCLlavaConfig.shiftdc_unguarded(config)))
    assert isinstance(LlavaForConditionalGeneration.from_pretrained(export), LlavaForConditionalGeneration)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (None, "missing or damaged"),
        (torch.full((32,), torch.nan), "missing or damaged"),
        (torch.full((32,), torch.inf), "missing or damaged"),
        (torch.zeros(32), "missing or damaged"),
        (torch.ones(32), "missing or damaged"),
        (torch.ones(31) / 31**0.5, "mismatch"),
    ],
    ids=["absent", "nan", "inf", "zero", "not unit", "wrong shape"],
)
def test_damaged_buffers(export, tensor, message):
    damage_buffer(export, tensor)
    with pytest.raises((ValueError, RuntimeError), match=message):
        load(export)


def test_wrong_shapes_do_not_pass_with_ignore_mismatched_sizes(export):
    damage_buffer(export, torch.ones(31) / 31**0.5)
    with pytest.raises(ValueError, match="missing or damaged"):
        load(export, ignore_mismatched_sizes=True)


def test_the_shard_gone(export):
    (export / "shiftdc.safetensors").unlink()
    with pytest.raises(OSError, match=r"shiftdc\.safetensors"):
        load(export)


def test_a_single_file_beside_the_index_wins_and_is_caught(export):
    """transformers prefers model.safetensors to an index; the buffers are then missing."""
    shutil.copy(export / "model-00001-of-00002.safetensors", export / "model.safetensors")
    with pytest.raises(ValueError, match="missing or damaged"):
        load(export)


def test_no_shiftdc_block(export):
    config = json.loads((export / "config.json").read_text())
    config = ShiftDCLlavaConfig.shiftdc_unguarded(config)
    del config["shiftdc"]
    (export / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no 'shiftdc' block"):
        load(export)


def test_another_format_version(export):
    config = json.loads((export / "config.json").read_text())
    edit_config(export, shiftdc={**config["shiftdc"], "version": 99})
    with pytest.raises(ValueError, match=f"version is 99, expected {FORMAT_VERSION}"):
        load(export)


def of_format_2(prompt):
    """Heads had no alternatives, and what stands around an image was in two sets."""
    kept = {k: v for k, v in prompt.items() if k not in ("heads", "around")}
    before, after, _ = zip(*prompt["around"], strict=True)
    return {**kept, "head": prompt["heads"][0], "before": list(before), "after": list(after)}


@pytest.fixture
def export_of_format_2(make_export, tmp_path):
    """An export as version 0.1.0 wrote it before the code was put into files by role; its tokens are those of today's."""
    folder = shutil.copytree(make_export(**CAPTIONS).plan.output, tmp_path / "of_format_2")
    for file in folder.glob("*.py"):
        file.unlink()
    with zipfile.ZipFile(Path(__file__).parent / "format_2_llava.zip") as code:
        code.extractall(folder)
    config = ShiftDCLlavaConfig.shiftdc_unguarded(json.loads((folder / "config.json").read_text()))
    field, sentence = "vision_feature_select_strategy", configuration_shiftdc.STOCK_CLASS_GUARD
    block = {k: v for k, v in config["shiftdc"].items() if k != "traits"}
    block |= {"version": 2, "guarded": {"field": field, "value": config[field]}}
    block["prompt"] = of_format_2(block["prompt"])
    block["decoder_layers"] = config["shiftdc"]["traits"]["decoder_layers"]
    classes = {
        "AutoConfig": "modeling_shiftdc_config.ShiftDCLlavaConfig",
        "AutoModelForImageTextToText": "modeling_shiftdc_llava.ShiftDCLlavaForConditionalGeneration",
    }
    (folder / "config.json").write_text(json.dumps({**config, field: sentence, "shiftdc": block, "auto_map": classes}))
    return folder


def test_an_export_of_format_2_goes_on_with_its_own_code(export_of_format_2, make_export):
    old, new = load(export_of_format_2), load(make_export(**CAPTIONS).plan.output)
    assert (old.config.shiftdc["version"], new.config.shiftdc["version"]) == (2, FORMAT_VERSION)
    assert any(c.__module__.endswith(".modeling_shiftdc_forward") for c in type(old).__mro__)  # a file of that format
    ids = torch.tensor([[1, 4, 4, 4, 4, 9, 10, 11]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    given = {"pixel_values": pixels, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(old.shiftdc_reference(ids, pixel_values=pixels), new.shiftdc_reference(ids, pixel_values=pixels))
    assert torch.equal(old.generate(ids, **given), new.generate(ids, **given))
    assert torch.equal(old.generate(ids, **given, shiftdc=False), new.generate(ids, **given, shiftdc=False))


def test_an_export_of_format_2_is_to_be_exported_again(export_of_format_2):
    for command in (verify, open_export):
        with pytest.raises(InputError, match=f"is of format version 2, expected {FORMAT_VERSION}: export the checkpoint again"):
            command(export_of_format_2)


def test_a_model_from_the_config_alone_does_not_run(export):
    config = AutoConfig.from_pretrained(export, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
    with pytest.raises(ValueError, match="missing or damaged"):
        model(input_ids=torch.tensor([[1, 4, 4, 4, 4, 9]]), pixel_values=torch.zeros(1, 3, 28, 28))
    with pytest.raises(ValueError, match="missing or damaged"):
        model.generate(torch.tensor([[1, 4, 4, 4, 4, 9]]), max_new_tokens=1)


def test_buffers_loaded_later_are_checked_again(export):
    model = ShiftDCLlavaForConditionalGeneration.from_pretrained(export)
    state = model.state_dict()
    state[BUFFER] = torch.full_like(state[BUFFER], torch.nan)
    model.load_state_dict(state)
    with pytest.raises(ValueError, match="layer 1 are missing or damaged"):
        model.generate(torch.tensor([[1, 4, 4, 4, 4, 9]]), max_new_tokens=1)


def other_buffers(folder, change):
    buffers = load_file(folder / "shiftdc.safetensors")
    save_file(change(buffers), folder / "shiftdc.safetensors", metadata={"format": "pt"})


OTHER = {
    "a flipped sign": lambda b: {**b, BUFFER: -b[BUFFER]},
    "another layer's": lambda b: {**b, BUFFER: b[BUFFER.replace(".1.", ".2.")].clone()},
    "another shift": lambda b: {**b, (n := BUFFER.replace("direction", "shift")): -b[n]},
    "one bit": lambda b: {**b, BUFFER: torch.nextafter(b[BUFFER], torch.tensor(2.0))},
}


@pytest.mark.parametrize("change", OTHER)
def test_other_buffers_than_the_config_records(export, change):
    other_buffers(export, OTHER[change])
    with pytest.raises(ValueError, match=r"layer 1 are not those that config.json records .*export it again"):
        load(export)


def test_other_buffers_behind_an_offloaded_layer(export, tmp_path):
    """Their tensors are read from disk when the layer runs."""
    names = ["vision_tower", "multi_modal_projector", *(f"language_model.{n}" for n in ("embed_tokens", "norm", "rotary_emb"))]
    places = {"lm_head": "cpu"} | {f"model.{name}": "cpu" for name in names}
    places |= {f"model.language_model.layers.{i}": "disk" if i < 3 else "cpu" for i in range(4)}
    options = {"device_map": places, "offload_folder": tmp_path / "offload"}
    ids = torch.tensor([[1, 4, 4, 4, 4, 9]])
    pixels = torch.zeros(1, 3, 28, 28)
    load(export, **options).generate(ids, pixel_values=pixels, max_new_tokens=1)
    other_buffers(export, OTHER["a flipped sign"])
    with pytest.raises(ValueError, match="layer 1 are not those"):
        load(export, **options).generate(ids, pixel_values=pixels, max_new_tokens=1)


def test_a_config_without_a_record_of_the_buffers(export):
    config = json.loads((export / "config.json").read_text())
    settings = {k: v for k, v in config["shiftdc"].items() if k != "buffers_sha256"}
    edit_config(export, shiftdc=settings)
    with pytest.raises(ValueError, match="buffers_sha256"):
        load(export)


def test_other_buffers_loaded_later(export):
    model = ShiftDCLlavaForConditionalGeneration.from_pretrained(export)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict({**state, BUFFER: -state[BUFFER]})
    with pytest.raises(ValueError, match="layer 1 are not those"):
        model.generate(torch.tensor([[1, 4, 4, 4, 4, 9]]), max_new_tokens=1)
    model.load_state_dict(state)
    model.generate(torch.tensor([[1, 4, 4, 4, 4, 9]]), pixel_values=torch.zeros(1, 3, 28, 28), max_new_tokens=1)


@pytest.mark.parametrize("version", ["4.57.6", "5.2.0", "5.19.1"])
def test_a_transformers_that_is_too_old_is_told_in_one_sentence(export, monkeypatch, version):
    copy = export.rename(export.with_name(f"for_{version.replace('.', '_')}"))  # its code is read anew
    monkeypatch.setattr(transformers, "__version__", version)
    for auto in (AutoConfig, AutoModelForImageTextToText):
        with pytest.raises(
            ImportError, match=rf"needs transformers {TRANSFORMERS} or newer, found {version}: pip install [^\n]*$"
        ):
            auto.from_pretrained(copy, trust_remote_code=True)


def test_the_version_that_is_needed(export):
    for version in ("5.20.0", "5.23.1", "5.100.0.dev0", "6.0.0"):
        require_transformers(version)
    assert f'"transformers>={TRANSFORMERS},<6"' in (ROOT / "pyproject.toml").read_text()
    assert f"transformers {TRANSFORMERS} or newer is needed" in (export / "README.md").read_text()
    # versions before 5.0 fetch no more than the files that the first one names
    assert not re.findall(r"^ *from \.", Path(configuration_shiftdc.__file__).read_text(), re.MULTILINE)
    config = json.loads((export / "config.json").read_text())
    assert config["auto_map"]["AutoConfig"] == "configuration_shiftdc.ShiftDCLlavaConfig"


def test_continuous_batching_is_refused(export):
    model = load(export)
    ids = torch.tensor([[1, 4, 4, 4, 4, 9]])
    for call in (
        lambda: model.generate_batch(ids.tolist()),
        model.init_continuous_batching,
        model.continuous_batching_context_manager,
        lambda: model.generate(ids, cache_implementation="paged", pixel_values=torch.zeros(1, 3, 28, 28)),
        lambda: model.generate(ids, cache_implementation="paged", shiftdc=False),
    ):
        with pytest.raises(ValueError, match=r"Continuous batching .*call generate\(\)"):
            call()


def test_a_shift_that_is_missing_is_no_number():
    correction = ShiftDCCorrection(4, 0, 1.0, False, 7, "")
    correction.direction.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert correction.shift.isnan()
    correction.sha256 = buffers_sha256(correction.direction, correction.shift)
    with pytest.raises(ValueError, match="buffers of decoder layer 7 are missing or damaged"):
        correction.check()


def test_buffers_that_a_checkpoint_lacks_become_no_numbers():
    """What transformers leaves there is uninitialised memory; it asks the model to fill what was not loaded."""
    correction = ShiftDCCorrection(4, 0, 1.0, False, 7, "")
    correction.direction.fill_(0.5)._is_hf_initialized = True  # loaded
    correction.shift.zero_()
    ShiftDCMixin._init_weights(None, correction)
    assert correction.direction.tolist() == [0.5] * 4 and correction.shift.isnan()
