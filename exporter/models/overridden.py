"""Other settings for a calibrated model, for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from transformers import PreTrainedModel

from exporter.modeling.modeling_shiftdc import ShiftDCCorrection


@contextmanager
def overridden(model: PreTrainedModel, settings: Mapping[str, object] | None = None) -> Iterator[list[ShiftDCCorrection]]:
    """The model with `settings` in place of those of its `shiftdc` block; gives its corrections, in the order of its layers.

    Whatever is set on the corrections meanwhile is undone as well.
    """
    config, corrections = model.config, model.shiftdc_corrections
    own = config.shiftdc
    kept = [(c.direction.clone(), c.shift.clone(), c.one_sided, c.strength) for c in corrections]
    try:
        config.shiftdc = {**own, **(settings or {})}
        for correction in corrections:
            correction.one_sided = config.shiftdc["gate"] == "one-sided"
        yield corrections
    finally:
        config.shiftdc = own
        for correction, (direction, shift, one_sided, strength) in zip(corrections, kept, strict=True):
            correction.direction.copy_(direction)
            correction.shift.copy_(shift)
            correction.one_sided, correction.strength = one_sided, strength
