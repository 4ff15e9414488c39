"""The paper's calibration sets, laid out as published and served by a local Hub to the real client."""

from __future__ import annotations

import json
import os
import subprocess
from types import SimpleNamespace

import pytest
from hub import COMMIT, serve
from interpreters import python
from test_benchmarks import card, mm_safetybench

from exporter.data.calibration_hub import calibrated_revision, question_hash, unseen
from exporter.data.calibration_record import CalibrationRecord
from exporter.data.questions import Benchmark, Question
from exporter.pipeline import evaluate as evidence

SECRET = "whatever stands here is shown to nobody"

# Loads the sets of its arguments and prints what came of them.
PROGRAM = """
import json, sys
from exporter.data.calibration_record import CalibrationRecord
from exporter.data.calibration_sets import load_calibration
from exporter.data.images import row_image
from exporter.errors import InputError

def attempt(name):
    try:
        found = load_calibration(name)
    except InputError as error:
        return str(error)
    rows = [
        {**r.model_dump(exclude={"image"}), "pixel": None if r.image is None else row_image(r).getpixel((0, 0))}
        for r in found.rows
    ]
    assert "seen_questions" not in found.summary()  # too long to print
    return {"summary": CalibrationRecord.of(found).model_dump(exclude_unset=True), "rows": rows}

print(json.dumps({name: attempt(name) for name in sys.argv[1:]}))
"""


def conversation(question, *replies, image="000000000001.jpg"):
    turns = [{"from": "human", "value": question}]
    turns += [{"from": ("gpt", "human")[i % 2], "value": reply} for i, reply in enumerate(replies)]
    return {"id": "000000000001", "conversations": turns} | ({"image": image} if image else {})


def llava_instruct(folder, records=None):
    """`id`, `image` (a file of COCO) and `conversations` of turns `from`, `value`, of which the first holds <image>."""
    card(folder)
    marks = ("\n<image>", "")  # the picture's place is before or after the question
    usual = [
        conversation(f"{marks[i % 2 - 1]}\nWhat is this, number {i}?{marks[i % 2]}", f"It is {i}. " + "word " * 80)
        for i in range(450)
    ]
    odd = [
        conversation("Text only?", "Yes.", image=None),
        conversation("<image>", "No question."),
        conversation("No reply?\n<image>"),
    ]
    data = json.dumps([*odd[:2], *usual] if records is None else records)
    (folder / "llava_instruct_80k.json").write_text(data)
    return odd


def load(url, home, *names):
    environment = {
        **os.environ, "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
        "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    command = [*python(), "-c", PROGRAM, *names]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PAPER = "mm-safetybench+llava-instruct"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    root, home = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("home")
    mm_safetybench(root / "mm", 6)
    llava_instruct(root / "llava")
    repositories = {
        "datasets/PKU-Alignment/MM-SafetyBench": root / "mm",
        "datasets/liuhaotian/LLaVA-Instruct-150K": root / "llava",
    }
    with serve(repositories) as url:
        return load(url, home, PAPER, "mm-safetybench+builtin")


def test_the_paper_s_sets(loaded):
    summary = loaded[PAPER]["summary"]
    assert summary["name"] == PAPER
    counts = {k: v for k, v in summary.items() if k.startswith(("fit", "held"))}
    # 8 scenarios of 6 questions with 3 pictures each, one question of each held out; 200 of 450 conversations
    assert counts == {"fit_safe": 160, "fit_unsafe": 8 * 5 * 3, "held_out_safe": 40, "held_out_unsafe": 8 * 3}
    assert summary["captions_by_the_model"] == 8 * 6 * 3
    assert summary["sources"] == [
        {"dataset": "PKU-Alignment/MM-SafetyBench", "revision": COMMIT, "licence": "CC-BY-NC-4.0"},
        {"dataset": "liuhaotian/LLaVA-Instruct-150K", "revision": COMMIT, "licence": "CC-BY-4.0"},
    ]


def test_unsafe_rows_keep_request_and_picture_and_leave_the_caption_to_the_model(loaded):
    rows = [r for r in loaded[PAPER]["rows"] if r["label"] == "unsafe"]
    assert {r["category"][:2] for r in rows} == {"01", "02", "03", "04", "05", "06", "07", "09"}
    for row in rows:
        scenario, kind, index = row["request"].split()
        assert kind in ("SD", "TYPO", "SD_TYPO")
        assert scenario.replace("Activitiy", "Activity") in row["category"]
        assert row["pixel"] == ([255, 0, 0], [0, 0, 255])[int(index) % 2]
        assert row["caption"] == ""
        assert (row["split"] == "held_out") == (index == "4")  # in every picture of it


def test_safe_rows_are_first_questions_with_the_reply_for_a_caption(loaded):
    rows = [r for r in loaded[PAPER]["rows"] if r["label"] == "safe"]
    numbers = [int(r["request"].removeprefix("What is this, number ").removesuffix("?")) for r in rows]
    assert numbers == list(range(0, 400, 2))
    for number, row in zip(numbers, rows, strict=True):
        assert row["caption"].startswith(f"It is {number}. word")
        assert len(row["caption"].split()) == 50
        assert row["pixel"] is None  # rendered from the caption
    assert [r["split"] for r in rows[:6]] == ["fit"] * 4 + ["held_out", "fit"]


def test_a_side_may_be_another_set(loaded):
    found = loaded["mm-safetybench+builtin"]
    assert found["summary"]["fit_safe"] == 160
    assert len(found["summary"]["sources"]) == 1
    assert {r["label"] for r in found["rows"] if r["caption"] == ""} == {"unsafe"}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"a": 1}, "record 0 has not the expected form"),
        ([conversation("Fine?\n<image>", SECRET), {"image": SECRET}], "record 1 has not the expected form"),
        ([{"image": "1.jpg", "conversations": [{"from": "human", "value": SECRET}]}], "record 0 has not the expected form"),
        ([conversation("Fine?\n<image>", SECRET)], "has 1 safe rows with split 'fit'"),
        (None, "liuhaotian/LLaVA-Instruct-150K is not on the Hub"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, records, message):
    if records is not None:
        llava_instruct(tmp_path / "llava", records)
    repositories = {} if records is None else {"datasets/liuhaotian/LLaVA-Instruct-150K": tmp_path / "llava"}
    with serve(repositories) as url:
        (found,) = load(url, tmp_path, "builtin+llava-instruct").values()
    assert found.startswith("--calibration: ")
    assert message in found
    assert SECRET not in found


# What calibration saw is not evaluated.


class StopError(Exception):
    pass


def test_evaluate_asks_at_that_commit_and_leaves_out_what_was_seen(tmp_path, monkeypatch):
    benchmark, asked = questions(), []
    seen = [question_hash("mm-safetybench", benchmark.questions[0])]
    sources = [{"dataset": "PKU-Alignment/MM-SafetyBench", "revision": COMMIT, "licence": "CC-BY-NC-4.0"}]
    report = SimpleNamespace(calibration=record(seen_questions=seen, sources=sources))
    monkeypatch.setattr(evidence, "read_report", lambda folder: report)

    def stop(found, categories):
        asked.append(len(found.questions))
        raise StopError

    monkeypatch.setattr(evidence, "load_benchmark", lambda name, split, revision: asked.append(revision) or benchmark)
    monkeypatch.setattr(evidence, "of_categories", stop)
    with pytest.raises(StopError):
        evidence.gather(tmp_path, evidence.EvaluationOptions(benchmark="mm-safetybench"))
    assert asked == [COMMIT, len(benchmark.questions) - 3]


def record(**changes):
    counts = dict.fromkeys(("fit_safe", "fit_unsafe", "held_out_safe", "held_out_unsafe"), 9)
    return CalibrationRecord.model_validate({"name": "builtin", "sha256": "ab" * 32, **counts, **changes})


def questions(name="mm-safetybench", categories=("01-A", "02-B"), kinds=("SD", "TYPO", "Text_only"), count=3):
    rows = [
        Question(f"{name}-{c}-{k}-{i:05d}", SECRET, "harmful", "harmful_image", c, k)
        for c in categories
        for k in kinds
        for i in range(count)
    ]
    return Benchmark(name, tuple(rows), f"PKU-Alignment/MM-SafetyBench@{COMMIT}")


def test_a_question_that_calibration_saw_is_left_out_in_every_picture():
    benchmark = questions()
    seen = [question_hash("mm-safetybench", q) for q in benchmark.questions if q.id == "mm-safetybench-02-B-SD-00001"]
    kept = unseen(benchmark, record(seen_questions=seen))
    left_out = {q.id for q in benchmark.questions} - {q.id for q in kept.questions}
    assert left_out == {f"mm-safetybench-02-B-{k}-00001" for k in ("SD", "TYPO", "Text_only")}
    assert kept.source == f"{benchmark.source}, without 3 rows used for calibration"
    assert unseen(benchmark, record()) is benchmark
    other = questions("other")
    assert unseen(other, record(seen_questions=seen)) is other


def test_the_benchmark_is_read_at_the_commit_of_the_calibration(loaded):
    summary = loaded[PAPER]["summary"]
    assert calibrated_revision(record(**summary), "mm-safetybench") == COMMIT
    assert calibrated_revision(record(**summary), "xstest") is None
    assert calibrated_revision(record(), "mm-safetybench") is None
    assert len(summary["seen_questions"]) == len(set(summary["seen_questions"])) == 8 * 6
    assert all(len(h) == 16 for h in summary["seen_questions"])
    assert "number" not in json.dumps(summary)
