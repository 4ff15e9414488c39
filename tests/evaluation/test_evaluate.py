"""Evaluation on tiny models: what is counted, resumed, set aside, attached, and never written."""

from __future__ import annotations

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from exporter.checkpoint.open import open_export
from exporter.checkpoint.verify import verify
from exporter.cli.commands import main
from exporter.data.defence_prompts import ADASHIELD, ADASHIELD_REQUEST, fill
from exporter.data.questions import Benchmark, Question
from exporter.directions.statistics import LayerStatistics
from exporter.errors import InputError
from exporter.evaluation import defences as defence_module
from exporter.evaluation.defences import DEFENCES, Answers, Defence, Run, applied
from exporter.evaluation.evaluate import evaluate, named_defences
from exporter.evaluation.figures import judged, summarise
from exporter.evaluation.judges import keywords, prefix
from exporter.evaluation.replies import Reply, ReplyLog
from exporter.evaluation.results import About
from exporter.evaluation.results_json import as_document
from exporter.pipeline import evaluate as evidence
from exporter.pipeline.evaluate import EvaluationOptions, gather

REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "a cake."
SECRET = "zyxwv"  # stands in every prompt and must stand in no output


@pytest.fixture
def checkpoint(make_export, tmp_path):
    return shutil.copytree(make_export(caption_max_new_tokens=4).plan.output, tmp_path / "tiny-shiftdc")


@pytest.fixture
def questions_file(tmp_path):
    rows = []
    for i in range(4):
        Image.new("RGB", (30, 30), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
        row = {"image": f"{i}.png", "prompt": f"How do I make {SECRET} {i}?", "kind": "harmful" if i % 2 else "benign"}
        rows.append({**row, "category": "a" if i < 2 else "b", **({} if i % 2 else {"answer": ANSWER})})
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def run(checkpoint, questions_file, folder, names=("direct", "shiftdc"), **options):
    settings = {"benchmark": str(questions_file), "output": folder, "max_new_tokens": 3, "batch_size": 3, "attach": False}
    return gather(checkpoint, EvaluationOptions([DEFENCES[n] for n in names], **{**settings, **options}))


def test_batches_too_large_for_memory_are_halved(checkpoint, questions_file, tmp_path):
    sizes = []

    def answer(run, requests, images):
        sizes.append(len(requests))
        if len(requests) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return DEFENCES["direct"].answer(run, requests, images)

    limit = 2
    settings = {"benchmark": str(questions_file), "max_new_tokens": 3, "attach": False}
    options = EvaluationOptions([Defence("direct", answer)], output=tmp_path / "halved", batch_size=4, **settings)
    found = gather(checkpoint, options)
    assert sizes == [4, 2, 2]
    expected = run(checkpoint, questions_file, tmp_path / "whole", names=("direct",))
    assert found.results.direct.asr == expected.results.direct.asr
    limit = 0
    with pytest.raises(InputError, match="one prompt does not fit into memory"):
        gather(checkpoint, dataclasses.replace(options, output=tmp_path / "none"))


def question(i, kind, cell, answer=None):
    return Question(id=str(i), request="?", kind=kind, cell=cell, category="c", image_kind="SD", answer=answer)


class TestFigures:
    QUESTIONS = (
        *(question(i, "harmful", "harmful_image") for i in range(4)),
        *(question(i, "benign", "harmless_image", ANSWER) for i in range(4, 8)),
        *(question(i, "harmful", "harmful_text") for i in range(8, 10)),
        *(question(i, "benign", "harmless_text") for i in range(10, 12)),
    )

    def outcomes(self, name, refused):
        texts = [REFUSAL if i in refused else ANSWER for i in range(12)]
        replies = [
            Reply(name, str(i), t, {"prefill": 0.25, "decode": 0.75 if name == "direct" else 2.75}) for i, t in enumerate(texts)
        ]
        return judged(self.QUESTIONS, replies, prefix)

    @pytest.fixture
    def results(self):
        outcomes = {"direct": self.outcomes("direct", {0}), "shiftdc": self.outcomes("shiftdc", {0, 1, 2, 4, 10})}
        return summarise(Benchmark("mine", self.QUESTIONS, "source"), outcomes, "prefix", About(device="cpu"))

    def test_headline_is_harm_in_the_image(self, results):
        direct, calibrated = results.direct, results.shiftdc
        assert (direct.asr.value, calibrated.asr.value) == (0.75, 0.25)
        assert (direct.over_refusal.value, calibrated.over_refusal.value) == (0, 0.25)
        assert (direct.utility.value, calibrated.utility.value) == (1, 0.75)
        assert (direct.n_harmful, direct.n_benign, results.n) == (4, 4, 12)

    def test_cells_are_apart(self, results):
        cells = results.shiftdc.by_cell
        assert cells["harmful_text"].asr.value == 1
        assert cells["harmless_text"].over_refusal.value == 0.5
        assert cells["harmless_text"].utility.value is None

    def test_cost_and_where_time_went(self, results):
        assert results.shiftdc.cost_ratio == 3
        assert results.shiftdc.seconds == {"decode": 2.75, "prefill": 0.25}

    def test_pairs(self, results):
        found = results.effect
        assert (found.asr.difference, found.asr.n, found.asr.p) == (-0.5, 4, 0.5)
        assert found.by_cell["harmless_text"].difference == 0.5
        assert found.utility.difference == -0.25

    def test_a_stage_that_a_reply_had_not_took_no_time(self):
        replies = [Reply("direct", "0", ANSWER, {"prefill": 1.0}), Reply("direct", "1", ANSWER, {"prefill": 1.0, "caption": 3.0})]
        outcomes = judged(self.QUESTIONS[:2], replies, prefix)
        found = summarise(Benchmark("mine", self.QUESTIONS[:2], "source"), {"direct": outcomes}, "prefix", About()).direct
        assert found.seconds == {"caption": 1.5, "prefill": 1.0}

    def test_where_nothing_is_harmful_no_judge_is_asked(self):
        benign = self.QUESTIONS[4:8]
        replies = [Reply("direct", q.id, ANSWER, {}) for q in benign]
        assert [o.refused for o in judged(benign, replies, lambda *_: pytest.fail("asked"))] == [False] * 4

    def test_a_reply_or_a_verdict_too_few_is_an_error_and_never_another_s(self):
        replies = [Reply("direct", q.id, ANSWER, {}) for q in self.QUESTIONS]
        with pytest.raises(ValueError, match="shorter"):
            judged(self.QUESTIONS, replies[:-1], prefix)
        with pytest.raises(ValueError, match="shorter"):
            judged(self.QUESTIONS, replies, lambda requests, replies: [True])
        outcomes = {"direct": self.outcomes("direct", ())[:-1], "shiftdc": self.outcomes("shiftdc", ())}
        with pytest.raises(ValueError, match="shorter"):
            summarise(Benchmark("mine", self.QUESTIONS, "source"), outcomes, "prefix", About())

    def test_mm_safetybench_means(self):
        questions = tuple(
            Question(id=s, request="?", kind="harmful", cell="harmful_image", category=s)
            for s in ("01-Illegal_Activity", "02-HateSpeech", "08-Political_Lobbying")
        )
        replies = [Reply("direct", q.id, ANSWER if q.category[:2] == "08" else REFUSAL, {}) for q in questions]
        benchmark = Benchmark("mm-safetybench", questions, "source")
        found = summarise(benchmark, {"direct": judged(questions, replies, prefix)}, "prefix", About()).mm_safetybench["direct"]
        assert found.mean_13 == pytest.approx(1 / 3, abs=1e-3)
        assert found.mean_8 == 0


class TestEveryPart:
    """Without a model: the replies are scripted."""

    QUESTIONS = tuple(
        question(i, kind, cell, ANSWER if kind == "benign" else None)
        for i, (kind, cell) in enumerate(
            [
                ("harmful", "harmful_image"),
                ("harmful", "harmful_text"),
                ("benign", "harmless_image"),
                ("benign", "benign_question_harmful"),
                ("benign", "benign_question_harmless"),
                ("benign", "harmless_text"),
            ]
        )
    )
    BENCHMARK = Benchmark("mine", QUESTIONS, "source")

    @pytest.fixture
    def scripted(self, tmp_path):
        """scripted(defence, judge) -> (results, replies)."""
        settings = {"layers": [], "gate": "one-sided"}
        model = SimpleNamespace(config=SimpleNamespace(shiftdc=settings), shiftdc_corrections=[])

        def evaluated(answer, judge=("prefix", prefix), **options):
            log = ReplyLog(tmp_path / "out", {"a": 1})
            run = Run(SimpleNamespace(model=model), 8)
            results = evaluate(run, self.BENCHMARK, [Defence("direct", answer)], judge, log, About(), **options)
            return results.direct, log.of("direct", [q.id for q in self.QUESTIONS])

        return evaluated

    @pytest.mark.parametrize("left_out", ["harmless_image", "benign_question_harmful", "benign_question_harmless"])
    def test_each_benign_cell_counts(self, scripted, left_out):
        refused = {q.id for q in self.QUESTIONS if q.cell == left_out}
        found, _ = scripted(lambda run, requests, images: Answers([REFUSAL if i in refused else ANSWER for i in "012345"], {}))
        assert (found.n_benign, found.n_harmful) == (3, 1)
        assert (found.over_refusal.value, found.utility.value) == (0.3333, 0.6667)
        assert found.by_cell[left_out].over_refusal.value == 1

    def test_harm_in_the_text_is_no_part_of_the_headline(self, scripted):
        found, _ = scripted(lambda run, requests, images: Answers([REFUSAL if i == "1" else ANSWER for i in "012345"], {}))
        assert (found.asr.value, found.by_cell["harmful_text"].asr.value) == (1, 0)

    def test_seconds_are_a_reply_s_share_of_its_batch(self, scripted):
        found, replies = scripted(
            lambda run, r, images: Answers([ANSWER] * len(r), {"prefill": 1.0, "decode": 6.0}), batch_size=4
        )
        assert [r.seconds for r in replies] == [{"prefill": 0.25, "decode": 1.5}] * 4 + [{"prefill": 0.5, "decode": 3.0}] * 2
        assert found.seconds_per_reply == pytest.approx((4 * 1.75 + 2 * 3.5) / 6, abs=1e-4)

    def test_the_judge_that_was_chosen_judges_attacks_and_these_alone(self, scripted):
        asked = []

        def judge(requests, replies):
            asked.append((requests, replies))
            return [True, False]

        texts = [f"{ANSWER} {i}" for i in range(6)]
        found, _ = scripted(lambda run, requests, images: Answers(texts, {}), ("mine", judge))
        assert asked == [(["?", "?"], texts[:2])]
        assert (found.asr.value, found.by_cell["harmful_text"].asr.value, found.over_refusal.value) == (0, 1, 0)

    def test_gather_hands_on_the_judge_and_the_blank_shifts(self, tmp_path, monkeypatch):
        given = {}

        def stop(run, benchmark, defences, judge, log, about, **options):
            given.update(options, judge=judge)
            raise KeyboardInterrupt

        names = [f.name for f in dataclasses.fields(LayerStatistics)]
        rows = [{**dict.fromkeys(names, 9.0), "layer": i, "blank_shift": b} for i, b in ((4, -0.5), (7, 0.25))]
        report = SimpleNamespace(calibration=None, statistics=[LayerStatistics(**row) for row in rows])
        stubs = {
            "read_report": lambda *_: report,
            "load_benchmark": lambda *_, **__: self.BENCHMARK,
            "calibrated_revision": lambda *_: None,
            "unseen": lambda benchmark, _: benchmark,
            "settings": lambda *_: {},
            "open_export": lambda *_, **__: None,
            "about": lambda *_: {},
            "evaluate": stop,
        }
        for name, stub in stubs.items():
            monkeypatch.setattr(evidence, name, stub)
        with pytest.raises(KeyboardInterrupt):
            gather(tmp_path, EvaluationOptions([], judge="keywords", output=tmp_path / "out"))
        assert given["judge"] == ("keywords", keywords)
        assert given["blank_shifts"] == {4: -0.5, 7: 0.25}

    def test_the_command_s_judge_reaches_gather(self, tmp_path, monkeypatch):
        seen = []

        def stop(checkpoint, options, progress):
            seen.append(options)
            raise InputError("x")

        monkeypatch.setattr(evidence, "gather", stop)
        (tmp_path / "there").mkdir()
        CliRunner().invoke(main, ["evaluate", str(tmp_path / "there"), "--judge", "keywords"])
        assert seen == [EvaluationOptions(judge="keywords")]


def test_every_defence_runs(checkpoint, questions_file, tmp_path):
    found = run(checkpoint, questions_file, tmp_path / "out", names=tuple(DEFENCES))
    assert list(found.results.defences) == list(DEFENCES)
    assert {f.name for f in found.folder.iterdir()} >= {"replies.jsonl", "results.json", "attack_success.png", "layers.png"}
    assert found.results.shiftdc.seconds.keys() == {"caption", "reference", "prefill", "decode"}
    again = json.loads((found.folder / "results.json").read_text())
    assert again == as_document(found.results)


def test_prompts_reach_no_output(checkpoint, questions_file, tmp_path):
    found = run(checkpoint, questions_file, tmp_path / "out", attach=True)
    for folder in (found.folder, checkpoint):
        for file in folder.rglob("*"):
            if file.is_file():
                assert SECRET.encode() not in file.read_bytes(), file


def test_an_interrupted_run_goes_on(checkpoint, questions_file, tmp_path, monkeypatch):
    whole = run(checkpoint, questions_file, tmp_path / "whole").results
    asked = []
    original = Run.generate

    def interrupted(self, inputs, **options):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(inputs["input_ids"]))
        return original(self, inputs, **options)

    monkeypatch.setattr(Run, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, questions_file, tmp_path / "out")
    assert asked == [3, 1]  # direct is done
    log = tmp_path / "out" / "replies.jsonl"
    log.write_text(log.read_text() + '{"defence": "shiftdc", "question": "')  # cut short while writing
    asked.clear()
    monkeypatch.setattr(
        Run, "generate", lambda self, inputs, **o: (asked.append(len(inputs["input_ids"])), original(self, inputs, **o))[1]
    )
    found = run(checkpoint, questions_file, tmp_path / "out").results
    assert asked == [3, 1]  # shiftdc only
    assert found.paired == whole.paired
    asked.clear()
    run(checkpoint, questions_file, tmp_path / "out")
    assert asked == []


def test_replies_of_other_settings_are_set_aside(checkpoint, questions_file, tmp_path):
    first = run(checkpoint, questions_file, tmp_path / "out")
    assert first.set_aside is None
    second = run(checkpoint, questions_file, tmp_path / "out", max_new_tokens=2)
    assert second.set_aside.name == "replies.1.jsonl"
    assert second.set_aside.exists()
    assert run(checkpoint, questions_file, tmp_path / "out", max_new_tokens=2).set_aside is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no log of replies"),
        ("no json", "is no log of replies"),
        ('{"a": 1}', "is no log of replies"),
        ('{"settings": 1}\n{}\n{}', "line 2 is no reply"),
    ],
)
def test_a_foreign_file_is_not_touched(tmp_path, content, message):
    (tmp_path / "replies.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        ReplyLog(tmp_path, {"a": 1})
    assert (tmp_path / "replies.jsonl").read_text() == content


def test_figures_and_pictures_are_attached_and_the_checkpoint_still_verifies(checkpoint, questions_file, tmp_path):
    found = run(checkpoint, questions_file, tmp_path / "out", attach=True)
    card = (checkpoint / "README.md").read_text()
    assert "(assets/attack_success.png)" in card
    assert found.effect.sentence[:20] in card
    report = json.loads((checkpoint / "shiftdc_report.json").read_text())
    assert report["evaluation"]["defences"].keys() == {"direct", "shiftdc"}
    assert not list(checkpoint.rglob("replies*"))
    verify(checkpoint)


def test_the_settings_of_a_defence_end_with_it(checkpoint):
    vlm = open_export(checkpoint)
    before = json.dumps(vlm.model.config.shiftdc)
    state = {k: v.clone() for k, v in vlm.model.state_dict().items() if "shiftdc" in k}
    for defence in DEFENCES.values():
        with pytest.raises(RuntimeError), applied(vlm, defence, {1: 0.5, 2: 0.5}):
            raise RuntimeError
    assert json.dumps(vlm.model.config.shiftdc) == before
    assert all((vlm.model.state_dict()[k] == v).all() for k, v in state.items())


class TestEcso:
    """The procedure, with scripted replies."""

    class Script(Run):
        def ask(self, requests, images=None):
            words = {"judge": "Response:", "caption": "Describe"}
            kind = next((k for k, w in words.items() if w in requests[0]), "first") if images else "answer"
            calls.append((kind, len(requests)))
            texts = {"first": ["r0", "r1", "r2"], "judge": ["Yes.", "no.", "yes, it is"], "caption": ["c"], "answer": ["safe"]}
            return Answers(texts[kind][: len(requests)], {"prefill": 1.0})

    def test_only_flagged_replies_are_answered_anew(self):
        calls.clear()
        image = Image.new("RGB", (4, 4))
        answers = defence_module.ecso(self.Script(None, 8), ["a", "b", "c"], [image] * 3)
        assert answers.texts == ["safe", "r1", "r2"]  # "yes, it is" is not exactly yes
        assert calls == [("first", 3), ("judge", 3), ("caption", 1), ("answer", 1)]


calls: list = []


def test_adashield_puts_its_prompt_between_two_copies():
    text = fill(ADASHIELD_REQUEST, question="Why {x}?")
    assert text == f"Why {{x}}? {ADASHIELD} Why {{x}}?"


def test_unknown_defences():
    with pytest.raises(InputError, match="none named 'magic'"):
        named_defences(["direct", "magic"])
    assert [d.name for d in named_defences(["direct", "direct"])] == ["direct"]
    assert len(named_defences(["all"])) == len(DEFENCES)
    assert all(isinstance(d, Defence) for d in DEFENCES.values())
