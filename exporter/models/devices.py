"""`--device-map`, checked before anything is loaded."""

from __future__ import annotations

import torch

from exporter.errors import InputError

#: What accelerate spreads a model over by itself.
MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_device_map(given: str) -> None:
    """Raise InputError unless it is one of accelerate's words, or a device of this machine."""
    if given in MAPS:
        return
    try:
        device = torch.device(given)
    except RuntimeError as error:
        raise InputError(f"--device-map: {given!r} is no device; give auto, cpu, or one as cuda:0.") from error
    found = devices()
    if str(device) not in found:
        raise InputError(f"--device-map: there is no {device} on this machine; give auto, or one of {', '.join(found)}.")


def devices() -> list[str]:
    """The devices of this machine, those with a number with and without it."""
    if not torch.accelerator.is_available():
        return ["cpu"]
    kind = torch.accelerator.current_accelerator()
    numbers = range(torch.accelerator.device_count())
    return ["cpu", *([str(kind)] if kind is not None else []), *(f"{kind}:{number}" for number in numbers)]
