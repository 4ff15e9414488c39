"""results/*.json as one table, put between the markers of the README's section "Speed".

python -m benchmarks.speed.table
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.support.side_by_side import RESULTS, line

README = Path(__file__).parents[2] / "README.md"
NAMES = ("directions", "baking", "replies", "evaluation", "startup")
BEGIN, END = "<!-- speed: written by benchmarks/speed/table.py -->", "<!-- /speed -->"


def table() -> str:
    found = [json.loads((RESULTS / f"{name}.json").read_text("utf-8")) for name in NAMES]
    head = ["| work | against | measured | target | met | |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *(line(row) for results in found for row in results["rows"])])


def main() -> None:
    before, rest = README.read_text("utf-8").split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", "utf-8")
    print(table())


if __name__ == "__main__":
    main()
