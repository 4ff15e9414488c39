"""The `shiftdc` block as the shipped code reads it, and the sentence by which stock config classes are stopped."""

from __future__ import annotations

import json
import pickle
import re
from types import SimpleNamespace

import pytest
import transformers

from exporter.modeling import configuration_shiftdc
from exporter.modeling.configuration_shiftdc import (
    FORMAT_VERSION,
    STOCK_CLASS_GUARD,
    TRANSFORMERS,
    ShiftDCBlip2Config,
    ShiftDCLlavaConfig,
    ShiftDCQwen3VLConfig,
    ShiftDCSettings,
    ShiftDCTraits,
    TokenInput,
    require_transformers,
)

TRAITS = ShiftDCTraits(
    "model.layers", 4, "vision_feature_select_strategy", image_token_id=7, row_inputs=("pixel_values",),
    token_inputs={"token_type_ids": TokenInput(0, {"7": 1}, in_text=True)},
)  # fmt: skip
BLOCK = {
    "version": FORMAT_VERSION,
    "reference": "caption",
    "rule": "sequential",
    "gate": "one-sided",
    "strength": 0.5,
    "layers": [1, 3],
    "buffers_sha256": ["ab", "cd"],
    "traits": TRAITS.as_json(),
    "caption_max_new_tokens": 8,
    "prompt": {"head": []},
    "base_model": {"id": "a/b", "revision": None},
}
CONFIGS = [ShiftDCLlavaConfig, ShiftDCBlip2Config, ShiftDCQwen3VLConfig]
FIELD = TRAITS.guard_field


def settings(**changes):
    return ShiftDCSettings.of(SimpleNamespace(shiftdc={**BLOCK, **changes}))


def without(key):
    return SimpleNamespace(shiftdc={k: v for k, v in BLOCK.items() if k != key})


class TestSettings:
    def test_the_block_of_an_export(self):
        assert settings() == ShiftDCSettings(
            "caption", "sequential", "one-sided", 0.5, (1, 3), ("ab", "cd"), TRAITS, 8, {"head": []}
        )
        assert settings().adapter is None
        assert settings(adapter="adapter").adapter == "adapter"

    @pytest.mark.parametrize("config", [SimpleNamespace(), SimpleNamespace(shiftdc=None), SimpleNamespace(shiftdc=[3])])
    def test_no_block(self, config):
        with pytest.raises(
            ValueError, match=r"^config\.json has no 'shiftdc' block: this checkpoint was not written by shiftdc-export\.$"
        ):
            ShiftDCSettings.of(config)

    @pytest.mark.parametrize("version", [FORMAT_VERSION - 1, FORMAT_VERSION + 1, None])
    def test_another_format(self, version):
        sentence = (
            f"config.shiftdc.version is {version!r}, expected {FORMAT_VERSION}: "
            "this modeling file belongs to another export; export the checkpoint again."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            settings(version=version)
        with pytest.raises(ValueError, match=r"version is None, expected"):
            ShiftDCSettings.of(without("version"))

    @pytest.mark.parametrize("hashes", [None, "abcd", ["ab"], ["ab", "cd", "ef"], {"ab": 1, "cd": 2}])
    def test_a_record_of_other_buffers(self, hashes):
        sentence = (
            "config.shiftdc.buffers_sha256 must have the SHA-256 of the buffers of each calibrated layer; fetch the checkpoint "
            "again, or export it again."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            settings(buffers_sha256=hashes)

    def test_a_record_as_transformers_may_keep_it(self):
        assert settings(buffers_sha256=("ab", "cd"), layers=(1, 3)) == settings()

    @pytest.mark.parametrize("key", ["reference", "rule", "gate", "strength", "traits", "caption_max_new_tokens", "prompt"])
    def test_each_setting_is_needed(self, key):
        with pytest.raises(
            ValueError, match=rf"^config\.shiftdc\.{key} is missing; fetch the checkpoint again, or export it again\.$"
        ):
            ShiftDCSettings.of(without(key))


class TestVersionOfTransformers:
    @pytest.mark.parametrize("found", ["4.57.6", "4.99", "5.2.0", "5.19.9"])
    def test_too_old(self, found):
        sentence = (
            f"This checkpoint is calibrated by ShiftDC and needs transformers {TRANSFORMERS} or newer, found {found}: "
            f"pip install --upgrade 'transformers>={TRANSFORMERS},<6'."
        )
        with pytest.raises(ImportError, match=f"^{re.escape(sentence)}$"):
            require_transformers(found)

    @pytest.mark.parametrize("found", ["5.20", "5.20.0", "5.100.0.dev0", "6.0.0"])
    def test_new_enough(self, found):
        require_transformers(found)


@pytest.mark.parametrize("ours", CONFIGS, ids=lambda c: c.model_type)
@pytest.mark.parametrize("has_field", [True, False])
def test_what_is_guarded_can_be_read_again(ours, has_field):
    field = FIELD
    whole = {"model_type": ours.model_type, "shiftdc": BLOCK, **({field: 7} if has_field else {})}
    guarded = ours.shiftdc_guarded(whole)
    assert guarded[field] == STOCK_CLASS_GUARD
    assert guarded["shiftdc"] == {**BLOCK, "guarded": {"value": 7} if has_field else {}}
    assert ours.shiftdc_guarded(guarded) == guarded  # once
    assert ours.shiftdc_unguarded(guarded) == whole
    assert ours.shiftdc_unguarded(whole) is whole


def test_only_exports_are_guarded():
    assert ShiftDCLlavaConfig.shiftdc_guarded({"model_type": "llava"}) == {"model_type": "llava"}


def test_parts_with_a_type_of_their_own_are_left_alone():
    """A tower of the model's own type is guarded too; the others have fields that may hold anything."""
    field = FIELD
    parts = {"vision_config": {"model_type": "qwen3_vl"}, "text_config": {"model_type": "qwen3_vl_text", "x": 1}, "n": 1}
    guarded = ShiftDCQwen3VLConfig.shiftdc_guarded({**parts, "shiftdc": BLOCK})
    assert guarded["vision_config"] == {"model_type": "qwen3_vl", field: STOCK_CLASS_GUARD}
    assert (guarded["text_config"], guarded["n"]) == (parts["text_config"], 1)
    sentence = {"text_config": {"name": STOCK_CLASS_GUARD}}  # no guard of ours, so it is not taken away
    assert ShiftDCQwen3VLConfig.shiftdc_unguarded({**guarded, **sentence})["text_config"] == sentence["text_config"]


class TestFiles:
    """What save_pretrained writes and from_pretrained reads."""

    def test_written_guarded_and_read_as_it_was(self, tmp_path):
        config = ShiftDCLlavaConfig(shiftdc=BLOCK, **{FIELD: "full"})
        config.save_pretrained(tmp_path)
        text = (tmp_path / "config.json").read_text("utf-8")
        written = json.loads(text)
        assert written[FIELD] == STOCK_CLASS_GUARD
        assert written["shiftdc"]["guarded"] == {"value": "full"}
        assert text == json.dumps(written, indent=2, sort_keys=True) + "\n"  # as transformers writes it
        read = ShiftDCLlavaConfig.from_pretrained(tmp_path)
        assert getattr(read, FIELD) == "full" and read.shiftdc == BLOCK

    def test_all_of_it_or_what_differs_from_the_defaults(self, tmp_path):
        config, file = ShiftDCLlavaConfig(shiftdc=BLOCK), tmp_path / "c.json"
        for options, there in (({"use_diff": True}, False), ({"use_diff": False}, True), ({}, False)):
            config.to_json_file(file, **options)
            assert ("problem_type" in json.loads(file.read_text())) is there

    def test_names_in_any_script(self, tmp_path):
        ShiftDCLlavaConfig(shiftdc={**BLOCK, "prompt": {"caption": "模型"}}).to_json_file(tmp_path / "c.json")
        assert json.loads((tmp_path / "c.json").read_text("utf-8"))["shiftdc"]["prompt"]["caption"] == "模型"

    def test_options_of_reading_are_passed_on(self):
        guarded = ShiftDCLlavaConfig.shiftdc_guarded({"shiftdc": BLOCK, FIELD: "full"})
        config, unused = ShiftDCLlavaConfig.from_dict(
            guarded, return_unused_kwargs=True, projector_hidden_act="relu", unknown_option=1
        )
        assert (config.projector_hidden_act, getattr(config, FIELD)) == ("relu", "full")
        assert unused == {"unknown_option": 1}


def test_traits_are_what_was_recorded():
    assert ShiftDCTraits.from_json(json.loads(json.dumps(TRAITS.as_json()))) == TRAITS


class TestClassesOnDemand:
    """`auto_map` and pickles name classes that are made when they are asked for."""

    def test_one_class_for_each_of_transformers(self):
        assert configuration_shiftdc.ShiftDCGemma3Config is configuration_shiftdc.config_class(transformers.Gemma3Config)
        assert configuration_shiftdc.ShiftDCGemma3Config.model_type == "shiftdc_gemma3"
        assert issubclass(configuration_shiftdc.ShiftDCGemma3Config, transformers.Gemma3Config)

    def test_they_can_be_pickled(self):
        config = configuration_shiftdc.ShiftDCGemma3Config(shiftdc=BLOCK)
        assert type(pickle.loads(pickle.dumps(config))) is type(config)

    @pytest.mark.parametrize("name", ["ShiftDCNoSuchThingConfig", "LlavaConfig", "anything"])
    def test_of_no_class_of_transformers(self, name):
        with pytest.raises(AttributeError, match=f"There is no {name} in .*configuration_shiftdc: transformers .* has no class"):
            getattr(configuration_shiftdc, name)
