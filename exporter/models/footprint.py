"""Memory and disk that an export will take, from file headers and configuration, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from exporter.errors import InputError
from exporter.models.base import BaseCheckpoint
from exporter.runtime.reading import Json, member
from exporter.runtime.safetensors_header import TensorHeader

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: Python with torch, transformers and what they import to load and run a model, as measured on Linux with one of no size.
LIBRARIES = 400_000_000
#: What bitsandbytes stores for a number: four bits and a float32 a block; eight bits.
BLOCK = 64
QUANTISED = {4: 0.5 + 4 / BLOCK, 8: 1.0}
#: Tokens of a prompt with an image where the configuration does not say.
IMAGE_TOKENS = 1024


@dataclass(frozen=True)
class Footprint:
    """Bytes. `measuring` and `verifying` are peaks of two processes that do not hold weights at the same time."""

    weights: int  # in memory, as measured with
    activations: int  # of one batch
    statistics: int
    copied: int  # of the disk, shards that are no links into a Hub cache
    mapped: int  # of the peak, pages of weight files, which the system can take back
    verifying: int
    disk: int
    resume: int  # on the disk of $SHIFTDC_CACHE, until the export is done

    @property
    def measuring(self) -> int:
        return LIBRARIES + self.weights + self.activations + self.statistics + (0 if self.mapped == self.weights else self.mapped)

    def report(self) -> dict[str, int]:
        return {
            "peak_measuring": self.measuring,
            "weights": self.weights,
            "batch": self.activations,
            "statistics": self.statistics,
            "libraries": LIBRARIES,
            "of_these_pages_of_files": self.mapped,
            "peak_verifying": self.verifying,
            "disk": self.disk,
            "disk_for_resuming": self.resume,
        }

    def __str__(self) -> str:
        parts = f"{_gb(self.weights)} weights, {_gb(self.activations)} a batch, {_gb(LIBRARIES)} libraries"
        pages = f"{_gb(self.mapped)} of it are pages of weight files, which the system can take back"
        return f"{_gb(self.measuring)} measuring ({parts}; {pages}), then {_gb(self.verifying)} verifying"

    def disk_text(self) -> str:
        copies = f"{_gb(self.copied)} of it copies of weights, which take nothing where the file system clones files"
        return f"{_gb(self.disk)} ({copies}), {_gb(self.resume)} in the cache folder until it is done"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def footprint(
    base: BaseCheckpoint,
    text: Mapping[str, Json],
    *,
    dtype: str,
    quantised: int | None,
    tokens: int,
    layers: int,
    rows: Mapping[str, int],
    copied: int,
) -> Footprint:
    """What an export of `base` takes.

    text: the language model's configuration. tokens: in one batch of text. layers: measured. rows: `held_out` and `all` prompts.
    copied: bytes of shards that cannot be linked.
    """
    headers = [(name, t) for header in base.headers.values() for name, t in header.items()]
    weights = sum(_in_memory(name, t, dtype, quantised) for name, t in headers)
    unchanged = quantised is None and weights == base.size
    item = BYTES.get(dtype, max((t.bytes // max(1, t.numel) for _, t in headers), default=4))
    batch = max(tokens, _image_tokens(base.config)) * _per_token(text) * item + _vision(base.config) * item
    state = layers * _number(text, "hidden_size")
    statistics = state * (16 * rows["held_out"] + 8 * 24)  # held-out activations float32 and float64; running sums float64
    loaded = weights if unchanged else sum(_in_memory(name, t, dtype, None) for name, t in headers)
    return Footprint(
        weights=weights,
        activations=batch,
        statistics=statistics,
        copied=copied,
        mapped=weights if unchanged else base.size,
        verifying=LIBRARIES + loaded + batch + (0 if loaded == base.size else base.size),
        disk=copied + state * 4,
        resume=4 * state * rows["all"],
    )


def _in_memory(name: str, tensor: TensorHeader, dtype: str, quantised: int | None) -> int:
    if quantised is not None and is_quantised(name, tensor):
        return math.ceil(tensor.numel * QUANTISED[quantised])
    return tensor.numel * BYTES[dtype] if dtype in BYTES else tensor.bytes


def is_quantised(name: str, tensor: TensorHeader) -> bool:
    """bitsandbytes takes linear layers but the head."""
    others = ("embed", "norm", "lm_head")
    return len(tensor.shape) == 2 and name.endswith(".weight") and not any(other in name for other in others)


def _per_token(config: Mapping[str, Json]) -> int:
    """Numbers that a decoder layer holds for a token: the residual stream's copies, and the gated MLP's three."""
    hidden = _number(config, "hidden_size")
    return 8 * hidden + 3 * (_number(config, "intermediate_size", 0) or 4 * hidden)


def _image_tokens(config: Mapping[str, Json]) -> int:
    return _number(config, "image_seq_length", 0) or _number(config, "mm_tokens_per_image", 0) or IMAGE_TOKENS


def _vision(config: Mapping[str, Json]) -> int:
    vision = member(config, "vision_config")
    if not all(isinstance(vision.get(key), int) for key in ("hidden_size", "image_size", "patch_size")):
        return 0  # pairs of numbers, and other encoders: small beside the weights
    return ((_number(vision, "image_size") // _number(vision, "patch_size")) ** 2 + 1) * _per_token(vision)


def _number(config: Mapping[str, Json], key: str, otherwise: int | None = None) -> int:
    """A whole number of a configuration. Raises InputError where it has none and there is no `otherwise`."""
    found = config.get(key)
    if isinstance(found, int):
        return found
    if otherwise is None:
        raise InputError(f"MODEL: {key} in config.json is {found!r}, expected a whole number; restore it.")
    return otherwise
