"""The page of families: it is of the committed results, goes on where it stopped, and tells red from green."""

from __future__ import annotations

from dataclasses import replace
from time import sleep
from xml.etree import ElementTree

import families_report as report
import pytest
import transformers

from exporter.models.family_table import FamilyTable

GREEN = report.Result(code="1", recipe="2", passed=3, skipped=1, failed=(), traits={})
RED = replace(GREEN, failed=("test_a[llava]",))
TRAITS = {
    "decoder_layers": "model.layers", "shares_prefix": False, "stream_axis": 2, "backbone_state": ["model.rope_deltas"],
    "row_inputs": ["image_sizes"], "token_inputs": {"mm_token_type_ids": {}},
}  # fmt: skip


@pytest.fixture(scope="module")
def table():
    return FamilyTable.of_installed()


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    """The report in a folder of its own, where each type is green but aria."""
    monkeypatch.setattr(report, "RESULTS", tmp_path / "families.json")
    monkeypatch.setattr(report, "PAGE", tmp_path / "families.md")
    monkeypatch.setattr(report, "run_suite", lambda name: replace(of_today(name), failed=("it",) if name == "aria" else ()))
    return tmp_path


def of_today(name):
    return replace(GREEN, code=report.code_hash(), recipe=report.recipe_hash(name))


def test_the_page_is_of_the_committed_results(table):
    page = report.PAGE.read_text("utf-8")
    if f"transformers {transformers.__version__} has" not in page:
        pytest.skip("the page is of another version of transformers")
    assert page == report.page(table, report.read_results(report.RESULTS)), "run: python tests/support/families_report.py --table"


def test_a_type_is_shown_with_what_was_measured(table):
    page = report.page(table, {"llava": replace(GREEN, traits=TRAITS), "aria": RED})
    llava, aria, gemma3 = (
        next(line for line in page.splitlines() if line.startswith(f"| `{n}`")) for n in ("llava", "aria", "gemma3")
    )
    assert "| 3 passed, 1 skipped |" in llava and "| `model.layers` | image read twice; several residual streams; " in llava
    assert (
        "per row: `image_sizes`; per token: `mm_token_type_ids`" in llava and "kept between passes: `model.rope_deltas`" in llava
    )
    assert "| **red**: 1 failed, 3 passed, 1 skipped |" in aria
    assert "| not run yet |" in gemma3
    assert "1 green, 1 red, 74 not run yet" in page or table.transformers != "5.23.0"


def test_every_type_has_a_row(table):
    page = report.page(replace(table, types={**table.types, "zebra": "Zebra"}), {})
    assert all(f"| `{name}` | {stock} |" in page for name, stock in table.types.items())
    assert "| `zebra` | Zebra | new in transformers" in page and "1 untried" in page


def test_a_test_that_fails_twice_counts_once():
    cases = {"a": "", "b": "<failure/>", "c": "<skipped/>", "d": "<error/>"}
    tree = "".join(f'<testcase name="{name}">{part}</testcase>' for name, part in [*cases.items(), ("a", "<error/>")])
    found = report.counts(ElementTree.ElementTree(ElementTree.fromstring(f"<testsuite>{tree}</testsuite>")))
    assert found == {"passed": 0, "skipped": 1, "failed": ("a", "b", "d")}


def test_an_interrupted_run_goes_on(tmp_path):
    file = tmp_path / "results.json"

    def suite(name):
        if name == "llava":
            return of_today(name)
        while not file.exists():
            sleep(0.01)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report.run_all(["llava", "aria"], {}, file, suite)
    kept = report.read_results(file)
    assert report.outdated(["llava", "aria"], kept) == ["aria"]


@pytest.mark.parametrize("change", ["code", "recipe"])
def test_results_of_other_code_are_made_anew(change):
    now = of_today("llava")
    assert report.outdated(["llava"], {"llava": now}) == []
    assert report.outdated(["llava"], {"llava": replace(now, **{change: "other"})}) == ["llava"]


def test_red_ends_in_exit_code_1(at_home, capsys):
    assert report.main(["llava"]) == 0
    assert report.main(["aria"]) == 1
    printed = capsys.readouterr().out
    assert "llava: 3 passed" in printed and "aria: **red**" in printed and "SHIFTDC_FAMILIES=aria" in printed
    assert report.main(["--table"]) == 1
    assert "1 green, 1 red" in (at_home / "families.md").read_text()


def test_all_are_run_once_and_red_ones_again(at_home, capsys):
    def ran(*arguments):
        report.main(list(arguments))
        return [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if " passed" in line]

    assert ran("llava") == ["llava"]
    assert len(others := ran()) == len(report.recipes()) - 1 and "llava" not in others
    assert ran() == ["aria"]


def test_types_that_are_none_are_refused(at_home):
    with pytest.raises(SystemExit):
        report.main(["florence2"])
    assert not any(at_home.iterdir())
