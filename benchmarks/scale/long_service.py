"""The size of a process that goes on writing replies: after the first 100, and after all.

python -m benchmarks.scale.long_service EXPORT [REPLIES]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

FIRST = 100


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    export, replies = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 2000
    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(export, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(export, trust_remote_code=False)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
    inputs = processor(text=prompt, images=Image.new("RGB", (64, 64), "red"), return_tensors="pt")
    after_the_first = 0
    for number in range(replies):
        given = {"past_key_values": DynamicCache()} if number % 2 else {}
        model.generate(**inputs, max_new_tokens=1, do_sample=False, **given)
        if number + 1 == FIRST:
            after_the_first = resident()
    growth = resident() / after_the_first - 1
    print(f"{after_the_first / 2**20:.1f} MiB after {FIRST} replies, {growth:+.2%} after {replies} (at most +5 %)")
    sys.exit(growth > 0.05)


if __name__ == "__main__":
    main()
