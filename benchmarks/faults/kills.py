"""Kill exports and pushes at random moments and see what is left: python -m benchmarks.faults.kills --kills 200

Each trial is a process that starts an export of a tiny model (into a free place, or over an earlier export with --force), an
export of the demo model, or a push to a local Hub, and is killed (SIGKILL) at a random moment of a random stage. Then the output
must be absent, or the earlier export, or complete and verified; a second run must finish, be verified, and leave nothing else in
the folder. Prints one JSON document; exit code 1 if any trial failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

import torch  # noqa: E402
from hub_write import WRITE, Hub, serve  # noqa: E402 (of the tests)

REPO = "alice/killed"
#: Share of the trials.
KINDS = {"export": 0.5, "export --force": 0.2, "push": 0.2, "demo": 0.1}
Work = Callable[[Callable[[str, int, int], None]], object]


@dataclass(frozen=True)
class Stage:
    """Where the trials happen: a folder, the inputs, and the local Hub."""

    folder: Path
    base: Path
    calibration: Path
    pushed: Path
    hub: Hub

    @property
    def output(self) -> Path:
        return self.folder / "work" / "out"

    def work(self, kind: str) -> Work:
        from exporter.pipeline.export import export
        from exporter.pipeline.plan import ExportOptions, make_plan
        from exporter.publishing.push import push

        def run(progress: Callable[[str, int, int], None]) -> object:
            if kind == "push":
                return push(self.pushed, REPO, private=False, allow_ineffective=True, progress=progress)
            if kind == "demo":
                return export(make_plan("demo", ExportOptions.of(output=self.output, force=True)), progress)
            options = {"output": self.output, "layers": "1", "calibration": str(self.calibration)}
            return export(make_plan(str(self.base), ExportOptions.of(force=True, **options)), progress)

        return run

    def reset(self, kind: str) -> None:
        shutil.rmtree(self.output.parent, ignore_errors=True)
        self.output.parent.mkdir()
        self.hub.repositories.pop(REPO, None)
        if kind == "export --force":
            shutil.copytree(self.pushed, self.output)

    def temporary(self) -> set[Path]:
        """Temporary folders."""
        return set((self.folder / "tmp").glob("*/*"))

    def fault(self, kind: str, ended: bool) -> str | None:
        """What is wrong with what a run has left."""
        from exporter.checkpoint.layout import REPORT
        from exporter.checkpoint.manifest import differences
        from exporter.checkpoint.report import read_report
        from exporter.checkpoint.verify import verify
        from exporter.errors import ShiftDCError

        try:
            if kind == "push":
                files = self.hub.files(REPO) if REPO in self.hub.repositories else {}
                if REPORT not in files:
                    return (
                        "the push has ended and is not there" if ended else (f"only {sorted(files)}" if len(files) > 1 else None)
                    )
                with tempfile.TemporaryDirectory() as folder:
                    for name, content in files.items():
                        (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                        (Path(folder) / name).write_bytes(content)
                    wrong, _ = differences(Path(folder), read_report(Path(folder)))
                return "; ".join(wrong) or None
            if ended and (left := sorted(f.name for f in self.output.parent.iterdir() if f != self.output)):
                return f"left behind: {left}"
            if not self.output.exists():
                return "there is no output" if ended else None
            if not ended:
                verify(self.output)
            elif wrong := differences(self.output, read_report(self.output))[0]:  # it verified itself
                return "; ".join(wrong)
        except ShiftDCError as error:
            return str(error)
        return None


class Child:
    """A copy of this process that does `work` and says which stages it comes to; before the first it is at "start"."""

    def __init__(self, work: Work, folder: Path):
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.chdir(folder)
                torch.set_num_threads(1)  # makes PyTorch's own threads anew, which two threads at once cannot
                work(lambda stage, done, total: os.write(writing, f"{stage}\n".encode()))  # type: ignore[arg-type, return-value]
                code = 0
            except Exception as error:  # noqa: BLE001 (whatever it is, it is a trial that failed)
                os.write(writing, f"{type(error).__name__}: {str(error)[:300]!r}\n".encode())
            finally:
                os._exit(code)
        os.close(writing)
        self.stages = os.fdopen(reading)

    def wait_for(self, stage: str) -> None:
        while stage != "start" and (line := self.stages.readline()) and line.strip() != stage:
            pass

    def ended(self, at: str = "start") -> tuple[int, str]:
        """(exit code, the last stage since `at`, or the error that ended it)."""
        with self.stages:
            last = [at, *self.stages.read().splitlines()][-1]
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), last


def whole_run(stage: Stage, kind: str) -> dict[str, float]:
    """Seconds of every stage of an undisturbed run."""
    stage.reset(kind)
    began = {"start": time.perf_counter()}
    child = Child(stage.work(kind), stage.folder)
    for line in child.stages:
        began.setdefault(line.strip(), time.perf_counter())
    code, _ = child.ended()
    if code or (fault := stage.fault(kind, True)):
        raise SystemExit(f"an undisturbed {kind} failed after {list(began)}: {code or fault}")
    ends = [*list(began.values())[1:], time.perf_counter()]
    return {name: end - start for (name, start), end in zip(began.items(), ends, strict=True)}


def trial(stage: Stage, kind: str, at: str, delay: float) -> dict[str, Any]:
    stage.reset(kind)
    child = Child(stage.work(kind), stage.folder)
    child.wait_for(at)
    time.sleep(delay)
    os.kill(child.pid, signal.SIGKILL)
    code, last = child.ended(at)
    found: dict[str, Any] = {"kind": kind, "stage": last if code else "ended", "killed": stage.fault(kind, False)}
    left = stage.temporary()
    code, last = Child(stage.work(kind), stage.folder).ended()
    found["again"] = f"exit code {code}, {last}" if code else stage.fault(kind, True)
    if not code and (still := left & stage.temporary()):
        found["again"] = f"left behind: {sorted(map(str, still))}"
    return found


def prepared(folder: Path, hub: Hub) -> Stage:
    from tiny import save_tiny_llava

    from exporter.pipeline.export import export
    from exporter.pipeline.plan import ExportOptions, make_plan

    base = save_tiny_llava(folder / "base")
    rows = [
        {"label": label, "request": f"How do I make {i}?", "caption": f"{label} {i}", "split": "fit" if i < 8 else "held_out"}
        for label in ("safe", "unsafe")
        for i in range(10)
    ]
    calibration = folder / "set.jsonl"
    calibration.write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "work").mkdir()
    export(make_plan(str(base), ExportOptions.of(output=folder / "pushed", layers="1", calibration=str(calibration))))
    return Stage(folder, base, calibration, folder / "pushed", hub)


def main(kills: int, seed: int, only: str | None) -> None:
    draw = random.Random(seed)
    with serve() as hub, tempfile.TemporaryDirectory(prefix="shiftdc-kills-") as folder:
        # read when huggingface_hub is imported
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE, "HF_HUB_DISABLE_XET": "1", "HF_HOME": f"{folder}/home"}
        os.environ["SHIFTDC_CACHE"] = f"{folder}/cache"  # of no other run
        os.environ.pop("HF_HUB_OFFLINE", None)
        tempfile.tempdir = str(Path(folder) / "tmp")
        Path(tempfile.tempdir).mkdir()
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(1)  # a copy of this process has no other threads
        stage = prepared(Path(folder), hub)
        kinds = [only] if only else list(KINDS)
        chosen = draw.choices(kinds, [KINDS[k] for k in kinds], k=kills)
        seconds = {kind: whole_run(stage, kind) for kind in dict.fromkeys(chosen)}
        trials = []
        for kind in chosen:
            at = draw.choice(list(seconds[kind]))
            trials.append(trial(stage, kind, at, draw.uniform(0, 1.05 * seconds[kind][at])))
            print(len(trials), json.dumps(trials[-1]), file=sys.stderr, flush=True)
    half = [t for t in trials if t["killed"] or t["again"]]
    print(
        json.dumps(
            {
                "kills": kills,
                "seed": seed,
                "half_finished": len(half),
                "faults": half[:20],
                "kinds": Counter(chosen),
                "stages": Counter(f"{t['kind']}: {t['stage']}" for t in trials),
                "seconds_of_a_whole_run": {k: round(sum(v.values()), 2) for k, v in seconds.items()},
            },
            indent=2,
        )
    )
    sys.exit(bool(half))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, help="only this one")
    given = parser.parse_args()
    main(given.kills, given.seed, given.kind)
