"""Read safetensors files whose header is checked against the file before anything is allocated."""

import json
import math
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..utils.reading import check_file

_LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
MOST_AXES = 64  # of a tensor, as in torch
# Bits of the dtypes of the format.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
}


class TensorFile:
    """A safetensors file, opened for reading one tensor at a time.

    Attributes:
        path: the file.
        metadata: text fields of the header.
        shapes: shape of each tensor by name, in the order of the data.

    Args:
        path: the file.
        what: what the file should hold, for messages.
        remedy: end of the messages.

    Raises:
        ValueError: the file cannot be read, names a tensor twice, or its header does not fit its size.
    """

    def __init__(self, path: str | os.PathLike, what: str = "tensors", remedy: str = "restore the file") -> None:
        self.path, self._what, self._remedy = check_file(path, remedy), what, remedy
        try:
            header, size = _read_header(self.path)
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            if not isinstance(self.metadata, dict) or not all(isinstance(v, str) for v in self.metadata.values()):
                raise ValueError("its metadata are not texts")
            self.shapes = _checked_shapes(header, size)
            self._file = safe_open(self.path, framework="pt")
        except (OSError, SafetensorError, ValueError) as error:
            raise self._unreadable(error) from error

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, memory-mapped, on the CPU; raises a ValueError if it cannot be read."""
        try:
            return self._file.get_tensor(name)
        except (OSError, SafetensorError, AttributeError) as error:  # AttributeError: a dtype that this torch lacks
            raise self._unreadable(error) from error

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return the named tensors, by default all."""
        return {name: self.tensor(name) for name in (self.shapes if names is None else names)}

    def _unreadable(self, error: Exception) -> ValueError:
        return ValueError(f"{self.path} cannot be read as {self._what} ({error}): {self._remedy}")


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a file, and the number of bytes after it."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError("it is shorter than a header")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"its header should have {length:,} bytes, and the file has {size:,}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_doubles)
    except RecursionError as error:
        raise ValueError("its header is nested too deep") from error
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return header, size - 8 - length


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen = set[str]()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"its header names {name!r} twice")
            seen.add(name)
    return content


def _checked_shapes(header: dict[str, Any], size: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in the order of their data, which must fill `size` bytes without a gap."""
    places = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"its header does not describe {name!r}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise ValueError(f"{name!r} has the unknown dtype {dtype!r}")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > MOST_AXES:
            raise ValueError(f"{name!r} has no sizes")
        if 8 * (offsets[1] - offsets[0]) != math.prod(shape) * _BITS[dtype]:
            raise ValueError(f"{name!r} of shape {shape} has {offsets[1] - offsets[0]} bytes")
        places.append((*offsets, name, tuple(shape)))
    end = 0
    for start, stop, name, _ in sorted(places):
        if start != end:
            raise ValueError(f"{name!r} does not begin where the tensor before it ends")
        end = stop
    if end != size:
        raise ValueError(f"its tensors have {end:,} bytes and the file {size:,}")
    return {name: shape for *_, name, shape in sorted(places)}


def _are_sizes(sizes: object) -> bool:
    return isinstance(sizes, list) and all(type(size) is int and 0 <= size < 1 << 62 for size in sizes)
