from __future__ import annotations

import pytest
import yaml

from exporter.errors import InputError
from exporter.models.recipe import load_recipe, parse_layers, recipe_for_family, recipe_names
from exporter.runtime.resources import resource


def variant(tmp_path, **changes):
    values = yaml.safe_load((resource("recipes") / "llava.yaml").read_text())
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**values, **changes}))
    return str(file)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads(name):
    assert load_recipe(name).family


def test_families():
    assert recipe_for_family("llava") == "llava"
    assert recipe_for_family("gpt2") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "colour in .*mine.yaml is wrong: Extra inputs"),
        ({"strength": "nan"}, "strength"),
        ({"strength": -1}, "strength"),
        ({"gate": "both"}, "gate"),
        ({"layers": "9-3"}, "layers.*A at most B"),
        ({"layers": "x"}, "expected auto, A or A-B"),
        ({"prompts": {"caption": "{request} {request}", "text_counterpart": "{request} {caption}"}}, "prompts.caption"),
        ({"prompts": {"caption": "{request}", "text_counterpart": "{caption} {request}"}}, "prompts.text_counterpart"),
    ],
)
def test_bad_values_name_the_key(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        load_recipe(variant(tmp_path, **changes))


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match=r"none named 'nope', expected one of .*demo"):
        load_recipe("nope")
    with pytest.raises(InputError, match="there is no file"):
        load_recipe(str(tmp_path / "absent.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(InputError, match="cannot be read as YAML"):
        load_recipe(str(tmp_path / "bad.yaml"))


def test_a_recipe_in_full_is_a_recipe(tmp_path):
    recipe = load_recipe("paligemma")
    (tmp_path / "mine.yaml").write_text(recipe.as_yaml())
    assert load_recipe(str(tmp_path / "mine.yaml")) == recipe
    assert "text_counterpart: '{request} Image Caption: {caption}'" in recipe.as_yaml()


def test_the_command_line_wins():
    recipe = load_recipe("llava").with_overrides(gate="two-sided", strength=None)
    assert (recipe.gate, recipe.strength) == ("two-sided", 1.0)
    with pytest.raises(InputError, match="strength in the command line"):
        load_recipe("llava").with_overrides(strength=99)


def test_layers_count_from_zero_and_include_both_ends():
    assert list(parse_layers("0-2")) == [0, 1, 2]
    assert list(parse_layers("7")) == [7]


def test_prompts_take_braces_in_requests():
    prompts = load_recipe("llava").prompts
    assert prompts.counterpart("a {caption} b", "c {request}") == "a {caption} b Image Caption: c {request}"
    assert prompts.caption_request("{x}").endswith("Request: {x}")
