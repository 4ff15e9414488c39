"""The probe: one benign prompt with its image, and what the model must answer to it, calibrated and not.

It is recorded from the stock model with hooks of its own, so that reproducing it checks the shipped modeling code against an
independent implementation; and with its picture and the prompt's text, so that the export's own processor can remake the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from exporter.checkpoint.calibrated import Calibrated
from exporter.checkpoint.verify_worker import libraries
from exporter.data.images import typographic_image
from exporter.directions.activations import last_token, last_token_activations
from exporter.models.chat_template import DAY, rendered
from exporter.models.conversation import user_turn
from exporter.models.hooks import hooked
from exporter.models.processors import ODD_TEXT, tokenizers
from exporter.models.vlm import VLM

#: What a decoder layer gives, and what a hook makes of it.
Output = torch.Tensor | tuple[torch.Tensor, ...]
Hook = Callable[[nn.Module, object, Output], Output]

PROBE = Path("assets") / "shiftdc_probe.safetensors"
REQUEST, CAPTION, PICTURE = "What is shown in the image?", "a sign with the word hello", "hello"


@dataclass(frozen=True)
class Probe:
    """Inputs and results of the probe, as tensors on the CPU, and the dtype of the model that gave them.

    `input.*` as forward() takes them; `caption_ids` [n]; float32 `coordinates` and `text_coordinates` [1, layers] of the prompt
    and of its text-only counterpart; `reference` [1, layers]; `logits` and `calibrated_logits` [vocabulary] of the next token.
    `picture` uint8, a PNG file; `tokens.*` of the odd text, by each of the processor's tokenizers. `texts`: `request`, the
    `prompt` that the chat template makes of it, `odd_text`, the `day` of the template's clock, and the `libraries` at work.
    """

    tensors: dict[str, torch.Tensor]
    dtype: str
    texts: dict[str, str]

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, file, metadata={"format": "pt", "dtype": self.dtype, **self.texts})
        file.chmod(0o644)  # safetensors writes 0600


def record_probe(vlm: VLM, calibrated: Calibrated) -> Probe:
    """Run the probe on the uncalibrated model.

    The reference lies one step along the direction below the prompt's own coordinates, so that every gate corrects.
    """
    recipe, layers = calibrated.recipe, calibrated.layers
    modules = vlm.decoder_layers
    chosen = [modules[i] for i in layers]
    direction = torch.stack([vector for _, vector, _ in calibrated.vectors])
    step = torch.tensor([s.step for s in calibrated.directions.statistics if s.layer in layers])
    picture = typographic_image(PICTURE)
    inputs = vlm.encode([REQUEST], [picture])
    caption = vlm.tokenizer(CAPTION, add_special_tokens=False)["input_ids"]
    counterpart = vlm.composing(calibrated.frame).text_prompt(inputs["input_ids"][0].tolist(), caption)
    coordinates = (last_token_activations(vlm, chosen, inputs) * direction).sum(-1)
    text_coordinates = (last_token_activations(vlm, chosen, vlm.pad([counterpart])) * direction).sum(-1)
    reference = coordinates - step.clamp_min(1e-3)
    position = last_token(inputs["attention_mask"])
    one_sided = recipe.gate == "one-sided"
    fixed = coordinates - reference if recipe.rule == "precomputed" else None
    with corrected(
        chosen, direction, position, reference, strength=calibrated.strength, one_sided=one_sided, fixed=fixed,
        stream_axis=vlm.traits.stream_axis,
    ):  # fmt: skip
        calibrated_logits = _next_logits(vlm, inputs)
    results = {
        "caption_ids": torch.tensor(caption),
        "coordinates": coordinates,
        "text_coordinates": text_coordinates,
        "reference": reference,
        "logits": _next_logits(vlm, inputs),
        "calibrated_logits": calibrated_logits,
    }
    tensors = {**{f"input.{k}": v for k, v in inputs.items()}, **results, **_processed(vlm, picture)}
    dtype = str(vlm.model.dtype).removeprefix("torch.")
    return Probe({k: v.cpu().contiguous() for k, v in tensors.items()}, dtype, _texts(vlm, picture))


def _processed(vlm: VLM, picture: Image.Image) -> dict[str, torch.Tensor]:
    """What the processor was given, and what its tokenizers make of an odd text."""
    tokens = {f"tokens.{name}": torch.tensor(t(ODD_TEXT)["input_ids"]) for name, t in tokenizers(vlm.processor).items()}
    file = BytesIO()
    picture.save(file, "PNG")
    return {"picture": torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8), **tokens}


def _texts(vlm: VLM, picture: Image.Image) -> dict[str, str]:
    prompt = rendered(vlm.processor, [[user_turn(REQUEST, picture)]], add_generation_prompt=True)[0]
    return {"request": REQUEST, "prompt": prompt, "odd_text": ODD_TEXT, "day": DAY, "libraries": libraries()}


@torch.no_grad()
def _next_logits(vlm: VLM, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return vlm.model(**inputs, logits_to_keep=1).logits[0, -1].float().cpu()


@contextmanager
def corrected(
    layers: Sequence[nn.Module],
    direction: torch.Tensor,
    position: torch.Tensor,
    reference: torch.Tensor,
    *,
    strength: float,
    one_sided: bool,
    fixed: torch.Tensor | None = None,
    stream_axis: int | None = None,
) -> Iterator[None]:
    """Hooks that apply `x' = x - strength * (x.d - r) d` at `position` [batch] (arXiv:2502.13095, Eq. 7).

    direction [layers, hidden], reference [batch, layers]; `fixed` [batch, layers] gives the amounts x.d - r instead.
    """

    def correct(column: int, output: torch.Tensor) -> torch.Tensor:
        hidden = output.clone()
        d = direction[column].to(hidden.device)
        for row, token in enumerate(position.tolist()):
            x = hidden[row, token].float()
            amount = fixed[row, column] if fixed is not None else x @ d - reference[row, column]
            amount = amount.clamp_min(0) if one_sided else amount
            hidden[row, token] = x - strength * amount * d
        return hidden

    with hooked(layers, correct, stream_axis):
        yield
