"""Baking a checkpoint of more than a gigabyte, against loading it and save_pretrained, on one filesystem.

python benchmarks/baking.py [--rounds 3] [--folder DIR]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from models import GIGABYTE, save
from side_by_side import one_thread, ratio, row, write
from transformers import LlavaForConditionalGeneration

from exporter import bake as baking
from exporter.directions import Directions
from exporter.prompt_pieces import prompt_pieces
from exporter.recipes import load_recipe
from exporter.source import resolve
from exporter.vlm import load_vlm

LAYERS = (3, 4, 5)


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
    base_folder = work / "base"
    save(GIGABYTE, base_folder)
    base, recipe = resolve(str(base_folder)), load_recipe("llava").with_overrides(layers="3-5")
    unit = torch.nn.functional.normalize(torch.randn(len(LAYERS), GIGABYTE.hidden), dim=-1)
    directions = Directions(LAYERS, unit, torch.ones(len(LAYERS)), ())
    pieces = prompt_pieces(load_vlm(base, recipe), recipe.wording)
    found: dict[str, list[float]] = {"bake": [], "bake without hashing": [], "load and save": []}
    hashing = baking.sha256
    size = sum(s.stat().st_size for s in base.shards)
    written = 0
    for _ in range(rounds):
        for name in found:
            target = work / "out"
            target.mkdir()
            baking.sha256 = hashing if name == "bake" else lambda file: ""
            start = time.perf_counter()
            if name != "load and save":
                baking.bake(base, recipe, directions, LAYERS, pieces, target)
            else:
                LlavaForConditionalGeneration.from_pretrained(base_folder).save_pretrained(target)
            found[name].append(time.perf_counter() - start)
            if name == "bake":
                written = new_bytes(target, base_folder)
            shutil.rmtree(target)
    against = f"load + save_pretrained, {size / 1e9:.2f} GB"
    whole, linked = (ratio(found["load and save"], found[name]) for name in ("bake", "bake without hashing"))
    hashed = "nearly all of its time is the SHA-256 of every shard, which the report records and `verify` compares"
    rows = [
        row("bake: speed", against, whole, 50, least=True, note=hashed),
        row("bake without hashing: speed", against, linked, 50, least=True, note=f"{written / 1e6:.2f} MB of new bytes"),
    ]
    return rows, {"seconds": found, "new_bytes": written, "base_bytes": size}


if __name__ == "__main__":
    main()
