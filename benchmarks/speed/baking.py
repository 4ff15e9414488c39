"""Baking a checkpoint of more than a gigabyte, as it lies in a Hub cache, against loading it and save_pretrained.

On one file system, which need not clone files: shards are linked. Of a base in a folder of its own they would be copied.

    python -m benchmarks.speed.baking [--rounds 3] [--folder DIR]

In an export a thread hashes the shards while directions are measured. Both are timed here: the bake of whole exports, with what
it still waits for, and a bake that hashes by itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from benchmarks.support.models import GIGABYTE, save
from benchmarks.support.side_by_side import one_thread, ratio, row, write
from exporter.checkpoint.bake import bake
from exporter.checkpoint.calibrated import Calibrated
from exporter.directions.directions import Directions
from exporter.modeling.configuration_shiftdc import ShiftDCTraits
from exporter.modeling.prompts_shiftdc import PromptFrame
from exporter.models.base import resolve
from exporter.models.recipe import load_recipe
from exporter.pipeline.export import export
from exporter.pipeline.plan import ExportOptions, make_plan
from exporter.runtime.hashing import sha256

LAYERS = (3, 4, 5)
#: A calibration set as small as one can be: what is timed does not depend on it.
ROWS = [
    {"label": label, "request": f"{word} is it {i}?", "caption": f"{word} {i}", "split": "fit" if i < 8 else "held_out"}
    for label, word in (("safe", "What"), ("unsafe", "How"))
    for i in range(10)
]

#: Of prompts that are never made.
FRAME = PromptFrame(((),), (), (), (), (), (((), (), False),), ((),), ("", ""), "", "", False)
TRAITS = ShiftDCTraits("model.language_model.layers", 64, "vision_feature_select_strategy", image_token_id=4)


def new_bytes(folder: Path, base: Path) -> int:
    """Bytes of files that share no storage with the base's."""
    old = {f.stat().st_ino for f in base.iterdir()}
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and f.stat().st_ino not in old)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work [default: a temporary folder]")
    arguments = parser.parse_args()
    one_thread()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        rows, about = measure(Path(work), arguments.rounds)
    write("baking", rows, **about)


def measure(work: Path, rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    target = work / "out"
    save(GIGABYTE, work / "base")
    base_folder = cached(work / "base", work / "models--a--b")
    (work / "set.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS), "utf-8")
    size = sum(f.stat().st_size for f in base_folder.glob("*.safetensors"))
    ways = {
        "bake": lambda: exported(base_folder, work / "set.jsonl", target),
        "bake that hashes by itself": lambda: baked(base_folder, target),
        "load and save": lambda: loaded_and_saved(base_folder, target),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(way())
            if name == "bake":
                new = new_bytes(target, base_folder)
            shutil.rmtree(target)
    against = f"load + save_pretrained, {size / 1e9:.2f} GB"
    aside, alone = (ratio(found["load and save"], found[name]) for name in list(ways)[:2])
    new_bytes_said = f"{new / 1e6:.2f} MB of new bytes; hashing by itself {alone:.2g} x"
    note = f"of a Hub cache; a thread hashes the shards beside the measuring; {new_bytes_said}"
    rows = [row("bake, as a stage of an export: speed", against, aside, 50, least=True, note=note)]
    return rows, {"seconds": found, "new_bytes": new, "base_bytes": size}


def cached(folder: Path, repository: Path) -> Path:
    """Move a model into the form that the Hub's client gives its cache: links to files that are named by their content."""
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        blob = blobs / sha256(file)
        file.rename(blob)
        (snapshot / file.name).symlink_to(blob)
    return snapshot


def exported(base_folder: Path, calibration: Path, target: Path) -> float:
    """Seconds of the stage "bake" of a whole export."""
    plan = make_plan(str(base_folder), ExportOptions.of(output=target, layers="3-5", calibration=str(calibration)))
    done = export(plan)
    assert done is not None
    assert done.report.seconds is not None
    return done.report.seconds["bake"]


def baked(base_folder: Path, target: Path) -> float:
    base, recipe = resolve(str(base_folder)), load_recipe("llava").with_overrides(layers="3-5")
    unit = torch.nn.functional.normalize(torch.randn(len(LAYERS), GIGABYTE.hidden), dim=-1)
    directions = Directions(LAYERS, unit, torch.ones(len(LAYERS)), ())
    target.mkdir()
    start = time.perf_counter()
    bake(base, Calibrated(recipe, directions, LAYERS, FRAME, TRAITS), target)
    return time.perf_counter() - start


def loaded_and_saved(base_folder: Path, target: Path) -> float:
    start = time.perf_counter()
    LlavaForConditionalGeneration.from_pretrained(base_folder).save_pretrained(target)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
