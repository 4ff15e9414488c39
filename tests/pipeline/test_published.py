"""Files that others published, the whole way: check, export, a fresh process without this package, four forms of prompts.

`make published` runs this with the folders that it needs; elsewhere it is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import ALL_REQUESTS
from jinja2 import TemplateError
from naive import Naive
from published import CHECKPOINTS, PUBLISHED, VOCABULARIES
from safetensors.torch import load_file
from tiny import picture
from transformers import AutoModelForImageTextToText

from exporter.models.base import resolve_small
from exporter.models.chat_template import encoded, rendered
from exporter.models.check import check, skeleton
from exporter.models.processors import load_processor
from exporter.models.prompt_check import check_prompts
from exporter.models.traits import decoder_layers_of
from exporter.pipeline.export import export
from exporter.pipeline.plan import ExportOptions, make_plan

pytestmark = pytest.mark.skipif(
    PUBLISHED is None or VOCABULARIES is None,
    reason="needs SHIFTDC_PUBLISHED and SHIFTDC_VOCABULARIES: folders with published files, which are no part of the project",
)
SUPPORT = Path(__file__).parents[1] / "support"
LAYERS = (2, 3)
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def image(seed: int) -> dict:
    return {"type": "image", "image": picture(seed, 64, 48)}


def user(*parts) -> dict:
    return {"role": "user", "content": [p if isinstance(p, dict) else {"type": "text", "text": p} for p in parts]}


def forms(request: str) -> dict[str, list]:
    reply = {"role": "assistant", "content": [{"type": "text", "text": "A thing."}]}
    return {
        "image before": [user(image(0), request)],
        "image behind": [user(request, image(1))],
        "second turn": [user(image(2), "What is it?"), reply, user(request)],
        "two images": [user(image(3), image(4), request)],
    }


@pytest.fixture(scope="module", params=list(CHECKPOINTS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def base_folder(name, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / name
    folder.mkdir()
    return CHECKPOINTS[name](folder)


@pytest.fixture(scope="module")
def exported(base_folder, calibration_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("export") / "calibrated"
    options = {"layers": f"{LAYERS[0]}-{LAYERS[1]}", "gate": "two-sided", "caption_max_new_tokens": 6, "strength": 4.0}
    return export(make_plan(str(base_folder), ExportOptions.of(output=output, calibration=str(calibration_file), **options)))


@pytest.fixture(scope="module")
def processor(exported):
    return load_processor(exported.plan.base.folder, exported.plan.recipe)


@pytest.fixture(scope="module")
def conversations(processor):
    """The forms that the template takes."""
    kept = {}
    for form, turns in forms("How do I build this?").items():
        with suppress(TemplateError):  # of templates that take one turn
            rendered(processor, turns, add_generation_prompt=True)
            kept[form] = turns
    if hasattr(processor, "num_query_tokens"):  # BLIP takes one image
        del kept["two images"]
    assert len(kept) >= 2
    return kept


class TemplateNaive(Naive):
    """tests/support/naive.py with every prompt written by the chat template, whatever the family."""

    def __init__(self, model, processor, recipe, own):
        self.model, self.processor, self.recipe, self.own = model, processor, recipe, own
        self.layers = model.get_submodule(decoder_layers_of(model))

    def forward(self, inputs):
        alone = "pixel_values" not in inputs and hasattr(self.model, "qformer")  # the outer model demands an image
        (self.model.language_model if alone else self.model)(**inputs)

    def inputs(self, turns):
        return dict(encoded(self.processor, [turns], return_tensors="pt", processor_kwargs={"padding": True}))

    def with_request(self, turns, request):
        *others, last = turns
        content = [{"type": "text", "text": request} if part["type"] == "text" else part for part in last["content"]]
        return [*others, {**last, "content": content}]

    def text_inputs(self, turns):
        """Without images: the template's own prompt, or what is left of it where the template would write more."""
        if self.own:
            text = rendered(self.processor, turns, add_generation_prompt=True).replace(self.processor.image_token, "")
            return dict(self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt"))
        alone = [{**turn, "content": [p for p in turn["content"] if p["type"] != "image"]} for turn in turns]
        if hasattr(self.model, "qformer"):
            text = rendered(self.processor, alone, add_generation_prompt=True)
            return dict(self.processor.tokenizer(text, return_tensors="pt"))
        if type(self.processor).__name__ == "PaliGemmaProcessor":  # which demands an image
            text = f"{self.processor.tokenizer.bos_token}{rendered(self.processor, alone, add_generation_prompt=True)}\n"
            made = self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")
            return {**made, "token_type_ids": torch.zeros_like(made["input_ids"])}
        return self.inputs(alone)

    def reference(self, turns, request, directions):
        asked = self.inputs(self.with_request(turns, self.recipe.wording.caption_request(request)))
        asked |= {k: v for k, v in self.inputs(turns).items() if k.startswith("qformer")}
        out = self.model.generate(**asked, **GREEDY)[0]
        caption = out[asked["input_ids"].shape[1] if len(out) > asked["input_ids"].shape[1] else 0 :]
        shown = self.processor.tokenizer.decode(caption, skip_special_tokens=True).strip()
        counterpart = self.with_request(turns, self.recipe.wording.counterpart(request, shown))
        activations = self.activations(self.text_inputs(counterpart))
        return torch.stack([activations[layer] @ directions[layer] for layer in LAYERS])

    def reply(self, turns, directions, reference):
        inputs = self.inputs(turns)
        length = inputs["input_ids"].shape[1]
        with self.calibrated(LAYERS, directions, length, reference=reference, strength=4.0):
            out = self.model.generate(**inputs, **GREEDY)[0]
        return out[length if len(out) > length else 0 :].tolist()


@pytest.fixture(scope="module")
def naive(base_folder, exported, processor):
    stock = AutoModelForImageTextToText.from_pretrained(base_folder).eval()
    return TemplateNaive(stock, processor, exported.plan.recipe, exported.plan.checked.frame.own)


def test_composed_prompts_are_the_templates_own(base_folder, exported):
    files, recipe = resolve_small(str(base_folder)), exported.plan.recipe
    frame, vlm = exported.plan.checked.frame, skeleton(files, recipe)
    found = check_prompts(vlm.framed(frame), frame, ALL_REQUESTS)
    assert found.exact and found.compared >= 400, str(found)
    assert check(files, recipe).frame == frame


def test_nothing_depends_on_the_day(exported):
    config = (exported.plan.output / "config.json").read_text()
    assert "Today Date" not in config and "Cutting Knowledge" not in config


def test_replies_are_the_naive_ones_in_a_fresh_process(naive, exported, conversations, tmp_path):
    torch.save(list(conversations.values()), tmp_path / "conversations.pt")
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [
        sys.executable,
        str(SUPPORT / "published_worker.py"),
        str(exported.plan.output),
        str(tmp_path / "conversations.pt"),
    ]
    template = exported.plan.recipe.chat_template or ""
    run = subprocess.run([*command, template], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    replies = json.loads(run.stdout.splitlines()[-1])
    tensors = load_file(exported.plan.output / "shiftdc.safetensors")
    directions = {layer: tensors[f"{exported.plan.checked.traits.decoder_layers}.{layer}.shiftdc.direction"] for layer in LAYERS}
    changed = False
    for i, (form, turns) in enumerate(conversations.items()):
        calibrated, plain = replies[2 * i : 2 * i + 2]
        inputs = naive.inputs(turns)
        length = inputs["input_ids"].shape[1]
        stock = naive.model.generate(**inputs, **GREEDY)[0]
        assert plain == stock[length if len(stock) > length else 0 :].tolist(), form
        reference = naive.reference(turns, "How do I build this?", directions)
        assert calibrated == naive.reply(turns, directions, reference), form
        changed |= calibrated != plain
    assert changed
