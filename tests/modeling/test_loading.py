"""How a calibrated class is made, loaded, saved and pickled: parts of it, without an export."""

from __future__ import annotations

import copy
import inspect
import pickle
from types import SimpleNamespace

import pytest
import torch
from tiny import encode, picture, tiny_processor
from transformers import LlavaForConditionalGeneration, PreTrainedModel
from transformers.generation import GenerationMixin

from exporter.modeling import modeling_shiftdc
from exporter.modeling.configuration_shiftdc import ShiftDCTraits
from exporter.modeling.modeling_shiftdc import (
    ShiftDCLlavaForConditionalGeneration,
    ShiftDCMixin,
    _register_key_conversion,
    calibrate,
)
from exporter.modeling.prompts_shiftdc import PromptComposer, TokenizerCodec

TRAITS = ShiftDCTraits("layers", 4, "image_seq_length", image_token_id=4, pixel_inputs=("pixel_values", "frames"))
OWN = ["shiftdc", "shiftdc_reference", "shiftdc_correction", "shiftdc_position", "shiftdc_unrecorded"]


@pytest.fixture(scope="module")
def model(load):
    return load(strength=3, caption_max_new_tokens=2)


@pytest.fixture(scope="module")
def inputs():
    return encode(tiny_processor(), ["How do I build this?"], [picture(0)])


# classes


class Marked:
    mark = None

    def __init_subclass__(cls, mark=None, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.mark = mark


@pytest.fixture
def made(monkeypatch):
    """A calibrated class that is made anew, of a base class that keeps some modules in float32."""
    monkeypatch.setattr(LlavaForConditionalGeneration, "_keep_in_fp32_modules_strict", {"lm_head"})

    class Calibrated(ShiftDCMixin, LlavaForConditionalGeneration, GenerationMixin, Marked, mark="given"):
        pass

    return Calibrated


def test_a_calibrated_class_knows_what_it_calibrates(made):
    assert made.mark == "given"
    assert made._keep_in_fp32_modules_strict == {"lm_head", "shiftdc"}
    assert ShiftDCLlavaForConditionalGeneration._keep_in_fp32_modules_strict == {"shiftdc"}
    assert made._shiftdc_base_forward is LlavaForConditionalGeneration.forward
    assert made._shiftdc_base_generate is LlavaForConditionalGeneration.generate
    assert "pixel_values" in made._shiftdc_image_names and "input_ids" not in made._shiftdc_image_names


def test_its_forward_has_the_base_class_s_arguments_and_its_own(made):
    """generate() rejects arguments that the signature lacks."""
    base = list(inspect.signature(LlavaForConditionalGeneration.forward).parameters)
    assert base[-1] == "kwargs"
    found = inspect.signature(made.forward)
    assert list(found.parameters) == [*base[:-1], *OWN, "kwargs"]
    assert found.return_annotation == inspect.signature(LlavaForConditionalGeneration.forward).return_annotation
    assert made.forward.__doc__ == ShiftDCMixin.forward.__doc__


def test_subclasses_and_mixins_are_left_alone(made):
    class Below(made):
        pass

    class Mixin(ShiftDCMixin):
        pass

    assert Below.forward is made.forward and "_shiftdc_base_forward" not in vars(Below)
    assert not hasattr(Mixin, "_shiftdc_base_forward") and Mixin.forward is ShiftDCMixin.forward


def test_arguments_of_forward_by_position(model, inputs):
    ids, pixels, mask = inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]
    names = list(inspect.signature(LlavaForConditionalGeneration.forward).parameters)[1:4]
    values = {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}
    with torch.no_grad():
        found = model(*(values[n] for n in names)).logits
        assert torch.equal(found, model(**inputs).logits)
        assert not torch.equal(found, model(*(values[n] for n in names), shiftdc=False).logits)


def test_positional_arguments_get_the_base_class_s_names():
    def base(self, input_ids, mask=None, **kwargs):
        raise AssertionError

    def forward(self, *, shiftdc=None, **inputs):
        return self, shiftdc, inputs

    bound = modeling_shiftdc._with_shiftdc_arguments(forward, base)
    assert list(inspect.signature(bound).parameters) == ["self", "input_ids", "mask", "shiftdc", "kwargs"]
    assert bound(1, 2, 3, shiftdc=False, other=4) == (1, False, {"input_ids": 2, "mask": 3, "other": 4})
    assert bound(1, 2) == (1, None, {"input_ids": 2})


@pytest.mark.parametrize(("names", "expected"), [(("a", "b"), "of b"), (("b", "c"), "of b"), (("a",), None), ((), None)])
def test_the_first_key_renaming_there_is_is_taken(monkeypatch, names, expected):
    registered = []
    renamings = {"b": "of b", "c": "of c"}
    monkeypatch.setattr(modeling_shiftdc, "get_checkpoint_conversion_mapping", renamings.get)
    monkeypatch.setattr(
        modeling_shiftdc,
        "register_checkpoint_conversion_mapping",
        lambda name, mapping, overwrite=False: registered.append((name, mapping, overwrite)),
    )
    _register_key_conversion(ShiftDCMixin, *names)
    assert registered == ([] if expected is None else [("ShiftDCMixin", expected, True)])


# what a family may change


def test_by_default_tokens_of_images_are_marked_where_the_prompt_marks_them():
    ids = torch.tensor([[4, 9, 4]])
    found = ShiftDCMixin.shiftdc_token_inputs(
        TRAITS, ids, {"mm_token_type_ids": None, "pixel_values": None, "token_type_ids": None}
    )
    assert {k: v.tolist() for k, v in found.items()} == {"mm_token_type_ids": [[1, 0, 1]], "token_type_ids": [[1, 0, 1]]}


@pytest.mark.parametrize(
    ("rows", "images", "unmarked"),
    [
        ([False, False], {"pixel_values": 1}, True),
        ([False, False], {"image_sizes": 1, "frames": 1}, True),
        ([False, False], {"image_sizes": 1, "pixel_values_videos": 1}, True),
        ([False, True], {"pixel_values": 1}, False),
        ([False, False], {"pixel_values": None}, False),
        ([False, False], {"image_sizes": 1}, False),
        ([False, False], {}, False),
    ],
)
def test_pixels_that_no_token_stands_for(rows, images, unmarked):
    assert bool(ShiftDCMixin.shiftdc_unmarked_image(TRAITS, torch.tensor(rows), images)) is unmarked


def test_a_pass_that_only_reads_keeps_no_cache():
    class Inner(torch.nn.Module):
        def forward(self, input_ids=None, pixel_values=None, use_cache=None, **kwargs):
            given.append({"input_ids": input_ids, "use_cache": use_cache, **kwargs})

    class Outer(PreTrainedModel):  # of transformers, as it were
        __module__ = "transformers.models.outer"

        def __init__(self):
            torch.nn.Module.__init__(self)
            self.model = Inner()

        def forward(self, **kwargs):
            given.append(kwargs)

    given, model = [], Outer()
    ShiftDCMixin.shiftdc_backbone(model, input_ids=1, shiftdc_position=2)
    assert given == [{"input_ids": 1, "use_cache": False, "shiftdc_position": 2}]
    given.clear()  # what the inner one has no parameter for, the outer one makes something of
    ShiftDCMixin.shiftdc_backbone(model, input_ids=1, image_embeds=3)
    assert given == [{"input_ids": 1, "image_embeds": 3, "use_cache": False, "logits_to_keep": 1}]


# models


def test_every_calibrated_layer_gets_its_correction_and_one_hook(load):
    model = load(strength=3, gate="one-sided")
    again = type(model)(model.config)
    settings = model.config.shiftdc
    assert again._shiftdc_ready is False and again.shiftdc_tokenizer is None and again._shiftdc_composer is None
    found = [(c.layer, c.column, c.strength, c.one_sided, c.sha256) for c in again.shiftdc_corrections]
    assert found == [(1, 0, 3.0, True, settings["buffers_sha256"][0]), (2, 1, 3.0, True, settings["buffers_sha256"][1])]
    assert all(type(c.strength) is float and c.direction.shape == (32,) for c in again.shiftdc_corrections)
    for number, layer in enumerate(again.model.language_model.layers):
        hooks = list(layer._forward_hooks.values())
        assert hooks == ([calibrate] if number in (1, 2) else [])
        assert len(layer._forward_hooks_with_kwargs) == len(hooks)
    assert not load(strength=3).shiftdc_corrections[0].one_sided


def test_buffers_that_a_checkpoint_lacks_become_no_numbers(load):
    """What transformers leaves there is uninitialised memory; it asks the model to fill what was not loaded."""
    correction = copy.deepcopy(load().shiftdc_corrections[0])
    loaded = correction.direction.clone()
    correction.direction._is_hf_initialized = True
    load()._init_weights(correction)
    assert torch.equal(correction.direction, loaded) and correction.shift.isnan()
    correction.shift.fill_(1)._is_hf_initialized = False
    load()._init_weights(correction)
    assert correction.shift.isnan()


def test_weights_of_other_modules_are_the_base_class_s(model):
    layer = torch.nn.Linear(64, 64)
    layer.weight.data.fill_(7.0)
    model._init_weights(layer)
    assert not (layer.weight == 7).any()


def test_buffers_loaded_later_are_checked_before_the_next_pass(load):
    model = copy.deepcopy(load())
    assert model._shiftdc_ready and all(c.checked for c in model.shiftdc_corrections)
    model.load_state_dict(model.state_dict())
    assert model._shiftdc_ready is False and [c.checked for c in model.shiftdc_corrections] == [False, False]
    model.shiftdc_check()
    assert model._shiftdc_ready is True and [c.checked for c in model.shiftdc_corrections] == [True, True]


def test_offloaded_buffers_are_checked_when_their_layer_runs(load):
    correction = copy.deepcopy(load().shiftdc_corrections[0])
    correction.checked = False
    kept = correction.direction
    correction.direction = torch.empty(32, device="meta")
    correction.check()
    assert correction.checked is False
    correction.direction = kept
    correction.check()
    assert correction.checked is True


def test_the_sentences_about_wrong_buffers(load):
    correction = copy.deepcopy(load().shiftdc_corrections[0])
    recorded, kept = correction.sha256, correction.direction.clone()
    correction.sha256 = "0" * 64
    with pytest.raises(ValueError) as raised:
        correction.check()
    assert str(raised.value) == (
        f"The ShiftDC buffers of decoder layer 1 are not those that config.json records (expected SHA-256 {'0' * 64}, found "
        f"{recorded}): the model would be calibrated by another direction. Fetch the checkpoint again, or export it again."
    )
    for factor, shown in ((torch.nan, "nan"), (1.01, "1.01"), (0.5, "0.5")):
        correction.direction = kept * factor
        correction.sha256 = modeling_shiftdc.buffers_sha256(correction.direction, correction.shift)
        with pytest.raises(ValueError) as raised:
            correction.check()
        assert str(raised.value) == (
            "The ShiftDC buffers of decoder layer 1 are missing or damaged (expected a finite direction of norm 1, found norm "
            f"{shown}): the model would run uncalibrated. Load a complete checkpoint (shiftdc.safetensors must be in its index), "
            "or export it again."
        )
    correction.direction = kept * 1.0005  # half precision's rounding
    correction.sha256 = modeling_shiftdc.buffers_sha256(correction.direction, correction.shift)
    correction.check()


# loading


@pytest.fixture
def fetched(monkeypatch):
    """What a load does, in order; from_pretrained of transformers gives back what stands in `loaded`."""
    done: list = []
    fake = SimpleNamespace(
        _shiftdc_load_tokenizer=lambda where: done.append(("tokenizer", where)) or "the tokenizer",
        shiftdc_use_tokenizer=lambda tokenizer: done.append(("use", tokenizer)),
        _shiftdc_load_adapter=lambda where: done.append(("adapter", where)),
        shiftdc_check=lambda: done.append(("check",)),
    )

    def from_pretrained(cls, *args, **kwargs):
        done.append((cls, args, kwargs))
        return (fake, {"missing": []}) if kwargs.get("output_loading_info") else fake

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    return fake, done


@pytest.mark.parametrize("info", [False, True])
def test_tokenizer_and_adapter_are_fetched_as_the_weights_are(fetched, info):
    fake, done = fetched
    where = {
        "revision": "main", "cache_dir": "c", "token": "t", "local_files_only": True, "force_download": True,
        "proxies": {"a": "b"}, "subfolder": "s",
    }  # fmt: skip
    others = {"dtype": "auto", **({"output_loading_info": True} if info else {})}
    found = ShiftDCLlavaForConditionalGeneration.from_pretrained("folder", **where, **others)
    assert found == (fake, {"missing": []}) if info else found is fake
    loaded, *rest = done
    assert loaded == (ShiftDCLlavaForConditionalGeneration, ("folder",), {**where, **others})
    assert rest == [("tokenizer", where), ("use", "the tokenizer"), ("adapter", where), ("check",)]


def test_what_is_not_given_is_not_passed_on(fetched):
    _, done = fetched
    ShiftDCLlavaForConditionalGeneration.from_pretrained("folder", revision=None)
    assert done[1] == ("tokenizer", {})


def test_the_tokenizer_beside_the_weights(load, monkeypatch):
    model = load()
    asked = []

    def found(*args, **kwargs):
        asked.append((args, kwargs))
        return "the tokenizer"

    monkeypatch.setattr(modeling_shiftdc.AutoTokenizer, "from_pretrained", found)
    monkeypatch.setattr(model, "name_or_path", "folder", raising=False)
    assert model._shiftdc_load_tokenizer({"revision": "r"}) == "the tokenizer"
    assert asked == [(("folder",), {"config": model.config, "trust_remote_code": False, "revision": "r"})]


@pytest.mark.parametrize("error", [OSError("gone"), ValueError("gone")])
def test_a_tokenizer_that_is_not_there(load, monkeypatch, error):
    def missing(*args, **kwargs):
        raise error

    model = load()
    monkeypatch.setattr(modeling_shiftdc.AutoTokenizer, "from_pretrained", missing)
    monkeypatch.setattr(model, "name_or_path", "folder", raising=False)
    with pytest.raises(ValueError) as raised:
        model._shiftdc_load_tokenizer({})
    assert raised.value.__cause__ is error
    assert str(raised.value) == (
        "The tokenizer of 'folder' cannot be loaded, and captions and text-only prompts are written with it: put the "
        "checkpoint's tokenizer files beside its weights, or call shiftdc_use_tokenizer(tokenizer)."
    )


def test_prompts_are_derived_with_the_tokenizer_that_was_given(load):
    model, tokenizer = copy.copy(load()), tiny_processor().tokenizer
    model.shiftdc_use_tokenizer(tokenizer)
    composer = model.shiftdc_composer
    assert model.shiftdc_tokenizer is tokenizer
    assert type(composer) is PromptComposer and type(composer.codec) is TokenizerCodec
    assert composer.codec.tokenizer is tokenizer and composer.image_token_id == 4
    assert composer.frame.as_json() == model.config.shiftdc["prompt"]


def adapted(model, monkeypatch, folder="adapter"):
    """`model` as of an export that keeps its adapter."""
    monkeypatch.setitem(model.config.shiftdc, "adapter", folder)
    return model


ADAPTER = "This checkpoint was calibrated together with its PEFT adapter"


def test_a_checkpoint_without_an_adapter_loads_none(load, monkeypatch):
    model = load()
    monkeypatch.setattr(model, "load_adapter", None, raising=False)
    assert model._shiftdc_load_adapter({}) is None


def test_the_adapter_is_loaded_from_its_folder(load, monkeypatch):
    model, asked = adapted(load(), monkeypatch), []
    loading = SimpleNamespace(missing_keys=[], mismatched_keys=[])
    monkeypatch.setattr(model, "name_or_path", "folder", raising=False)
    monkeypatch.setattr(model, "load_adapter", lambda *a, **k: asked.append((a, k)) or loading, raising=False)
    model._shiftdc_load_adapter({"revision": "r"})
    assert asked == [(("folder",), {"adapter_kwargs": {"subfolder": "adapter", "revision": "r"}, "use_safetensors": True})]


@pytest.mark.parametrize("loading", [None, {"missing_keys": ["a"]}, {"mismatched_keys": ["a"]}], ids=str)
def test_half_an_adapter_is_refused(load, monkeypatch, loading):
    model = adapted(load(), monkeypatch)
    found = loading and SimpleNamespace(**{"missing_keys": [], "mismatched_keys": [], **loading})
    monkeypatch.setattr(model, "load_adapter", lambda *a, **k: found, raising=False)
    message = r"^The adapter in adapter/ is incomplete; fetch the checkpoint again, or export it again\.$"
    with pytest.raises(ValueError, match=message):
        model._shiftdc_load_adapter({})


def test_an_adapter_needs_peft(load, monkeypatch):
    model = adapted(load(), monkeypatch)
    monkeypatch.setattr(modeling_shiftdc, "is_peft_available", lambda: False)
    with pytest.raises(ImportError, match=rf"^{ADAPTER} and needs it: pip install peft\.$"):
        model._shiftdc_load_adapter({})


def test_a_model_without_its_adapter_does_not_run(load, inputs, monkeypatch):
    model = adapted(copy.copy(load()), monkeypatch)
    message = rf"^{ADAPTER}: load it with from_pretrained\(\)\.$"
    with pytest.raises(ValueError, match=message):
        model.shiftdc_check()
    model._shiftdc_ready = False
    for run in (lambda: model(**inputs), lambda: model.generate(**inputs)):
        with pytest.raises(ValueError, match=message):
            run()
    model._hf_peft_config_loaded = False
    with pytest.raises(ValueError, match=message):
        model.shiftdc_check()
    model._hf_peft_config_loaded = True
    model.shiftdc_check()


# saving and pickling


def test_what_is_saved_is_loaded_calibrated(load, inputs, tmp_path):
    model = load(strength=3, caption_max_new_tokens=2)
    expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    for folder, save in (
        (tmp_path / "a", lambda: model.save_pretrained(tmp_path / "a")),
        (tmp_path / "b", lambda: model.save_pretrained(save_directory=tmp_path / "b", max_shard_size="60KB")),
    ):
        save()
        again = ShiftDCLlavaForConditionalGeneration.from_pretrained(folder).eval()
        assert torch.equal(again.generate(**inputs, max_new_tokens=3, do_sample=False), expected)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) < len(list((tmp_path / "b").glob("*.safetensors")))


def test_a_model_without_a_tokenizer_is_saved_without(load, tmp_path):
    model = copy.copy(load())
    model.shiftdc_tokenizer = None
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").exists() and not (tmp_path / "tokenizer_config.json").exists()


def test_a_model_with_an_adapter_is_not_saved(load, tmp_path, monkeypatch):
    model = adapted(load(), monkeypatch)
    with pytest.raises(
        ValueError,
        match=r"^save_pretrained\(\) would write the adapter without the model; export again with the adapter merged\.$",
    ):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@torch.no_grad()
def test_a_pickled_model_answers_as_before(load, inputs):
    model = copy.deepcopy(load(strength=3))
    expected = model(**inputs, output_hidden_states=True)
    kept = {name: len(m._forward_hooks) for name, m in load(strength=3).named_modules()}
    again = pickle.loads(pickle.dumps(model))
    assert not getattr(again, "_output_capturing_hooks_installed", False)
    assert {name: len(m._forward_hooks) for name, m in again.named_modules()} == kept
    found = again(**inputs, output_hidden_states=True)
    assert torch.equal(found.logits, expected.logits)
    assert len(found.hidden_states) == len(expected.hidden_states) == 5
    assert torch.equal(model(**inputs, output_hidden_states=True).logits, expected.logits)  # which goes on, too


@torch.no_grad()
def test_the_first_model_of_a_process_may_come_from_a_pickle(load, inputs, monkeypatch):
    model = load(strength=3)
    written = pickle.dumps(model)
    made = []
    monkeypatch.setattr(modeling_shiftdc, "_MADE", set())
    plain = ShiftDCMixin.__init__
    monkeypatch.setattr(
        ShiftDCMixin, "__init__", lambda self, config: made.append((config, torch.get_default_device())) or plain(self, config)
    )
    again = pickle.loads(written)
    pickle.loads(written)
    assert [(type(c), d.type) for c, d in made] == [(type(model.config), "meta")]
    assert list(modeling_shiftdc._MADE) == [type(model)]
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
