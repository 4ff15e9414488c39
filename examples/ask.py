"""Ask an exported checkpoint about a picture with transformers alone: python examples/ask.py CHECKPOINT IMAGE "REQUEST"."""

import sys

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def main(checkpoint: str, image_file: str, request: str) -> None:
    # trust_remote_code=True runs the modeling code in the checkpoint; without it loading fails, on purpose
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    image = Image.open(image_file).convert("RGB")
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": request}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        calibrated = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        base = model.generate(**inputs, max_new_tokens=64, do_sample=False, shiftdc=False)
    prompt = inputs["input_ids"].shape[1]
    print("calibrated:", processor.decode(calibrated[0, prompt:], skip_special_tokens=True).strip())
    print("base model:", processor.decode(base[0, prompt:], skip_special_tokens=True).strip())


if __name__ == "__main__":
    main(*sys.argv[1:])
