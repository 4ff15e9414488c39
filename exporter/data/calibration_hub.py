"""The calibration sets of arXiv:2502.13095 as published on the Hub: MM-SafetyBench (unsafe) and LLaVA-Instruct (safe).

Read as data only, at one commit. Texts never reach an output or an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from PIL import Image

from exporter.data.benchmarks import load_benchmark
from exporter.data.benchmarks_hub import MM_SAFETYBENCH_8
from exporter.data.calibration import CalibrationRow, CalibrationSet, Source
from exporter.data.calibration_record import CalibrationRecord
from exporter.data.hub_datasets import hub_errors, need_datasets
from exporter.data.pictures import Picture
from exporter.data.questions import Benchmark, Question
from exporter.errors import InputError

MM_SAFETYBENCH = "mm-safetybench"
#: Questions of each of the eight scenarios, as three pictures each: 160 to fit, 40 held out.
PER_SCENARIO = 25
LLAVA_INSTRUCT, LLAVA_FILE = "liuhaotian/LLaVA-Instruct-150K", "llava_instruct_80k.json"
#: Conversations, evenly over the file: 160 to fit, 40 held out.
CONVERSATIONS = 200
#: One in so many is held out.
HELD_OUT = 5
#: Words of a conversation's first reply that stand for a caption.
CAPTION_WORDS = 50


@dataclass(frozen=True)
class HubSet:
    """A data set whose rows all have one label."""

    label: Literal["safe", "unsafe"]
    load: Callable[[], CalibrationSet]


def mm_safetybench() -> CalibrationSet:
    """The first questions of the scenarios 01-07 and 09, each with its three pictures. Captions are left to the model.

    The paper draws 160 questions of these scenarios; it does not say which.
    """
    with _calibration_errors():
        benchmark = load_benchmark(MM_SAFETYBENCH)
    rows, seen = [], []
    for question in benchmark.questions:
        index = int(question.id.rpartition("-")[2])
        if question.category in MM_SAFETYBENCH_8 and question.image is not None and index < PER_SCENARIO:
            rows.append(
                CalibrationRow(
                    label="unsafe",
                    request=question.request,
                    image=_CalibrationPicture(question.image),
                    category=question.category,
                    split=_split(index),
                )
            )
            seen.append(question_hash(benchmark.name, question))
    dataset, _, commit = benchmark.source.partition(",")[0].partition("@")
    source = Source(dataset, commit, "CC-BY-NC-4.0")
    return CalibrationSet(MM_SAFETYBENCH, tuple(rows), _digest(rows), (source,), tuple(dict.fromkeys(seen)))


@dataclass(frozen=True)
class _CalibrationPicture(Picture):
    """A benchmark's picture, whose errors name the option of the calibration set."""

    picture: Picture

    def load(self) -> Image.Image:
        with _calibration_errors():
            return self.picture.load()

    def identity(self) -> str:
        return self.picture.identity()


def question_hash(benchmark: str, question: Question) -> str:
    """Names a question whatever its picture, without its text: by category and place in the data set."""
    name = f"{benchmark}/{question.category}/{question.id.rpartition('-')[2]}"
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def calibrated_revision(calibration: CalibrationRecord, benchmark: str) -> str | None:
    """The commit of a benchmark on which an export was calibrated, from its report; None where it was not."""
    if benchmark != MM_SAFETYBENCH or not calibration.seen_questions:
        return None
    return next((source.revision for source in calibration.sources if "MM-SafetyBench" in source.dataset), None)


def unseen(benchmark: Benchmark, calibration: CalibrationRecord) -> Benchmark:
    """The questions that calibration did not see, in any picture; the source says how many were left out."""
    seen = set(calibration.seen_questions)
    kept = tuple(q for q in benchmark.questions if question_hash(benchmark.name, q) not in seen)
    if len(kept) == len(benchmark.questions):
        return benchmark
    left_out = len(benchmark.questions) - len(kept)
    return replace(benchmark, questions=kept, source=f"{benchmark.source}, without {left_out} rows used for calibration")


def llava_instruct() -> CalibrationSet:
    """Each conversation's first question. Its pictures are of COCO and not in the data set.

    The reply to it describes the picture, and stands for the caption; pictures are rendered from that.
    """
    with _calibration_errors():
        need_datasets("llava-instruct")
        from huggingface_hub import dataset_info, hf_hub_download

        with hub_errors(LLAVA_INSTRUCT, None):
            commit = str(dataset_info(LLAVA_INSTRUCT).sha)
            file = hf_hub_download(LLAVA_INSTRUCT, LLAVA_FILE, repo_type="dataset", revision=commit)
    rows = _spread(list(_conversations(Path(file))))
    return CalibrationSet("llava-instruct", tuple(rows), _digest(rows), (Source(LLAVA_INSTRUCT, commit, "CC-BY-4.0"),))


def _conversations(file: Path) -> Iterator[CalibrationRow]:
    """Those that begin with a question about a picture and its reply. Raises InputError."""
    try:
        records = list(json.loads(file.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise _malformed("the file") from error
    for number, record in enumerate(records):
        try:
            (asked, request), (answered, reply) = ((turn["from"], turn["value"].strip()) for turn in record["conversations"][:2])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _malformed(f"record {number}") from error
        request = request.replace("<image>", "").strip()
        if (asked, answered) == ("human", "gpt") and "image" in record and request and reply:
            yield CalibrationRow(label="safe", request=request, caption=" ".join(reply.split()[:CAPTION_WORDS]))


def _malformed(where: str) -> InputError:
    return InputError(
        f"--calibration: {LLAVA_INSTRUCT}, {LLAVA_FILE}: {where} has not the expected form; use safe rows of a FILE.jsonl."
    )


def _spread(rows: Sequence[CalibrationRow]) -> list[CalibrationRow]:
    """Rows evenly over all, some of them held out."""
    chosen = rows[:: max(1, len(rows) // CONVERSATIONS)][:CONVERSATIONS]
    return [r.model_copy(update={"split": _split(i)}) for i, r in enumerate(chosen)]


def _split(index: int) -> Literal["fit", "held_out"]:
    return "held_out" if index % HELD_OUT == HELD_OUT - 1 else "fit"


def _digest(rows: Sequence[CalibrationRow]) -> str:
    texts = [[r.label, r.split, r.request, r.caption] for r in rows]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


@contextmanager
def _calibration_errors() -> Iterator[None]:
    """Errors of the benchmark readers, under the option that the caller used."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace("--benchmark:", "--calibration:", 1)) from error


HUB_SETS: Mapping[str, HubSet] = {
    MM_SAFETYBENCH: HubSet("unsafe", mm_safetybench),
    "llava-instruct": HubSet("safe", llava_instruct),
}
