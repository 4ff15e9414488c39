"""`check`: whether a checkpoint can be calibrated, told from its small files alone, and by every export before anything large."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from tiny import TEMPLATE, save_tiny_llava
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from exporter.cli.commands import main
from exporter.errors import InputError
from exporter.models.base import resolve_small
from exporter.models.check import check, recipe_of
from exporter.pipeline.plan import ExportOptions, make_plan

#: What it writes is not what a caption request is made of.
SHOUTING = TEMPLATE.replace("content['text'] + ' '", "content['text'] | upper + ' '")


@pytest.fixture(scope="module")
def shouting(tmp_path_factory):
    return save_tiny_llava(tmp_path_factory.mktemp("base") / "shouting", chat_template=SHOUTING)


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_a_checkpoint_is_told_to_be_right_without_its_weights(base_folder, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)  # what loads weights
    done = run("check", base_folder, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["differences"] == [] and found["family"] == "llava" and "token for token" in found["prompts"]
    assert "model.language_model.layers.0 to .3" in run("check", base_folder).stdout


def test_prompts_that_differ_are_refused_with_the_first_difference(shouting, tmp_path, calibration_file):
    settings = {"output": tmp_path / "out", "layers": "1-2", "calibration": str(calibration_file)}
    with pytest.raises(
        InputError, match=r"composed prompts differ .* the first: .* expected .*, found .*--allow-inexact-prompts"
    ):
        make_plan(str(shouting), ExportOptions.of(**settings))
    plan = make_plan(str(shouting), ExportOptions.of(**settings, allow_inexact_prompts=True))
    assert plan.checked.prompts.report()["different"] > 0
    done = run("check", shouting)
    assert done.exit_code == 2 and "differ from the chat template's" in done.stdout
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_layers_and_recipe_are_checked_too(base_folder):
    files = resolve_small(str(base_folder))
    recipe = recipe_of(files)
    assert check(files, recipe).depth == 4
    with pytest.raises(InputError, match="it is for family 'gemma3'"):
        recipe_of(files, "gemma3")


def test_a_fault_of_this_package_is_not_blamed_on_the_checkpoint(base_folder, monkeypatch):
    files = resolve_small(str(base_folder))
    for name in ("prompt_frame", "check_prompts"):
        with monkeypatch.context() as patch:
            patch.setattr(f"exporter.models.check.{name}", lambda *_: {}["a fault"])
            with pytest.raises(KeyError, match="a fault"):
                check(files, recipe_of(files))


def test_what_a_library_cannot_compose_is_told(base_folder, monkeypatch):
    """Tokenizers raise Exception itself."""

    def broken(*_, **__):
        raise Exception("WordPiece error: Missing [UNK] token")

    files = resolve_small(str(base_folder))
    for name in ("decode", "convert_ids_to_tokens", "__call__"):
        with monkeypatch.context() as patch:
            for kind in PreTrainedTokenizerFast.__mro__[:-1]:
                if name in vars(kind):
                    patch.setattr(kind, name, broken)
            with pytest.raises(InputError, match=r"MODEL: its prompts cannot be composed .*Missing \[UNK\].*; restore"):
                check(files, recipe_of(files))
