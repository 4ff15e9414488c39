"""Load the base model with transformers' own class."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from exporter.errors import InputError, refusing
from exporter.models.base import BaseCheckpoint
from exporter.models.notices import noticed
from exporter.models.processors import load_with_notices
from exporter.models.quantisation import bitsandbytes_config
from exporter.models.recipe import Recipe
from exporter.models.vlm import VLM, composes_text

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_vlm(
    base: BaseCheckpoint,
    recipe: Recipe,
    *,
    dtype: str = "auto",
    device_map: str | dict[str, str] | None = None,
    offload: Path | None = None,
    quantised: int | None = None,
    adapter: Path | None = None,
) -> VLM:
    """Load the base with transformers' own class; its repository's code is never run. Raises InputError.

    offload: folder for weights that `device_map` leaves on disk. quantised: 4 or 8 bits, by bitsandbytes. adapter: a PEFT
    adapter's folder, added and not merged.
    """
    processor, notices = load_with_notices(base.folder, recipe)
    options: dict[str, object] = {} if device_map is None else {"device_map": device_map, "offload_folder": offload}
    if quantised is not None:
        options["quantization_config"] = bitsandbytes_config(quantised, dtype, base)
    loading = refusing(f"MODEL: {base.name} cannot be loaded as {recipe.family}", "fetch it again, or give another model")
    with noticed(f"MODEL: {base.name}", base.folder) as said, loading:
        model, report = AutoModelForImageTextToText.from_pretrained(
            base.folder, dtype=DTYPES[dtype], trust_remote_code=False, use_safetensors=True, output_loading_info=True, **options
        )
        if adapter is not None:
            model.load_adapter(str(adapter))
    for kind in ("missing_keys", "mismatched_keys"):
        if report[kind]:
            raise InputError(
                f"MODEL: {base.name} does not fill the model: {len(report[kind])} {kind.replace('_', ' ')}, "
                f"{min(map(str, report[kind]))} among them; the checkpoint is incomplete or of another architecture."
            )
    if device_map is None and quantised is None and torch.cuda.is_available():
        model = model.to("cuda")
    vlm = VLM(model.eval(), processor, composes_text(processor, recipe), notices=(*notices, *said))
    _check_answers(vlm, base.name)
    return vlm


@torch.no_grad()
def _check_answers(vlm: VLM, name: str) -> None:
    """One prompt with an image, before hours of them. Raises InputError."""
    inputs = vlm.encode(["What is it?"], [Image.new("RGB", (64, 64), (127, 127, 127))])
    with refusing(f"MODEL: {name} cannot read a prompt with an image", "restore its config, processor and chat template"):
        logits = vlm.model(**inputs, logits_to_keep=1).logits
    if not torch.isfinite(logits).all():
        raise InputError(
            f"MODEL: {name} answers with numbers that are not finite: its weights are damaged, or too large for the dtype; "
            "fetch it again, or give --dtype float32."
        )
