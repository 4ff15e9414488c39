"""What captions of each style do on the demo, and what they cost: attack success, over-refusal, exact answers, time.

python -m benchmarks.effect.caption_styles [--limit 60] [--split development]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any, get_args

from benchmarks.support.side_by_side import one_thread, ratio, seconds, write
from exporter.checkpoint.open import open_export
from exporter.data.benchmarks import load_benchmark
from exporter.data.refusals import begins_as_refusal
from exporter.evaluation.defences import DEFENCES, Run
from exporter.evaluation.evaluate import evaluate
from exporter.evaluation.replies import ReplyLog
from exporter.evaluation.results import About
from exporter.evaluation.results_json import as_document
from exporter.models.recipe import CaptionStyle
from exporter.pipeline.export import export
from exporter.pipeline.plan import ExportOptions, make_plan


def measured(style: str, split: str, limit: int | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan("demo", ExportOptions.of(output=Path(folder) / "demo-shiftdc", caption_style=style))
        export(plan)
        vlm = open_export(plan.output)
        questions = load_benchmark("demo", split=split).limited(limit)
        judge = ("prefix", lambda _, replies: [begins_as_refusal(r) for r in replies])
        log = ReplyLog(Path(folder) / "log", {})
        results = evaluate(Run(vlm, 32), questions, [DEFENCES["direct"], DEFENCES["shiftdc"]], judge, log, About())
        found = as_document(results)["defences"]["shiftdc"]
    first = next(q for q in questions.questions if q.cell == "harmless_image")
    inputs = vlm.encode([first.request], [first.image.load()])
    model, length = vlm.model, {"max_new_tokens": 24, "min_new_tokens": 24}
    seen = model.shiftdc_image(**inputs)
    times = seconds(
        {
            "plain": lambda: model.generate(**inputs, **length, shiftdc=False),
            "calibrated": lambda: model.generate(**inputs, **length),
            "read once": lambda: model.generate(**inputs, **length, shiftdc_image=seen),
        },
        20,
    )
    captions = [len(c) for c in model.shiftdc_captions(**vlm.encode(
        [q.request for q in questions.questions if q.image][:64], [q.image.load() for q in questions.questions if q.image][:64]
    ))]  # fmt: skip
    return {
        "prompt": plan.recipe.wording.caption,
        **{k: found[k] for k in ("asr", "asr_ci95", "over_refusal", "over_refusal_ci95", "utility", "n_harmful", "n_benign")},
        "caption_tokens": statistics.mean(captions),
        "cost": ratio(times["calibrated"], times["plain"]),
        "cost_read_once": ratio(times["read once"], times["plain"]),
        "example": vlm.decode(seen.captions[0]),
    }


def line(style: str, f: dict[str, Any]) -> str:
    def cell(name: str) -> str:
        low, high = f[f"{name}_ci95"]
        return f"{100 * f[name]:.1f} [{100 * low:.1f}-{100 * high:.1f}]"

    return (
        f'| `{style}`: "{f["prompt"]}" | {f["caption_tokens"]:.1f} | {cell("asr")} | {cell("over_refusal")} | '
        f"{100 * f['utility']:.1f} | {f['cost']:.2f} x | {f['cost_read_once']:.2f} x |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="questions per cell [default: all]")
    parser.add_argument("--split", choices=("development", "test"), default="development")
    arguments = parser.parse_args()
    one_thread()
    styles = {style: measured(style, arguments.split, arguments.limit) for style in get_args(CaptionStyle)}
    write("caption_styles", [], split=arguments.split, limit=arguments.limit, styles=styles)
    for style, found in styles.items():
        print(line(style, found))


if __name__ == "__main__":
    main()
