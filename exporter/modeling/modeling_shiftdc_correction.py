"""The correction of one decoder layer; travels inside exported checkpoints.

With a unit direction `d` that points from unsafe to safe, and the coordinate `r` of a text-only counterpart,
`x' = x - strength * (x.d - r) d` (arXiv:2502.13095, Eq. 7: the coordinate of the image prompt is replaced by that of its
counterpart). `gate: one-sided` corrects `max(0, x.d - r)` only, so that no input is ever moved toward "safe".
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn


def buffers_sha256(direction: torch.Tensor, shift: torch.Tensor) -> str:
    """Of the float32 little-endian bytes of a layer's direction and shift, as config.json records it."""
    numbers = torch.cat([direction.detach().flatten(), shift.detach().flatten()]).float().cpu()
    return hashlib.sha256(numbers.numpy().astype("<f4").tobytes()).hexdigest()


class ShiftDCCorrection(nn.Module):
    """Direction and mean shift of one decoder layer, and the correction along them.

    Buffers (float32, whatever the model's dtype): `direction` [hidden], unit norm, from unsafe to safe; `shift` [], the mean of
    `(x_image - x_text).d` over the calibration set. Both are NaN until loaded. layer, sha256: the decoder layer's index, and
    what the config says of its buffers.
    """

    direction: torch.Tensor
    shift: torch.Tensor

    def __init__(self, hidden_size: int, column: int, strength: float, one_sided: bool, layer: int, sha256: str):
        super().__init__()
        self.layer = layer
        self.sha256 = sha256
        self.checked = False
        self.column = column  # of shiftdc_reference and shiftdc_correction
        self.strength = strength
        self.one_sided = one_sided
        self.register_buffer("direction", torch.full((hidden_size,), torch.nan, dtype=torch.float32))
        self.register_buffer("shift", torch.full((), torch.nan, dtype=torch.float32))

    def _apply(self, fn: Any, recurse: bool = True) -> ShiftDCCorrection:
        """`.to()`, `.half()` and the like move the buffers and leave them float32."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    @torch.compiler.disable
    def check(self) -> None:
        """Raise ValueError unless the buffers are there, finite, the direction of unit norm, and those of the config.

        Offloaded buffers (on the meta device) are checked when their layer runs.
        """
        if self.direction.is_meta:
            return
        norm = self.direction.norm().item()
        if not (torch.isfinite(self.direction).all() and torch.isfinite(self.shift)) or abs(norm - 1) > 1e-3:
            raise ValueError(
                f"The ShiftDC buffers of decoder layer {self.layer} are missing or damaged (expected a finite direction of norm "
                f"1, found norm {norm:.4g}): the model would run uncalibrated. Load a complete "
                "checkpoint (shiftdc.safetensors must be in its index), or export it again."
            )
        found = buffers_sha256(self.direction, self.shift)
        if found != self.sha256:
            raise ValueError(
                f"The ShiftDC buffers of decoder layer {self.layer} are not those that config.json records (expected SHA-256 "
                f"{self.sha256}, found {found}): the model would be calibrated by another direction. Fetch the checkpoint again, "
                "or export it again."
            )
        self.checked = True

    def gate(self, excess: torch.Tensor) -> torch.Tensor:
        return excess.clamp_min(0) if self.one_sided else excess

    def forward(
        self,
        hidden: torch.Tensor,
        position: torch.Tensor,
        reference: torch.Tensor | None = None,
        correction: torch.Tensor | None = None,
        readout: ShiftDCReadout | None = None,
    ) -> torch.Tensor | None:
        """Correct `hidden` [batch, time, hidden] at `position` [batch] (-1: leave the row alone).

        reference: [batch, layers] float32, target coordinates `r` (arXiv:2502.13095, Eq. 7).
        correction: [batch, layers] float32, amounts to subtract that were computed beforehand (`rule: precomputed`).
        Without either, the amount is the baked mean shift. With a `readout`, nothing is changed and coordinates are stored.
        Every number but those at `position` comes back bit for bit.
        """
        if not self.checked:
            self.check()
        position = position.to(hidden.device)
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        token = position.clamp_min(0)
        x = hidden[rows, token].float()
        direction = self.direction.to(hidden.device)
        if readout is not None:
            readout.coordinates[self.column] = x @ direction
            return None
        if correction is not None:
            amount = correction.to(x)[:, self.column]
        elif reference is not None:
            amount = x @ direction - reference.to(x)[:, self.column]
        else:
            amount = self.shift.to(x).expand(len(x))
        moved = (x - self.strength * self.gate(amount)[:, None] * direction).to(hidden.dtype)
        kept = hidden[rows, token]
        # zero amounts keep the row's own bits: -0.0 - 0.0 would lose a sign, and strength 0 is the base model exactly
        change = (position >= 0) & (self.gate(amount) != 0) & (self.strength != 0)
        return hidden.index_put((rows, token), torch.where(change[:, None], moved, kept))


class ShiftDCReadout:
    """Collects `x.d` of one position per row. A plain object: accelerate passes it from device to device untouched.

    ends_pass: the pass ends, by `ShiftDCReadError`, at the last calibrated layer, behind which there is nothing to read.
    """

    def __init__(self, layers: int, ends_pass: bool):
        self.coordinates: list[torch.Tensor | None] = [None] * layers
        self.ends_pass = ends_pass

    @property
    def is_complete(self) -> bool:
        return all(c is not None for c in self.coordinates)

    def stacked(self, device: torch.device) -> torch.Tensor:
        """[batch, layers], float32."""
        return torch.stack([c.to(device) for c in self.coordinates if c is not None], dim=1)


class ShiftDCReadError(Exception):
    """Ends a pass of which every coordinate has been read."""


def calibrate(layer: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a calibrated decoder layer."""
    position = kwargs.get("shiftdc_position")
    if position is None:
        if kwargs.get("shiftdc") is False:
            return None
        raise ValueError(
            "A calibrated decoder layer was run without the calibrated model around it, which knows the rows that hold an image: "
            "call the model's own generate() or forward(), or pass shiftdc=False (no calibration), also for text alone."
        )
    hidden = output[0] if isinstance(output, tuple) else output
    readout = kwargs.get("shiftdc_readout")
    corrected = layer.shiftdc(hidden, position, kwargs.get("shiftdc_reference"), kwargs.get("shiftdc_correction"), readout)
    if readout is not None and readout.ends_pass and readout.is_complete and not torch.compiler.is_compiling():
        raise ShiftDCReadError
    if corrected is None:
        return None
    return (corrected, *output[1:]) if isinstance(output, tuple) else corrected
