"""The names of an export's files and tensors."""

from __future__ import annotations

SHARD = "shiftdc.safetensors"
REPORT = "shiftdc_report.json"

#: Where an adapter that is not merged lies in an export. At the top transformers would take the whole for an adapter.
ADAPTER = "adapter"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

#: The card: its owner may edit it, which is noted and is no failure.
CARD = "README.md"
