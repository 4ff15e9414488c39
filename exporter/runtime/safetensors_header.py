"""What a safetensors file holds, from its header alone, checked before anything is read."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import InputError
from exporter.runtime.reading import HEADER_BYTES, UnreadableError, parse_json


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a safetensors file: `dtype` as safetensors names it ("F32", "BF16"), `shape`, `bytes`, where it starts."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


#: Bytes of one element, as safetensors names its types; those of less than a byte as fractions.
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E5M2FNUZ": 1, "F8_E4M3FNUZ": 1, "I16": 2, "U16": 2,
    "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8, "F4": 0.5, "F6_E2M3": 0.75,
    "F6_E3M2": 0.75,
}  # fmt: skip


def read_header(file: Path, option: str = "MODEL") -> dict[str, TensorHeader]:
    """Names, dtypes and shapes of a safetensors file, without its data, all checked. Raises InputError."""
    try:
        if not file.is_file():
            raise UnreadableError("it is no regular file")
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise UnreadableError("the header is longer than the file")
            if length > HEADER_BYTES:
                raise UnreadableError(f"the header has more than {HEADER_BYTES:,} bytes")
            return _tensors(parse_json(stream.read(length), unique=True), 8 + length, size - 8 - length)
    except struct.error as error:
        raise InputError(f"{option}: {file} is not a whole safetensors file (it has no header); fetch it again.") from error
    except (OSError, UnreadableError) as error:
        raise InputError(f"{option}: {file} is not a whole safetensors file ({error}); fetch it again.") from error


def _tensors(header: object, origin: int, data_bytes: int) -> dict[str, TensorHeader]:
    """The header's tensors, which must fill the data, from byte `origin` of the file on, without gaps and overlaps."""
    if not isinstance(header, dict):
        raise UnreadableError("the header is no JSON object")
    spans: list[tuple[int, int]] = []
    found: dict[str, TensorHeader] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = _span(entry, name)
        dtype, shape = _type(entry, name)
        if math.prod(shape) * ITEM_BYTES[dtype] != end - start:
            raise UnreadableError(f"{name[:200]} of shape {list(shape)} and dtype {dtype} cannot have {end - start} bytes")
        found[name] = TensorHeader(dtype, shape, end - start, origin + start)
        spans.append((start, end))
    filled = 0
    for start, end in sorted(spans):
        if start != filled:
            raise UnreadableError(f"tensors overlap, or leave a gap, at byte {min(start, filled)} of the data")
        filled = end
    if filled != data_bytes:
        raise UnreadableError(f"expected {filled} bytes of data, found {data_bytes}")
    return found


def _span(entry: object, name: str) -> tuple[int, int]:
    span = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not (isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span) and 0 <= span[0] <= span[1]):
        raise UnreadableError(f"{name[:200]} has no usable data_offsets")
    return span[0], span[1]


def _type(entry: dict[str, object], name: str) -> tuple[str, tuple[int, ...]]:
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise UnreadableError(f"{name[:200]} has no dtype that is known")
    if not (isinstance(shape, list) and len(shape) <= 16 and all(type(n) is int and 0 <= n < 2**48 for n in shape)):
        raise UnreadableError(f"{name[:200]} has no usable shape")
    return dtype, tuple(shape)
