"""Checks an exported checkpoint with torch, transformers and safetensors alone; run in a fresh process by verify.py.

    python verify_worker.py FOLDER [DEVICE_MAP OFFLOAD_FOLDER]

Prints one JSON object: {"failures": [sentence, ...], "parity": {...}}. It runs the checkpoint's modeling code: verify.py makes
sure beforehand that this is the code of this package.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, tzinfo
from importlib import metadata
from io import BytesIO
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils import chat_template_utils

#: Largest difference of logits, relative to their largest magnitude, that another machine or kernel may cause.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 8e-2}
#: The same for pixels, where another library or processor made them; where the same did, they are equal bit for bit.
PIXEL_TOLERANCE = 2e-2
#: A template that puts out the prompt as it was recorded.
AS_RECORDED = "{{ messages[0]['prompt'] }}"


def libraries() -> str:
    """What pixels depend on."""
    names = ("numpy", "pillow", "tokenizers", "torch", "torchvision", "transformers")
    return ", ".join([f"{name} {_version(name)}" for name in names] + [platform.machine()])


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


@contextmanager
def on_the_day(day: str) -> Iterator[None]:
    """Templates that write a date write this one."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Clock:
            return cls.fromisoformat(day)

    clock, chat_template_utils.datetime = chat_template_utils.datetime, Clock
    try:
        yield
    finally:
        chat_template_utils.datetime = clock


def remakes_inputs(folder: Path, probe: dict[str, torch.Tensor], texts: Mapping[str, str]) -> list[str]:
    """The export's processor, however it is loaded, makes the recorded inputs of the recorded request and picture."""
    if "picture" not in probe:
        return ["its probe is of an earlier version, without the picture and the prompt; export again"]
    found: list[str] = []
    for trusted in (False, True):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trusted)
        found += [f for f in _remade(processor, probe, texts) if f not in found]
    return found


def _remade(processor: ProcessorMixin, probe: dict[str, torch.Tensor], texts: Mapping[str, str]) -> list[str]:
    failures = []
    for name, expected in probe.items():
        if name.startswith("tokens."):
            tokenizer = name.removeprefix("tokens.")
            if getattr(processor, tokenizer)(texts["odd_text"])["input_ids"] != expected.tolist():
                failures.append(f"its {tokenizer} gives other tokens than the base model's")
    picture = Image.open(BytesIO(probe["picture"].numpy().tobytes()))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": texts["request"]}]
    turn = {"role": "user", "content": content, "prompt": texts["prompt"]}
    if processor.chat_template is not None:  # of some families it is the recipe's
        with on_the_day(texts["day"]):
            prompt = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        if prompt != texts["prompt"]:
            failures.append("its chat template gives another prompt than the base model's")
    inputs = processor.apply_chat_template(
        [[turn]], chat_template=AS_RECORDED, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )  # fmt: skip
    tolerance = 0.0 if texts["libraries"] == libraries() else PIXEL_TOLERANCE
    for name, expected in probe.items():
        if name.startswith("input."):
            key = name.removeprefix("input.")
            if not _same(inputs.get(key), expected, tolerance):
                failures.append(f"its processor makes other {key} than the base model's (recorded with {texts['libraries']})")
    return failures


def _same(found: object, expected: torch.Tensor, tolerance: float) -> bool:
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return False
    if found.is_floating_point() and expected.is_floating_point():
        found = found.to(expected.dtype)  # recorded in the model's
    if found.dtype != expected.dtype:
        return False
    if not expected.is_floating_point() or not tolerance:
        return torch.equal(found, expected)
    return _difference(found, expected) <= tolerance


def refuses_uncalibrated_loading(folder: Path, architecture: str) -> list[str]:
    """Neither the stock class nor the Auto class without trust may give a model."""
    ways = {
        f"the stock class {architecture}": (getattr(transformers, architecture), "calibrated by ShiftDC"),
        "AutoModelForImageTextToText without trust_remote_code": (AutoModelForImageTextToText, "trust_remote_code"),
    }
    return [f"{name} {wrong}" for name, way in ways.items() if (wrong := _not_refused(*way, folder))]


def _not_refused(cls: type[PreTrainedModel], reason: str, folder: Path) -> str | None:
    """What is wrong unless `cls` refuses the folder for the `reason` that stands in its error, or in that error's cause."""
    try:
        cls.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 (transformers' own, of many types)
        told = f"{error} {error.__cause__}"
        return None if reason in told else f"does not refuse it as calibrated, but fails with {type(error).__name__}"
    return "loads it without an error, uncalibrated"


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item()


def _device(model: PreTrainedModel) -> torch.device:
    """Where inputs go: of an offloaded model, the device on which its embeddings run."""
    embeddings = model.get_input_embeddings()
    place = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return embeddings.weight.device if place is None else torch.device(place)


@torch.no_grad()
def reproduces_probe(
    model: PreTrainedModel, probe: dict[str, torch.Tensor], dtype: str
) -> tuple[list[str], dict[str, float | bool]]:
    failures: list[str] = []
    device = _device(model)
    inputs = {k.removeprefix("input."): v.to(device) for k, v in probe.items() if k.startswith("input.")}

    def logits(**options: object) -> torch.Tensor:
        return model(**inputs, logits_to_keep=1, **options).logits[0, -1].float().cpu()

    reference = probe["reference"].to(device)
    last = torch.tensor([inputs["input_ids"].shape[1] - 1], device=device)  # not every template has a generation prompt
    off, calibrated = logits(shiftdc=False), logits(shiftdc_reference=reference, shiftdc_position=last)
    strengths = [c.strength for c in model.shiftdc_corrections]
    for correction in model.shiftdc_corrections:
        correction.strength = 0.0
    none = logits(shiftdc_reference=reference, shiftdc_position=last)
    for correction, strength in zip(model.shiftdc_corrections, strengths, strict=True):
        correction.strength = strength
    images = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    coordinates = model.shiftdc_coordinates(**inputs).cpu()
    text = (
        model.shiftdc_reference(inputs["input_ids"], inputs["attention_mask"], captions=[probe["caption_ids"]], **images).cpu()
        if model.config.shiftdc["reference"] != "static"
        else probe["text_coordinates"]
    )
    parity = {
        "logits": _difference(off, probe["logits"]),
        "calibrated_logits": _difference(calibrated, probe["calibrated_logits"]),
        "coordinates": _difference(coordinates, probe["coordinates"]),
        "text_coordinates": _difference(text, probe["text_coordinates"]),
    }
    for name, difference in parity.items():
        if not difference <= TOLERANCE[dtype]:  # also catches NaN
            failures.append(f"the probe's {name} differ by {difference:.2g} of their size, expected at most {TOLERANCE[dtype]:g}")
    if not torch.equal(off, none):
        failures.append("strength 0 is not the uncalibrated model exactly")
    if strengths[0] > 0 and torch.equal(off, calibrated):
        failures.append("calibration changes nothing on the probe")
    reply = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    if reply.shape[1] <= inputs["input_ids"].shape[1]:
        failures.append("generate() gives no token")
    return failures, {**parity, "uncalibrated_exact": torch.equal(off, probe["logits"])}


def main(folder: Path, device_map: str | None = None, offload: str | None = None) -> dict[str, object]:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    report = json.loads((folder / "shiftdc_report.json").read_text("utf-8"))
    failures = refuses_uncalibrated_loading(folder, report["base_model"]["architecture"])
    with safe_open(folder / "assets" / "shiftdc_probe.safetensors", "pt") as stored:
        recorded = stored.metadata()
        probe = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
    failures += remakes_inputs(folder, probe, recorded)
    dtype = recorded["dtype"]
    placement = {} if device_map is None else {"device_map": device_map, "offload_folder": offload}
    model, loading = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, dtype=getattr(torch, dtype), output_loading_info=True, **placement
    )
    if device_map is None:
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    model = model.eval()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[kind]:
            failures.append(f"loading reports {len(loading[kind])} {kind.replace('_', ' ')} ({min(map(str, loading[kind]))})")
    if type(model).__name__ != config["architectures"][0]:
        failures.append(f"loading gives a {type(model).__name__}, expected {config['architectures'][0]}")
    more, parity = reproduces_probe(model, probe, dtype)
    if "exporter" in sys.modules:
        failures.append("the checkpoint imports the exporter package; it must load with transformers alone")
    return {"failures": failures + more, "parity": parity}


def end_with_parent() -> None:
    """End this process when stdin, which the parent holds open, is closed: a killed parent must not leave a model in memory."""

    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    print(json.dumps(main(Path(sys.argv[1]), *sys.argv[2:])))
