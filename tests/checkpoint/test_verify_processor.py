"""`verify` remakes the probe's inputs with the export's own processor, in a process without this package."""

from __future__ import annotations

from datetime import date

import pytest
import tiny_families
import torch
from safetensors import safe_open
from tiny import TEMPLATE, tiny_processor
from transformers import AutoProcessor

from exporter.checkpoint.probe import PROBE, _processed, _texts
from exporter.checkpoint.verify_worker import libraries, remakes_inputs
from exporter.data.images import typographic_image
from exporter.models.chat_template import DAY
from exporter.models.processors import ODD_TEXT
from exporter.models.recipe import load_recipe
from exporter.models.vlm import VLM


class Anything:
    """A model of which only the processor is asked."""

    device = torch.device("cpu")

    def get_input_embeddings(self):
        return torch.nn.Embedding(1, 1)


def recorded(processor):
    """The probe's tensors and texts, less those of the model."""
    vlm, picture = VLM(Anything(), processor), typographic_image("hello")
    inputs = vlm.encode(["What is shown in the image?"], [picture])
    return {**{f"input.{k}": v for k, v in inputs.items()}, **_processed(vlm, picture)}, _texts(vlm, picture)


def saved(folder, processor):
    """The folder, and the processor as any loads it: with torchvision, where that is installed."""
    processor.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "shiftdc_llava"}')
    return folder, AutoProcessor.from_pretrained(folder, trust_remote_code=False)


@pytest.fixture
def llava(tmp_path):
    return saved(tmp_path / "llava", tiny_processor())


def test_the_same_files_make_the_same_inputs(llava):
    folder, processor = llava
    assert remakes_inputs(folder, *recorded(processor)) == []


@pytest.mark.parametrize("name", ["instructblip", "blip_2", "mllama", "gemma3"])
def test_families(tmp_path, name):
    family = tiny_families.tiny_family(name)
    _, processor = saved(tmp_path, family.processor)
    if family.recipe != "llava":
        processor.chat_template = load_recipe(family.recipe).chat_template
    tensors, texts = recorded(processor)
    assert remakes_inputs(tmp_path, tensors, texts) == []
    if name == "instructblip":
        assert {"tokens.qformer_tokenizer", "input.qformer_input_ids"} <= tensors.keys()
        other = tiny_processor().tokenizer
        other.add_tokens(["What is"])
        other.save_pretrained(tmp_path / "qformer_tokenizer")
        found = remakes_inputs(tmp_path, tensors, texts)
        assert any("makes other qformer_input_ids than the base model's" in f for f in found), found


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "chat_template.jinja",
            lambda t: t.replace("USER", "User").replace("upper", "title"),
            "chat template gives another prompt",
        ),
        (
            "tokenizer.json",
            lambda t: t.replace('"add_prefix_space": false', '"add_prefix_space": true', 1),
            "makes other input_ids than",
        ),
        ("processor_config.json", lambda t: t.replace("0.26862954", "0.26862964"), "makes other pixel_values than"),
        ("processor_config.json", lambda t: t.replace('"resample": 3', '"resample": 2'), "makes other pixel_values than"),
    ],
)
def test_changed_files_are_found(llava, file, change, message):
    folder, processor = llava
    probe = recorded(processor)
    before = (folder / file).read_text()
    assert change(before) != before
    (folder / file).write_text(change(before))
    found = remakes_inputs(folder, *probe)
    assert any(message in f for f in found), found


def test_other_libraries_may_differ_in_a_bit_of_a_pixel(llava):
    folder, processor = llava
    tensors, texts = recorded(processor)
    tensors["input.pixel_values"] = tensors["input.pixel_values"] * (1 + 1e-6)
    assert any("pixel_values" in f for f in remakes_inputs(folder, tensors, texts))
    texts["libraries"] = libraries().replace("pillow", "pillow-simd")
    assert remakes_inputs(folder, tensors, texts) == []
    tensors["input.pixel_values"] = tensors["input.pixel_values"] + 0.2
    assert any("pixel_values" in f for f in remakes_inputs(folder, tensors, texts))


def test_a_template_with_a_date_is_read_on_the_day_of_the_export(tmp_path):
    _, processor = saved(tmp_path, tiny_processor("{{ strftime_now('%d %b %Y') }} " + TEMPLATE))
    tensors, texts = recorded(processor)
    written = date.fromisoformat(DAY)
    assert texts["prompt"].startswith(written.strftime("%d %b %Y"))
    assert remakes_inputs(tmp_path, tensors, texts) == []
    another = {**texts, "day": "2001-02-03", "prompt": texts["prompt"].replace(written.strftime("%d %b %Y"), "03 Feb 2001")}
    found = remakes_inputs(tmp_path, tensors, another)
    assert found and not any("chat template" in f for f in found)


def test_a_probe_of_an_earlier_version(llava):
    assert remakes_inputs(llava[0], {}, {}) == [
        "its probe is of an earlier version, without the picture and the prompt; export again"
    ]


def test_an_export_has_it(make_export):
    folder = make_export().plan.output
    with safe_open(folder / PROBE, "pt") as stored:
        texts, probe = stored.metadata(), {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118 (no mapping)
    assert (texts["odd_text"], texts["libraries"]) == (ODD_TEXT, libraries())
    assert remakes_inputs(folder, probe, texts) == []
