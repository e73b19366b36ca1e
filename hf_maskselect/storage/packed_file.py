"""The packed file: a sparse model near its entropy bound, for transport. `docs/packed-format.md` has the format.

It is a safetensors file with a name and keys that `from_pretrained` does not look for. A reader that does not know the
format finds no model, instead of one with random weights.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..masking.maskset import pack_bits, unpack_bits
from ..masking.tensor_files import MOST_AXES, TensorFile
from ..utils.digests import header_checksum
from ..utils.files import DTYPES, bytes_of, replacing, write_safetensors
from ..utils.reading import build, parse_json, typed
from .gap_coding import LARGEST, decode_gaps, encode_gaps, entropy_bits, gaps_of, rice_parameter
from .two_of_four import compress, decompress

PACKED_FILE = "packed_model.safetensors"
FORMAT, FORMAT_VERSION = "hf_maskselect.packed", "1"
_VALUES, _WHERE, _SCALE = "values/", "where/", "scale/"  # parameter names hold no slash
_TORCH = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
DENSE = ("raw", "int8")
CODINGS = (*DENSE, "bits", "gaps", "2:4")
LOSSY = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Entry:
    """Header entry of one tensor: how it lies in the file.

    dtype, shape: of the tensor itself. coding: "raw" (all values), "bits" (a bitmap and the kept values), "gaps"
    (coded gaps and the kept values), "int8" (rounded values and a scale per row) or "2:4" (values and metadata of
    `two_of_four.py`, and a scale per row if the values are int8). stored, kept: dtype and number of the stored values.
    k: number of low bits of a gap. sha256: over the bytes of the streams.
    """

    dtype: str
    shape: tuple[int, ...]
    coding: str
    stored: str
    kept: int
    k: int
    sha256: str

    @property
    def total(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    def check(self) -> None:
        """Raise a ValueError unless the fields fit each other."""
        numbers = (self.kept, self.k, *self.shape)
        sizes = len(self.shape) <= MOST_AXES and all(type(n) is int and 0 <= n <= LARGEST**2 for n in numbers)
        if not sizes or self.kept > self.total:
            raise ValueError("impossible sizes")
        if self.dtype not in _TORCH or self.stored not in _TORCH or self.coding not in CODINGS:
            raise ValueError("unknown dtype or coding")
        not_half = self.coding == "2:4" and (len(self.shape) != 2 or self.kept != self.total // 2)
        if not_half or (self.coding in DENSE and self.kept != self.total):
            raise ValueError("impossible sizes")

    @property
    def streams(self) -> set[str]:
        """Prefixes of the keys that hold the tensor's data."""
        scaled = self.coding == "int8" or (self.coding == "2:4" and self.stored == "int8")
        located = self.coding not in DENSE
        return {_VALUES} | ({_WHERE} if located else set()) | ({_SCALE} if scaled else set())


class PackItem(NamedTuple):
    """A tensor to pack and its coding.

    coding: "raw", "sparse" (the smallest of raw, bits and gaps), "int8", "2:4" (of a float16 or bfloat16 tensor) or
    "2:4 int8". mask: boolean, the kept weights of a sparse tensor; None keeps the non-zeros and drops signs of zeros.
    """

    name: str
    tensor: Tensor
    coding: str
    mask: Tensor | None = None


@dataclass
class _Encoded:
    """The streams of one tensor (values, where, scale) and its header fields. bound: fewest bits for the tensor."""

    coding: str
    values: Tensor
    kept: int
    bound: float
    where: Tensor | None = None
    scale: Tensor | None = None
    k: int = 0


class PackedWriter:
    """Write a packed file, encoding one tensor at a time.

    Args:
        values: "bf16" or "fp16" stores floating-point values in fewer bits (lossy); None keeps every bit.
    """

    def __init__(self, values: str | None = None) -> None:
        if values is not None and values not in LOSSY:
            raise ValueError(f"values={values!r} must be one of {', '.join(LOSSY)}, or left out to keep every bit")
        self._values = None if values is None else LOSSY[values]
        self._entries: dict[str, Entry] = {}
        self._layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self.dense_bytes = 0
        self.bound_bits = 0.0

    def write(self, path: str | os.PathLike, items: Iterable[PackItem], metadata: Mapping[str, str]) -> None:
        """Encode the tensors one by one and write the file; raises a ValueError for a tensor that cannot be coded."""
        # The header comes first but is known last: the streams wait in an unnamed file of the same folder.
        with tempfile.TemporaryFile(dir=Path(path).parent) as spool:
            for item in items:
                for stream in self._add(item):
                    spool.write(bytes_of(stream))
            header = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "tensors": json.dumps({name: asdict(entry) for name, entry in self._entries.items()}),
                **metadata,
            }
            spool.seek(0)
            with replacing(path) as temporary, open(temporary, "wb") as file:
                chunks = iter(lambda: spool.read(1 << 22), b"")
                write_safetensors(file, self._layout, chunks, header | {"checksum": header_checksum(header)})

    def _add(self, item: PackItem) -> list[Tensor]:
        """Encode one tensor, enter it into the header and return its streams."""
        name, tensor = item.name, item.tensor
        encoded = self._encode(*item)
        parts = {_WHERE: encoded.where, _VALUES: encoded.values, _SCALE: encoded.scale}
        streams = {prefix + name: stream for prefix, stream in parts.items() if stream is not None}
        self._layout |= {key: (stream.dtype, tuple(stream.shape)) for key, stream in streams.items()}
        dtype, stored = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, encoded.values.dtype))
        sha = _sha(streams.values())
        self._entries[name] = Entry(dtype, tuple(tensor.shape), encoded.coding, stored, encoded.kept, encoded.k, sha)
        self.dense_bytes += tensor.numel() * tensor.dtype.itemsize
        self.bound_bits += encoded.bound
        return list(streams.values())

    def _encode(self, name: str, tensor: Tensor, coding: str, mask: Tensor | None) -> _Encoded:
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}, which cannot be packed: convert it first")
        if coding.endswith("int8") and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds NaN or infinity, which int8 cannot: keep its dtype, or mend the model")
        total = tensor.numel()
        if coding == "int8":
            values, scale = quantize_rows(tensor)
            return _Encoded("int8", values, total, 8 * (values.numel() + 4 * scale.numel()), scale=scale)
        if coding.startswith("2:4"):
            rows, row_scale = quantize_rows(tensor) if coding == "2:4 int8" else (tensor, None)
            values, where = compress(name, rows.contiguous())
            bound = 8 * (total // 2) * values.dtype.itemsize + math.log2(6) / 4 * total
            return _Encoded("2:4", values, total // 2, bound, where, row_scale)
        dtype = tensor.dtype
        if self._values is not None and tensor.is_floating_point() and dtype.itemsize > 2:
            dtype = self._values
        if coding == "sparse" and 0 < total <= LARGEST:
            encoded = _encode_sparse(tensor, mask, 8 * dtype.itemsize)
        elif mask is None or bool(mask.all()):
            encoded = _Encoded("raw", tensor, total, 8 * dtype.itemsize * total)
        else:
            raise ValueError(
                f"{name} is not a weight of the model that config.json describes, and cannot be stored sparse"
            )
        encoded.values = _narrow(name, encoded.values, dtype)
        return encoded


class PackedFile:
    """Read a packed file, one tensor at a time.

    Raises:
        ValueError: the file is missing, not a packed file of this version, or damaged.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._file = TensorFile(path, "a packed model")
        self.metadata = self._file.metadata
        self._keys = self._file.shapes.keys()
        name, version = self.metadata.get("format"), self.metadata.get("format_version")
        if (name, version) != (FORMAT, FORMAT_VERSION):
            raise ValueError(
                f"{path} is not a packed model of format version {FORMAT_VERSION} (its header says {name!r} "
                f"{version!r}); point to a {PACKED_FILE} written by this version"
            )
        header = {key: text for key, text in self.metadata.items() if key != "checksum"}
        if header_checksum(header) != self.metadata.get("checksum"):
            raise self._damaged("its header does not match its checksum")
        self.entries = self._read_entries()

    def _read_entries(self) -> dict[str, Entry]:
        keys = set()
        entries = {}
        where = f"the header of {self.path}"
        tensors = parse_json(self.metadata.get("tensors", ""), where)
        for name, values in typed(tensors, dict, where).items():
            entry = build(Entry, values, f"{where}: {name}")
            try:
                entry.check()
            except ValueError as error:
                raise self._damaged(f"its header does not describe {name} ({error})") from error
            entries[name] = entry
            keys |= {prefix + name for prefix in entry.streams}
        if keys != self._keys:
            raise self._damaged("its tensors do not match its header")
        return entries

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of the dense tensors, by name."""
        return {name: (_TORCH[entry.dtype], entry.shape) for name, entry in self.entries.items()}

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is damaged: {what}; restore the file")

    def tensor(self, name: str) -> Tensor:
        """Return the dense tensor, on the CPU; raises a ValueError if it does not match its checksum or decode."""
        return self._decode(name)[0]

    def tensor_and_mask(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return the dense tensor and the boolean mask of its kept weights, or None if it was not stored sparse."""
        dense, where = self._decode(name)
        if where is None:
            return dense, None
        mask = torch.zeros(dense.numel(), dtype=torch.bool)
        mask[where] = True
        return dense, mask.view(dense.shape)

    def _decode(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return the dense tensor and the flat positions (int64) of its kept weights, or None as above."""
        entry = self.entries[name]
        dtype, stored = _TORCH[entry.dtype], _TORCH[entry.stored]
        keys = [prefix + name for prefix in (_WHERE, _VALUES, _SCALE) if prefix + name in self._keys]
        streams = {key.partition("/")[0]: self._file.tensor(key) for key in keys}
        if _sha(streams.values()) != entry.sha256:
            raise self._damaged(f"{name} does not match its checksum")
        values = streams["values"]
        shape: tuple[int, ...] = (entry.kept,)
        if entry.coding not in ("bits", "gaps"):
            shape = entry.shape if entry.coding in DENSE else (*entry.shape[:-1], entry.shape[-1] // 2)
        if values.dtype != stored or values.shape != shape:
            raise self._damaged(f"{name} has values of another shape or dtype than its header says")
        try:
            if entry.coding == "raw":
                return values.to(dtype), None
            if entry.coding == "int8":
                return _dequantize_rows(values, streams["scale"]).to(dtype), None
            if entry.coding == "2:4":
                dense = decompress(values, streams["where"])
                return (_dequantize_rows(dense, streams["scale"]).to(dtype) if "scale" in streams else dense), None
            where = _positions(entry, streams["where"])
        except (ValueError, RuntimeError) as error:
            raise self._damaged(f"{name} does not decode ({error})") from error
        dense = torch.zeros(entry.total, dtype=dtype)
        dense[where] = values.to(dtype)
        return dense.view(entry.shape), where


def _positions(entry: Entry, where: Tensor) -> Tensor:
    """Return the flat positions of the kept weights of a sparse entry."""
    if where.dtype != torch.uint8 or where.dim() != 1:
        raise ValueError("positions of another dtype or shape")
    if entry.coding == "bits":
        if where.numel() != (entry.total + 7) // 8:
            raise ValueError(f"{where.numel()} bytes are no bitmap of {entry.total} weights")
        positions = unpack_bits(where, (entry.total,)).nonzero().view(-1)
        if positions.numel() != entry.kept:
            raise ValueError(f"the bitmap keeps {positions.numel()}, not {entry.kept}")
        return positions
    return decode_gaps(where, entry.k, entry.kept, entry.total)


def _encode_sparse(tensor: Tensor, mask: Tensor | None, bits: int) -> _Encoded:
    """Encode a tensor as the smallest of raw, bits and gaps. bits: size of a stored value."""
    flat = tensor.detach().cpu().reshape(-1)
    keep = flat != 0 if mask is None else mask.cpu().reshape(-1)
    total, kept = keep.numel(), int(torch.count_nonzero(keep))
    bound = min(entropy_bits(kept, total) + bits * kept, bits * total)
    raw = _Encoded("raw", tensor, total, bound)
    # A mask must be stored at any cost. Otherwise the positions take a bit per kept weight at least.
    masked = mask is not None and kept < total
    if not masked and kept + bits * kept >= bits * total:
        return raw
    positions = keep.nonzero().view(-1)
    gaps = gaps_of(positions)
    k, size = rice_parameter(gaps, total)
    if not masked and min(size, total) + bits * kept >= bits * total:
        return raw
    values = flat[positions]
    if size >= total:
        return _Encoded("bits", values, kept, bound, pack_bits(keep))
    return _Encoded("gaps", values, kept, bound, encode_gaps(gaps, k), k=k)


def _narrow(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert values to a narrower dtype. Non-zeros stay non-zero: at least the smallest number of their sign."""
    if values.dtype == dtype:
        return values
    narrow = values.to(dtype)
    if bool((torch.isinf(narrow) & ~torch.isinf(values)).any()):
        raise ValueError(
            f"{name} has values up to {float(values.abs().max()):.3g}, which {dtype} cannot hold: use values='bf16'"
        )
    vanished = (narrow == 0) & (values != 0)
    if bool(vanished.any()):
        least = torch.tensor(1, dtype=torch.int16).view(dtype)
        narrow[vanished] = torch.copysign(least, values[vanished].to(dtype))
    return narrow


def quantize_rows(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return (int8 of the same shape, float32 scale of each row): symmetric, rounded to the nearest of 255 steps."""
    wide = tensor.float()
    scale = wide.abs().amax(-1).div_(127)
    steps = wide.div(scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1))
    return steps.round_().to(torch.int8), scale


def _dequantize_rows(values: Tensor, scale: Tensor) -> Tensor:
    if values.dtype != torch.int8 or scale.dtype != torch.float32 or scale.shape != values.shape[:-1]:
        raise ValueError("values or scales of another dtype or shape")
    return values.float().mul_(scale.unsqueeze(-1))


def _sha(streams: Iterable[Tensor]) -> str:
    sha = hashlib.sha256()
    for stream in streams:
        sha.update(bytes_of(stream))
    return sha.hexdigest()
