"""`verify` remakes the probe's inputs with the export's own processor, in a process without this package."""

from __future__ import annotations

from datetime import date, datetime
from importlib import metadata

import pytest
import tiny_families
import torch
from safetensors import safe_open
from tiny import TEMPLATE, tiny_processor
from transformers import AutoProcessor
from transformers.utils import chat_template_utils

from exporter.checkpoint.probe import PROBE, _processed, _texts
from exporter.checkpoint.verify_worker import AS_RECORDED, _same, libraries, on_the_day, remakes_inputs
from exporter.data.images import typographic_image
from exporter.models.chat_template import DAY
from exporter.models.processors import ODD_TEXT
from exporter.models.recipe import load_recipe
from exporter.models.vlm import VLM


class Anything:
    """A model of which only the processor is asked."""

    device, dtype = torch.device("cpu"), torch.float32

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
    with pytest.raises(ZeroDivisionError), on_the_day("2001-02-03"):
        assert chat_template_utils.datetime.now() == datetime(2001, 2, 3)
        raise ZeroDivisionError
    assert chat_template_utils.datetime is datetime  # and templates of others are read today


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


class Recorder:
    """A processor that does as recorded, but in what it is told, and keeps how it was asked."""

    chat_template = "a template"

    def __init__(self, **changed):
        self.ids = torch.tensor([[1, 4, 9]])
        self.prompt, self.tokens, self.inputs = "USER: hello", [5, 6], {"input_ids": self.ids}
        self.asked = []
        vars(self).update(changed)

    @staticmethod
    def get_attributes():
        return ()

    def tokenizer(self, text):
        assert text == "odd"
        return {"input_ids": self.tokens}

    def apply_chat_template(self, conversation, **options):
        self.asked.append(options)
        batched = isinstance(conversation[0], list)
        (turn,) = conversation[0] if batched else conversation
        assert (turn["role"], turn["prompt"]) == ("user", "USER: hello")
        image, text = turn["content"]
        assert image["type"] == "image" and image["image"].size == typographic_image("hello").size
        assert text == {"type": "text", "text": "What?"}
        return self.inputs if batched else self.prompt


@pytest.fixture
def remade(tmp_path, monkeypatch):
    """remade(**what one of the two ways of loading gives) -> failures."""
    probe = {"input.input_ids": Recorder().ids, "tokens.tokenizer": torch.tensor([5, 6]), "logits": torch.ones(1)}
    probe["picture"] = _processed(VLM(Anything(), Recorder()), typographic_image("hello"))["picture"]
    texts = {"odd_text": "odd", "request": "What?", "prompt": "USER: hello", "day": DAY, "libraries": libraries()}

    def remade(trusted=False, **changed):
        remade.used = []

        def load(folder, trust_remote_code):
            assert folder == tmp_path
            remade.used.append(Recorder(**(changed if trust_remote_code is trusted else {})))
            return remade.used[-1]

        monkeypatch.setattr(AutoProcessor, "from_pretrained", load)
        return remakes_inputs(tmp_path, probe, texts)

    return remade


def test_the_processor_is_asked_as_when_the_probe_was_recorded(remade):
    assert remade() == []
    written = {"add_generation_prompt": True, "tokenize": False}
    padded = {"padding": True, "padding_side": "left"}
    made = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": padded}
    assert [p.asked for p in remade.used] == [[written, {**made, "chat_template": AS_RECORDED}]] * 2


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    ("changed", "failure"),
    [
        ({"tokens": [5, 7]}, "its tokenizer gives other tokens than the base model's"),
        ({"prompt": "USER: hallo"}, "its chat template gives another prompt than the base model's"),
        (
            {"inputs": {"input_ids": torch.tensor([[1, 4, 8]])}},
            f"its processor makes other input_ids than the base model's (recorded with {libraries()})",
        ),
        ({"inputs": {}}, f"its processor makes other input_ids than the base model's (recorded with {libraries()})"),
    ],
)
def test_each_difference_is_found_however_it_is_loaded(remade, trusted, changed, failure):
    assert remade(trusted, **changed) == [failure]


def test_a_family_whose_template_is_the_recipes(remade):
    assert remade(chat_template=None, prompt="none") == []
    assert [len(p.asked) for p in remade.used] == [1, 2]


def test_which_inputs_are_the_same():
    pixels = torch.tensor([1.0, 2.0])
    assert _same(pixels.clone(), pixels, 0.0) and _same(pixels.clone(), pixels, 0.1)
    assert not _same(pixels + 1e-6, pixels, 0.0)
    assert _same(pixels + 0.125, pixels, 0.0625) and not _same(pixels + 0.25, pixels, 0.0625)  # of the largest
    assert not _same(pixels * torch.nan, pixels, 0.1)
    assert _same(pixels.double(), pixels, 0.0)  # recorded in the model's dtype
    ids = torch.tensor([100, 101])
    assert _same(ids.clone(), ids, 0.0) and _same(ids.clone(), ids, 0.1)
    assert not _same(ids + 1, ids, 0.1)  # another id is another token, however near
    for other in (None, [1.0, 2.0], pixels[None], pixels[:1], ids):
        assert not _same(other, pixels, 0.1)


def test_what_pixels_depend_on_is_named(monkeypatch):
    def version(name):
        if name == "torchvision":
            raise metadata.PackageNotFoundError
        return f"{len(name)}.0"

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert libraries() == ("numpy 5.0, pillow 6.0, tokenizers 10.0, torch 5.0, torchvision absent, transformers 12.0, riscv64")
