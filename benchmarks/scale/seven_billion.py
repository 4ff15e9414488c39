"""A LLaVA-1.5-7B with random weights through directions, bake and verify: seconds and peak memory of every stage.

    python -m benchmarks.scale.seven_billion FOLDER [--result FILE.json] [--keep]

Writes 14 GB of bfloat16 shards of the published shapes into FOLDER, a tensor at a time, exports them, and deletes them. The
processor is LLaVA's own with a small tokenizer. The calibration set is as small as the exporter takes (8 + 8 requests to fit,
2 + 2 held out), and images of 2 + 2 of them are run: random weights have no safety direction to find.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARD_BYTES = 2_000_000_000
IMAGES = 2
LAYERS = "10-12"
THINGS = {
    "unsafe": ["bomb", "rifle", "trap", "virus", "scam", "poison", "grenade", "keylogger", "silencer", "false passport"],
    "safe": ["cake", "kite", "shelf", "song", "game", "loaf", "lantern", "calendar", "puzzle", "real scarf"],
}


def config():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    text = LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=3, dtype="bfloat16",
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14,
        projection_dim=768,
    )  # fmt: skip
    return LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=4, image_seq_length=576, vision_feature_layer=-2,
        vision_feature_select_strategy="default", dtype="bfloat16",
    )  # fmt: skip


def make_checkpoint(folder: Path) -> int:
    """Write it; returns its bytes. No more than one tensor is in memory at a time."""
    import torch
    from tiny import tiny_processor
    from transformers import LlavaForConditionalGeneration

    tiny_processor(image_size=336).save_pretrained(folder)
    settings = config()
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(settings)
    model.config.architectures = ["LlavaForConditionalGeneration"]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    shapes = {published_name(k): tuple(v.shape) for k, v in model.state_dict().items()}
    shards = split(shapes)
    torch.manual_seed(0)
    for number, names in enumerate(shards, 1):
        write_shard(folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors", {n: shapes[n] for n in names})
    total = sum(2 * math.prod(s) for s in shapes.values())
    weight_map = {n: f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i, names in enumerate(shards, 1) for n in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def published_name(name: str) -> str:
    for ours, theirs in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(name)


def split(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size + 2 * math.prod(shape) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * math.prod(shape)
    return shards


def write_shard(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    import torch

    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            value = torch.empty(shape, dtype=torch.bfloat16)
            value.normal_(std=0.02) if len(shape) > 1 else value.fill_(float(name.endswith("weight")))
            stream.write(value.view(torch.uint8).numpy().data)


def write_calibration(file: Path) -> Path:
    rows = [
        {"label": label, "request": f"How do I make a {thing}?", "caption": f"a {thing}", "split": "fit" if i < 8 else "held_out"}
        for label, things in THINGS.items()
        for i, thing in enumerate(things)
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def run_export(base: Path, output: Path, calibration: Path) -> None:
    """In a process of its own: prints a line for each stage that starts, and what was found at the end."""
    from exporter.directions import fit as directions
    from exporter.pipeline.export import export
    from exporter.pipeline.plan import ExportOptions, make_plan, plan_needs

    directions.BLANK_IMAGES = directions.RENDERED_IMAGES = IMAGES
    plan = make_plan(str(base), ExportOptions.of(output=output, layers=LAYERS, reference="static", calibration=str(calibration)))
    said = set()

    def say(stage: str, done: int, total: int) -> None:
        if stage not in said:
            said.add(stage)
            print(json.dumps({"stage": stage}), flush=True)

    print(json.dumps({"stage": "plan", "needs": plan_needs(plan).report()}), flush=True)
    done = export(plan, say)
    print(json.dumps({"seconds": done.report.seconds, "parity": done.report.parity}), flush=True)


def resident(pid: int) -> dict[str, int]:
    """Bytes of anonymous memory and of file pages of a process and its children."""
    import psutil

    sums = {"anonymous": 0, "file_pages": 0}
    try:
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            lines = dict(
                line.split(":") for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "Rss" in line
            )
            sums["anonymous"] += int(lines["RssAnon"].split()[0]) * 1024
            sums["file_pages"] += int(lines["RssFile"].split()[0]) * 1024
    except (psutil.Error, OSError, KeyError):
        return {"anonymous": 0, "file_pages": 0}
    return sums


def measure(base: Path, output: Path, calibration: Path) -> dict:
    command = [sys.executable, "-m", "benchmarks.scale.seven_billion", str(base), "--export", str(output), str(calibration)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    found: dict = {"stage": "start"}
    peaks: dict[str, dict[str, int]] = {}
    reader = threading.Thread(target=lambda: [found.update(json.loads(line)) for line in process.stdout])
    reader.start()
    while process.poll() is None:
        now = resident(process.pid)
        now["both"] = sum(now.values())
        peak = peaks.setdefault(found["stage"], dict.fromkeys(now, 0))
        peaks[found["stage"]] = {k: max(peak[k], now[k]) for k in now}
        time.sleep(0.2)
    reader.join()
    if process.returncode:
        raise SystemExit(f"the export failed with exit code {process.returncode}")
    highest = {k: max(p[k] for p in peaks.values()) for k in ("anonymous", "file_pages", "both")}
    return {**{k: v for k, v in found.items() if k != "stage"}, "peak_by_stage": peaks, "peak": highest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--result", type=Path, default=Path("seven_billion.json"))
    parser.add_argument("--keep", action="store_true", help="do not delete the checkpoint")
    parser.add_argument("--export", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export:
        return run_export(options.folder, *options.export)
    base = options.folder / "llava-7b-random"
    base.mkdir(parents=True, exist_ok=True)
    try:
        start = time.perf_counter()
        size = make_checkpoint(base) if not (base / "model.safetensors.index.json").exists() else None
        made = time.perf_counter() - start
        calibration = write_calibration(options.folder / "calibration.jsonl")
        start = time.perf_counter()
        found = measure(base, options.folder / "calibrated", calibration)
    finally:
        if not options.keep:
            shutil.rmtree(base, ignore_errors=True)
        shutil.rmtree(options.folder / "calibrated", ignore_errors=True)
    about = {"bytes": size, "layers": LAYERS, "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))}
    result = {**about, "seconds_making": round(made, 1), "seconds_in_all": round(time.perf_counter() - start, 1), **found}
    options.result.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return None


if __name__ == "__main__":
    main()
