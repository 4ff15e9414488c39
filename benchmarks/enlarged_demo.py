"""A checkpoint of random weights in the demo's form and a more usual size, to time what depends on sizes alone.

    python benchmarks/enlarged_demo.py CHECKPOINT OUTPUT

72 million parameters, 576 image tokens. Its replies mean nothing.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from exporter.checkpoint.layout import REPORT
from exporter.checkpoint.open import open_export

TEXT = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64}
VISION = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "image_size": 336, "patch_size": 14}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    demo = open_export(arguments.checkpoint)
    config = demo.model.config
    for part, sizes in ((config.text_config, TEXT), (config.vision_config, VISION)):
        for name, value in sizes.items():
            setattr(part, name, value)
    config.text_config.max_position_embeddings = 4096
    config.image_seq_length = (VISION["image_size"] // VISION["patch_size"]) ** 2
    model = type(demo.model)(config)
    for correction in model.shiftdc_corrections:
        direction = torch.randn(TEXT["hidden_size"])
        correction.direction.copy_(direction / direction.norm())
        correction.shift.fill_(1.0)
    images = demo.processor.image_processor
    images.size = {"shortest_edge": VISION["image_size"]}
    images.crop_size = {"height": VISION["image_size"], "width": VISION["image_size"]}
    demo.processor.patch_size = VISION["patch_size"]
    model.generation_config = demo.model.generation_config
    model.save_pretrained(arguments.output)
    demo.processor.save_pretrained(arguments.output)
    shutil.copyfile(arguments.checkpoint / REPORT, arguments.output / REPORT)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters in {arguments.output}")


if __name__ == "__main__":
    main()
