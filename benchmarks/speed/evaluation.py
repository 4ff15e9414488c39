"""The demo's benchmark asked in batches, against one question at a time: the same replies?

python -m benchmarks.speed.evaluation [--limit 8] [--rounds 1]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.support.side_by_side import one_thread, ratio, row, seconds, write
from exporter.checkpoint.open import open_export
from exporter.data.benchmarks import load_benchmark
from exporter.evaluation.defences import DEFENCES, Run
from exporter.evaluation.evaluate import collect
from exporter.evaluation.replies import ReplyLog
from exporter.pipeline.export import export
from exporter.pipeline.plan import ExportOptions, make_plan

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=16, help="questions per cell")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    one_thread()
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan("demo", ExportOptions.of(output=Path(folder) / "demo-shiftdc"))
        export(plan)
        run = Run(open_export(plan.output), 32)
        benchmark = load_benchmark("demo", split="development").limited(arguments.limit)
        replies: dict[int, list[str]] = {}

        def ask(size: int) -> None:
            with tempfile.TemporaryDirectory() as log_folder:
                log = ReplyLog(Path(log_folder), {})
                for name in ("direct", "shiftdc"):
                    collect(run, benchmark, DEFENCES[name], log, batch_size=size)
                ids = [q.id for q in benchmark.questions]
                replies[size] = [r.text for name in ("direct", "shiftdc") for r in log.of(name, ids)]

        found = seconds({"batched": lambda: ask(BATCH), "one by one": lambda: ask(1)}, arguments.rounds, warm=False)
    differing = sum(a != b for a, b in zip(replies[BATCH], replies[1], strict=True))
    note = f"{len(replies[1])} replies, {differing} of them different"
    work = f"evaluate the demo, {len(benchmark.questions)} questions, no defence and ShiftDC, batches of {BATCH}: speed"
    speed = ratio(found["one by one"], found["batched"])
    write("evaluation", [row(work, "one reply at a time", speed, 3, least=True, note=note)], seconds=found, differing=differing)


if __name__ == "__main__":
    main()
