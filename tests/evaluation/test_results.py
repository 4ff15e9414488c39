"""results.json: the same bytes from the same outcomes, whatever the code that writes it looks like."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from exporter.data.questions import Benchmark, Question
from exporter.evaluation.evaluate import judged, summarise, write_results
from exporter.evaluation.judges import prefix
from exporter.evaluation.replies import Reply

#: Written by the first version, when results were nested dicts.
EXPECTED = Path(__file__).with_name("expected_results.json")
ABOUT = {
    "split": "test",
    "limit_per_cell": None,
    "checkpoint": {"name": "tiny", "directions": "0123456789abcdef"},
    "device": "cpu",
    "versions": {"shiftdc-export": "0.1.0", "torch": "2.13.0"},
}
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
