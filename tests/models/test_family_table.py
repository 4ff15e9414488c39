"""Every image-text-to-text type of the installed transformers is supported or refused; a new one is tried on request alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from click.testing import CliRunner

from exporter.cli.commands import main
from exporter.errors import InputError
from exporter.models import check as checks
from exporter.models.base import resolve_small
from exporter.models.check import check, recipe_of
from exporter.models.family_table import FamilyTable
from exporter.models.recipe import load_recipe
from exporter.models.refused import OF_TRANSFORMERS, REFUSED


@pytest.fixture(scope="module")
def table():
    return FamilyTable.of_installed()


@pytest.fixture
def new(base_folder, monkeypatch):
    """A checkpoint of a type for which there is no recipe."""
    monkeypatch.setattr(checks, "recipe_for_family", lambda _: None)
    return resolve_small(str(base_folder))


def test_every_type_of_transformers_is_supported_or_refused(table):
    assert not table.untried, f"new in transformers {table.transformers}: {', '.join(table.untried)}"


def test_no_type_is_both(table):
    assert not {row.family for row in table.supported} & REFUSED.keys()


def test_reasons_are_clauses_and_each_type_has_one_recipe(table):
    assert [r for r in REFUSED.values() if r.endswith(".") or ": " in r] == []
    families = [row.family for row in table.supported]
    assert len(set(families)) == len(families)
    assert table.count + len(table.types.keys() & OF_TRANSFORMERS.keys()) == len(table.types)


def test_a_new_type_is_named(table):
    newer = replace(table, types={**table.types, "zebra": "ZebraForConditionalGeneration"})
    assert newer.untried == ("zebra",)
    assert newer.count_line().endswith("New, and untried: zebra.")


@pytest.mark.parametrize("recipe", [None, "llava"])
def test_a_refused_type_is_told_why(base_folder, recipe):
    files = resolve_small(str(base_folder))
    with pytest.raises(InputError, match=r"model_type florence2\) cannot be calibrated: it is an encoder-decoder"):
        recipe_of(replace(files, config={**files.config, "model_type": "florence2"}), recipe)


def test_a_new_type_is_refused_unless_it_is_asked_for(new):
    with pytest.raises(InputError, match=r"'llava', which transformers .* never tried on; --experimental-family tries it"):
        recipe_of(new)
    recipe = recipe_of(new, experimental=True)
    assert recipe == load_recipe("llava").model_copy(update={"models": (), "onnx": False, "notes": recipe.notes})
    assert "--experimental-family" in recipe.notes[0]
    assert check(new, recipe).prompts.exact


def test_the_option_reaches_check_and_export(new, tmp_path):
    for arguments in (["check", new.folder], [new.folder, "--dry-run", "--layers", "1", "--output", tmp_path / "out"]):
        refused, tried = (CliRunner().invoke(main, [*map(str, arguments), *more]) for more in ((), ("--experimental-family",)))
        assert refused.exit_code == 2 and "--experimental-family tries it" in refused.stderr
        assert tried.exit_code == 0, tried.output
    assert not (tmp_path / "out").exists()


def test_a_type_that_transformers_does_not_list_is_refused_all_the_same(new):
    other = replace(new, config={**new.config, "model_type": "gpt2"})
    with pytest.raises(InputError, match="'gpt2', for which there is no recipe"):
        recipe_of(other, experimental=True)


def test_one_with_a_recipe_keeps_it(base_folder):
    files = resolve_small(str(base_folder))
    assert recipe_of(files, experimental=True) == recipe_of(files)
