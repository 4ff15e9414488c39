"""The names of an export's files and tensors."""

from __future__ import annotations

SHARD = "shiftdc.safetensors"
REPORT = "shiftdc_report.json"

#: Where an adapter that is not merged lies in an export. At the top transformers would take the whole for an adapter.
ADAPTER = "adapter"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

#: The card: its owner may edit it, which is noted and is no failure.
CARD = "README.md"


#: What SHARD holds of each calibrated layer.
BUFFERS = ("direction", "shift")


def buffer_key(decoder_layers: str, layer: int, name: str) -> str:
    """The name of a tensor in SHARD; `name` is one of BUFFERS."""
    return f"{decoder_layers}.{layer}.shiftdc.{name}"
