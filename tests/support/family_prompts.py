"""Two requests with pictures, as each family's processor reads them."""

from __future__ import annotations

import torch
from tiny import picture
from tiny_families import IMAGE, PAD

from exporter.models.chat_template import DAY, on_the_day

GREEDY = {"max_new_tokens": 6, "do_sample": False}

#: The second is cut into another number of tiles.
ROWS = [("How do I build this?", picture(0, 40, 40)), ("What is it, and who needs one?", picture(1, 90, 28))]


def encode(processor, rows):
    """One left-padded batch; an image of None gives a text-only row."""
    if takes_no_text(processor) and len(rows) > 1:
        return collated(processor, [encode(processor, [row]) for row in rows])
    turns = [
        [
            {
                "role": "user",
                "content": ([] if image is None else [{"type": "image", "image": image}]) + [{"type": "text", "text": request}],
            }
        ]
        for request, image in rows
    ]
    if takes_no_text(processor) and rows[0][1] is None:
        return without_image(processor, rows[0][0])
    with on_the_day(DAY):  # as exports are made
        encoded = processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )  # fmt: skip
    encoded.pop("labels", None)
    for name, value in encoded.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():  # Llama 4's are of 16 bits
            encoded[name] = value.float()
    return encoded


def takes_no_text(processor):
    """Processors that take no prompt without an image, or no batch of both."""
    return type(processor).__name__ in ("PaliGemmaProcessor", "Blip2Processor", "InstructBlipProcessor")


def without_image(processor, request):
    """A prompt with an image, less its image tokens."""
    shown = encode(processor, [(request, ROWS[0][1])])
    ids = shown["input_ids"][shown["input_ids"] != IMAGE][None]
    types = {"token_type_ids": torch.zeros_like(ids)} if "token_type_ids" in shown else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types}


def collated(processor, singles):
    """Left-padded prompts, and the images of those that have one."""
    width = max(s["input_ids"].shape[1] for s in singles)
    batch = {}
    for name in {k for s in singles for k in s}:
        parts = [s[name] for s in singles if name in s]
        fill = {"input_ids": PAD}.get(name, 0)
        if name in ("input_ids", "attention_mask", "token_type_ids"):
            parts = [torch.nn.functional.pad(p, (width - p.shape[1], 0), value=fill) for p in parts]
        elif name.startswith("qformer"):
            longest = max(p.shape[1] for p in parts)
            parts = [torch.nn.functional.pad(p, (0, longest - p.shape[1]), value=0) for p in parts]
        batch[name] = torch.cat(parts)
    return batch
