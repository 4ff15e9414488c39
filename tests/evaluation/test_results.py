"""results.json: the same bytes from the same outcomes, whatever writes them; and what is made of documents of others."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest

from exporter.data.questions import Benchmark, Question
from exporter.evaluation.figures import judged, summarise
from exporter.evaluation.judges import prefix
from exporter.evaluation.replies import Reply
from exporter.evaluation.results import About, CellFigures, DefenceFigures, Difference, Rate, Results
from exporter.evaluation.results_json import as_document, read_results, write_results

#: Written by the first version, when results were nested dicts.
EXPECTED = Path(__file__).with_name("expected_results.json")
ABOUT = About(
    split="test",
    limit_per_cell=None,
    checkpoint={"name": "tiny", "directions": "0123456789abcdef"},
    device="cpu",
    versions={"shiftdc-export": "0.1.0", "torch": "2.13.0"},
)
CELLS = (
    ("harmful_image", "harmful"),
    ("harmless_image", "benign"),
    ("benign_question_harmful", "benign"),
    ("harmful_text", "harmful"),
    ("harmless_text", "benign"),
)
SCENARIOS = ("01-Illegal_Activity", "08-Political_Lobbying", None)
TEXTS = ("I'm sorry, but I can't help with that.", "a cake.", "", "no no no no no no no no")


def questions():
    for i, ((cell, kind), scenario, image_kind) in enumerate(itertools.product(CELLS, SCENARIOS, ("SD", "TYPO"))):
        answer = "a cake." if kind == "benign" and i % 3 else None
        yield Question(f"q{i}", "?", kind, cell, scenario, image_kind, answer)


def outcomes(asked, step):
    """Replies that take turns; the first defence has no caption to write."""
    seconds = {"prefill": 0.125, "decode": 1 / step} | ({} if step == 1 else {"caption": 1.75})
    return judged(asked, [Reply("any", q.id, TEXTS[i // step % len(TEXTS)], seconds) for i, q in enumerate(asked)], prefix)


def written(names, benchmark, folder):
    found = {name: outcomes(benchmark.questions, step) for step, name in enumerate(names, 1)}
    write_results(folder, summarise(benchmark, found, "prefix", ABOUT))
    return (folder / "results.json").read_text("utf-8")


def test_the_same_bytes_as_ever(tmp_path):
    """A scenario benchmark with pairs; attacks alone, so that much was not measured; and no defence to pair with."""
    asked = tuple(questions())
    attacks = tuple(q for q in asked if q.cell == "harmful_image")
    documents = [
        written(("direct", "shiftdc", "random_direction_0"), Benchmark("mm-safetybench", asked, "org/data@0"), tmp_path),
        written(("direct", "shiftdc"), Benchmark("mine", attacks, "mine.jsonl"), tmp_path),
        written(("ecso",), Benchmark("mm-safetybench", attacks[-2:], "org/data@0"), tmp_path),
    ]
    dates = {json.loads(text)["date"] for text in documents}
    found = "".join(documents).replace(dates.pop(), "2026-11-21")
    assert not dates
    assert found == EXPECTED.read_text("utf-8")


def test_what_was_written_is_read(tmp_path):
    """But for what was not paired: null, and nothing, are read as one."""
    asked = tuple(questions())
    for name, names in (("mm-safetybench", ("direct", "shiftdc")), ("mine", ("shiftdc",))):
        text = written(names, Benchmark(name, asked, "org/data@0"), tmp_path)
        found = read_results(json.loads(text))
        assert json.dumps(as_document(found), indent=2) + "\n" == text
        assert read_results(as_document(found)) == found
        assert found.about == ABOUT
        assert (found.mm_safetybench is None) == (name == "mine")


def test_a_limit_is_read():
    assert read_results({"limit_per_cell": 5}).about == About(limit_per_cell=5)


def test_what_is_no_number_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(tmp_path, Results(defences={"direct": DefenceFigures(asr=Rate(math.nan))}))
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_none():
    figures = {
        "n_harmful": 3.0, "n_benign": 10**400, "asr": 0, "over_refusal": 0.5, "utility": True, "degenerate": "0.1",
        "cost_ratio": math.nan, "seconds": {"decode": 2, "prefill": None},
    }  # fmt: skip
    found = read_results({"defences": {"direct": figures}}).direct
    assert found == DefenceFigures(n_harmful=3, asr=Rate(0.0), over_refusal=Rate(0.5), seconds={"decode": 2.0})


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ([0, 1], (0, 1)),
        ((0.1, 0.2), (0.1, 0.2)),
        *((none, None) for none in ([0], None, [None, 1], "ab", [0, math.inf])),
    ],
)
def test_intervals_that_are_none(given, read):
    assert read_results({"defences": {"direct": {"asr": 0.1, "asr_ci95": given}}}).direct.asr == Rate(0.1, read)


@pytest.mark.parametrize(
    "document",
    [None, [], "text", {}, {"defences": [], "paired": "x"}, {"benchmark": 1, "mm_safetybench": None}],
)
def test_a_document_without_figures(document):
    assert read_results(document) == Results()


def test_parts_that_are_none_are_left_out():
    document = {
        "defences": {"a": None, "direct": {"by_cell": {"x": [], "y": {"n": "1"}}}},
        "paired": {"shiftdc": {"by_cell": {"y": None}}},
    }
    found = read_results(document)
    assert (list(found.defences), found.direct.by_cell) == (["direct"], {"y": CellFigures()})
    assert found.effect.cell("y") == Difference()
    assert found.shiftdc == DefenceFigures()


def test_no_part_of_a_document_can_stop_it_from_being_read(tmp_path):
    """Whatever stands in the place of any value, the rest is read as before."""

    def paths(tree, prefix=()):
        for key, value in tree.items():
            yield (*prefix, key)
            if isinstance(value, dict):
                yield from paths(value, (*prefix, key))

    text = written(("direct", "shiftdc"), Benchmark("mm-safetybench", tuple(questions())[::7], "org/data@0"), tmp_path)
    whole = dataclasses.asdict(read_results(json.loads(text)))
    for path in paths(json.loads(text)):
        for value in (None, math.nan, "text", [], [[]], True, {"a": {"b": 1}}, 10**400):
            document = json.loads(text)
            parent = document
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = value
            found = dataclasses.asdict(read_results(document))
            assert {k: v for k, v in found.items() if k not in (path[0], "about")} == {
                k: v for k, v in whole.items() if k not in (path[0], "about")
            }, (path, value)
