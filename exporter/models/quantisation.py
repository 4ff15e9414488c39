"""Measuring on a base model that bitsandbytes quantises."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

from exporter.errors import InputError
from exporter.models.base import BaseCheckpoint, BaseFiles
from exporter.models.footprint import BLOCK, is_quantised

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def check_quantisation(quantised: int | None, base: BaseFiles) -> None:
    """Raise InputError where a quantised base cannot be had."""
    if quantised is None:
        return
    option = f"--load-in-{quantised}bit"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"{option}: it needs bitsandbytes, which is not installed; pip install 'shiftdc-export[quantized]'.")
    if "quantization_config" in base.config:
        raise InputError(f"{option}: {base.name} is stored quantised already; leave the option out.")


def check_widths(quantised: int | None, base: BaseCheckpoint) -> None:
    """Raise InputError where bitsandbytes does not take the widths of the base's matrices."""
    if quantised is None:
        return
    linear = [(name, t) for header in base.headers.values() for name, t in header.items() if is_quantised(name, t)]
    odd = [f"{name} {list(t.shape)}" for name, t in linear if t.shape[1] % BLOCK]
    if quantised == 4 and odd and not torch.cuda.is_available():
        raise InputError(
            f"--load-in-4bit: on a CPU bitsandbytes takes widths that are multiples of {BLOCK}, found {odd[0]}; leave it out."
        )


def bitsandbytes_config(bits: int, dtype: str, base: BaseCheckpoint) -> BitsAndBytesConfig:
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    stored = base.config.get("dtype") or base.config.get("torch_dtype") or "float32"
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=stored if dtype == "auto" else dtype
    )
