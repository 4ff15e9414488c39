"""Directions by one process, by two of torchrun, and with half of the layers on disk, on two sizes.

    python -m benchmarks.scale.spread

Every process has one thread. Two processes need two free cores for their wall time to mean something; the CPU time of the busier
one is what it would be.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.models import Size, save
from benchmarks.support.side_by_side import one_thread
from exporter.data.calibration_sets import load_calibration
from exporter.directions.fit import fit_directions
from exporter.models.base import resolve
from exporter.models.loading import load_vlm
from exporter.models.recipe import load_recipe
from exporter.models.vlm import VLM
from exporter.runtime.batches import Batches
from exporter.runtime.ranks import joined

#: 64 image tokens.
SIZES = tuple(
    Size(hidden, layers, hidden // 64, hidden * 11 // 4, vocabulary=1024, image=112, vision_layers=2)
    for hidden, layers in ((256, 4), (512, 6))
)
ROWS = {"fit": 12, "held_out": 4}  # of each label
ROUNDS = 2  # the better counts
KINDS = ("alone", "two", "disk")


class Timed(Batches):
    """Counts the CPU seconds that this process spends in batches, which ranks share; the rest each does for itself."""

    inside = 0.0

    def _mine(self, *arguments: Any) -> torch.Tensor | None:
        start = time.process_time()
        value = super()._mine(*arguments)
        self.inside += time.process_time() - start
        return value


def calibration() -> Any:
    """A part of the built-in set."""
    whole = load_calibration("builtin")
    rows = [r for split, n in ROWS.items() for label in ("safe", "unsafe") for r in whole.select(split, label)[:n]]
    return replace(whole, rows=tuple(rows))


def load(folder: Path, kind: str, offload: Path) -> VLM:
    recipe, base = load_recipe("llava"), resolve(str(folder))
    if kind != "disk":
        return load_vlm(base, recipe)
    depth = base.config["text_config"]["num_hidden_layers"]
    places = {f"model.language_model.layers.{i}": "cpu" if i < depth // 2 else "disk" for i in range(depth)}
    others = ("embed_tokens", "norm", "rotary_emb")
    places |= {f"model.language_model.{name}": "cpu" for name in others}
    places |= {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    return load_vlm(base, recipe, device_map=places, offload=offload)


def worker(folder: Path, kind: str) -> None:
    """Prints what every round took: wall seconds, and CPU seconds of the busiest process: all, and in batches."""
    one_thread()
    recipe = load_recipe("llava")
    with joined() as ranks, tempfile.TemporaryDirectory() as offload:
        vlm = load(folder, kind, Path(offload))
        found = []
        for _ in range(ROUNDS):
            ranks.gather(lambda: None)  # all begin together
            wall, cpu = time.perf_counter(), time.process_time()
            runner = Timed(ranks)
            fit_directions(vlm, calibration(), recipe.prompts, runner=runner)
            used = [time.process_time() - cpu, runner.inside]
            wall = time.perf_counter() - wall
            found.append([wall, *max(ranks.gather(lambda used=used: used))])
        if ranks.is_main:
            print(json.dumps(found))


def run(folder: Path, kind: str) -> list[list[float]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if kind == "two" else []
    command = [sys.executable, *launcher, "-m", "benchmarks.scale.spread", "--worker", str(folder), kind]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def spread() -> list[dict[str, Any]]:
    """A row for each size: best of the rounds, and ratios to one process."""
    rows = []
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            parameters = sum(p.numel() for p in save(size, Path(folder)).model.language_model.parameters())
            found = {kind: run(Path(folder), kind) for kind in KINDS}
        best = {kind: [min(column) for column in zip(*rounds, strict=True)] for kind, rounds in found.items()}
        rows.append(
            {
                "hidden": size.hidden, "layers": size.layers, "parameters": parameters, "seconds_wall_cpu_batches": found,
                "two_over_one_wall": best["two"][0] / best["alone"][0],
                "two_over_one_cpu": best["two"][1] / best["alone"][1],
                "two_over_one_batches": best["two"][2] / best["alone"][2],
                "disk_over_memory": best["disk"][1] / best["alone"][1],
                "load": os.getloadavg()[0], "cores": os.cpu_count(),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.worker:
        worker(Path(options.worker[0]), options.worker[1])
    else:
        print(json.dumps(spread(), indent=2))


if __name__ == "__main__":
    main()
