"""Replies of an export in a process that never sees this package: one JSON list on stdout.

python published_worker.py EXPORT CONVERSATIONS.pt TEMPLATE
"""

from __future__ import annotations

import json
import sys

import torch
import with_torchvision  # noqa: F401 (before transformers)
from transformers import AutoModelForImageTextToText, AutoProcessor


class NotHere:
    """Ends the import of this package."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "exporter":
            raise ImportError("the package must not be needed")


def main(folder: str, conversations: str, template: str) -> None:
    sys.meta_path.insert(0, NotHere())
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    processor.chat_template = template or processor.chat_template
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    replies = []
    for turns in torch.load(conversations, weights_only=False):
        inputs = processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True},  # without it LLaVA-1.5's published tokenizer.json cuts prompts at 1024 tokens
        )  # fmt: skip
        length = inputs["input_ids"].shape[1]
        for options in ({}, {"shiftdc": False}):
            out = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
            replies.append(out[0, length if out.shape[1] > length else 0 :].tolist())
    print(json.dumps(replies))


if __name__ == "__main__":
    main(*sys.argv[1:])
