"""Pictures and questions for the demo model: python examples/demo_questions.py FOLDER [PER_CELL]."""

import json
import sys
from pathlib import Path

from exporter.data.demo import benchmark

CELLS: tuple[benchmark.Cell, ...] = ("harmful_image", "harmless_image", "benign_question_harmful", "harmful_text")


def main(folder: str, per_cell: str = "30") -> None:
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    lines = []
    for item in (item for cell in CELLS for item in benchmark.items("development", cell, int(per_cell))):
        benchmark.image(item).save(target / f"{item.id}.png")
        lines.append(json.dumps({"image": f"{item.id}.png", "prompt": item.request, "kind": item.label}) + "\n")
    (target / "questions.jsonl").write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
