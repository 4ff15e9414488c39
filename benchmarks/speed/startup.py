"""From a cold start: the export of the demo, and `--help`.

python -m benchmarks.speed.startup
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.support.side_by_side import row, write

COMMAND = "import sys; from exporter.cli.commands import main; sys.argv[0] = 'shiftdc-export'; main()"


def timed(*arguments: str, importtime: bool = False) -> tuple[float, str]:
    """(seconds, stderr) of a run in a fresh process."""
    options = ["-X", "importtime"] if importtime else []
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *options, "-c", COMMAND, *arguments], capture_output=True, text=True, check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    return time.perf_counter() - start, done.stderr


def main() -> None:
    helps = [timed("--help")[0] for _ in range(6)][1:]
    imported = {line.rsplit("|", 1)[-1].strip() for line in timed("--help", importtime=True)[1].splitlines()}
    heavy = sorted(imported & {"torch", "transformers", "numpy"})
    with tempfile.TemporaryDirectory() as folder:
        export, _ = timed("demo", "--output", str(Path(folder) / "demo-shiftdc"), "--quiet")
    note = f"imports {', '.join(heavy)}" if heavy else "without torch, transformers and numpy"
    rows = [
        row("export of the demo, cold start to finish", "-", export, 60, unit="s"),
        row("`--help`", "-", statistics.median(helps), 0.5, unit="s", note=note),
    ]
    write("startup", rows, help_seconds=helps, heavy_imports=heavy)


if __name__ == "__main__":
    main()
