"""The packed file: a sparse model near its entropy bound, for transport. `docs/packed-format.md` is the format.

It is safetensors under a name and with keys that no `from_pretrained` picks up: a reader that does not know it finds
no model, instead of one with random weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..masking.maskset import pack_bits, unpack_bits
from ..utils.digests import header_checksum
from ..utils.files import DTYPES, bytes_of, replacing, write_safetensors
from .gap_coding import LARGEST, decode_gaps, encode_gaps, entropy_bits, gaps_of, rice_parameter
from .two_of_four import compress, decompress

PACKED_FILE = "packed_model.safetensors"
FORMAT, FORMAT_VERSION = "hf_maskselect.packed", "1"
_VALUES, _WHERE, _SCALE = "values/", "where/", "scale/"  # no parameter name holds a slash
_TORCH = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
DENSE = ("raw", "int8")
CODINGS = (*DENSE, "bits", "gaps", "2:4")
LOSSY = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Entry:
    """How one tensor lies in the file.

    dtype, shape: of the tensor itself. coding: "raw" (all values), "bits" (a bitmap and the kept values), "gaps"
    (coded gaps and the kept values), "int8" (a row's scale and rounded values) or "2:4" (values and metadata of
    `masking/semi_structured.py`, and a row's scale if the values are int8). stored: dtype of the values. k: low bits
    of the gaps. sha256: over the bytes of its streams.
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
        return math.prod(self.shape)

    def check(self) -> None:
        """Raise a ValueError unless the fields fit each other, whoever wrote them."""
        numbers = (self.kept, self.k, *self.shape)
        if not all(type(n) is int and 0 <= n <= LARGEST**2 for n in numbers) or self.kept > self.total:
            raise ValueError("impossible sizes")
        if self.dtype not in _TORCH or self.stored not in _TORCH or self.coding not in CODINGS:
            raise ValueError("unknown dtype or coding")
        if self.coding in DENSE and self.kept != self.total:
            raise ValueError("impossible sizes")
        if self.coding == "2:4" and (len(self.shape) != 2 or self.kept != self.total // 2):
            raise ValueError("impossible sizes")

    @property
    def streams(self) -> set[str]:
        """What lies in the file for it."""
        scaled = self.coding == "int8" or (self.coding == "2:4" and self.stored == "int8")
        located = self.coding not in DENSE
        return {_VALUES} | ({_WHERE} if located else set()) | ({_SCALE} if scaled else set())


class PackedWriter:
    """Encodes one tensor at a time; the file appears when all are in.

    Args:
        values: "bf16" or "fp16" stores floating values in fewer bits (lossy); None keeps every bit.
    """

    def __init__(self, values: str | None = None) -> None:
        if values is not None and values not in LOSSY:
            raise ValueError(f"values={values!r} must be one of {', '.join(LOSSY)}, or left out to keep every bit")
        self._values = LOSSY.get(values)
        self._entries: dict[str, Entry] = {}
        self._layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self.dense_bytes = 0
        self.bound_bits = 0.0

    def write(
        self,
        path: str | os.PathLike,
        tensors: Iterable[tuple[str, Tensor, str, Tensor | None]],
        metadata: Mapping[str, str],
    ) -> None:
        """Encode (name, tensor, coding wish, mask) one after the other and write the file.

        coding wish: "raw", "sparse" (the smallest of raw, bits and gaps), "int8", "2:4" (of a tensor of float16 or
        bfloat16) or "2:4 int8". mask: boolean, what counts as kept in a sparse tensor; None takes its non-zeros, and a
        zero's sign is dropped.
        """
        # The header comes first and is known last: the streams wait in a nameless file of the same folder.
        with tempfile.TemporaryFile(dir=Path(path).parent) as spool:
            for name, tensor, wish, mask in tensors:
                for stream in self._encode(name, tensor, wish, mask):
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

    def _encode(self, name: str, tensor: Tensor, wish: str, mask: Tensor | None) -> list[Tensor]:
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}, which cannot be packed: convert it first")
        stored = self._stored(tensor)
        coding, where, kept, k = "raw", None, tensor.numel(), 0
        values, scale = tensor, None
        if wish.endswith("int8") and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds NaN or infinity, which int8 cannot: keep its dtype, or mend the model")
        if wish == "int8":
            coding, (values, scale) = "int8", quantize_rows(tensor)
            self.bound_bits += 8 * (values.numel() + 4 * scale.numel())
        elif wish in ("2:4", "2:4 int8"):
            coding, kept = "2:4", tensor.numel() // 2
            values, scale = quantize_rows(tensor) if wish == "2:4 int8" else (tensor, None)
            values, where = compress(name, values.contiguous())
            self.bound_bits += 8 * kept * values.dtype.itemsize + math.log2(6) / 4 * tensor.numel()
        elif wish == "sparse" and 0 < tensor.numel() <= LARGEST:
            flat = tensor.detach().cpu().reshape(-1)
            keep = flat != 0 if mask is None else mask.cpu().reshape(-1)
            count, bits = int(torch.count_nonzero(keep)), 8 * stored.itemsize
            least = entropy_bits(count, keep.numel()) + bits * count
            self.bound_bits += min(least, bits * keep.numel())
            # A mask must come back whatever it costs. Else each kept weight costs a bit at least, or each weight does.
            masked = mask is not None and count < keep.numel()
            if masked or min(count, keep.numel()) + bits * count < bits * keep.numel():
                coding, where, kept, k, values = _locate(flat, keep, bits, masked)
                values = tensor if coding == "raw" else values
        elif mask is not None and not bool(mask.all()):
            raise ValueError(
                f"{name} is no weight of the model that config.json describes, and cannot be stored sparse"
            )
        else:
            self.bound_bits += 8 * stored.itemsize * kept
        if coding not in ("int8", "2:4"):
            values = _narrow(name, values, stored)
        streams = {_WHERE: where, _VALUES: values, _SCALE: scale}
        streams = {prefix + name: stream for prefix, stream in streams.items() if stream is not None}
        self._layout |= {key: (stream.dtype, tuple(stream.shape)) for key, stream in streams.items()}
        sha = _sha(streams.values())
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, values.dtype)]
        self._entries[name] = Entry(dtypes[0], tuple(tensor.shape), coding, dtypes[1], kept, k, sha)
        self.dense_bytes += tensor.numel() * tensor.dtype.itemsize
        return list(streams.values())

    def _stored(self, tensor: Tensor) -> torch.dtype:
        lossy = self._values is not None and tensor.is_floating_point() and tensor.dtype.itemsize > 2
        return self._values if lossy else tensor.dtype


class PackedFile:
    """Reads a packed file, one tensor at a time.

    Raises:
        ValueError: no such file, not ours, of another version, or damaged.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        try:
            self._file = safe_open(path, framework="pt")
            self.metadata: dict[str, str] = self._file.metadata() or {}
            self._keys = set(self._file.keys())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read as a packed model ({error}); restore the file") from error
        found = self.metadata.get("format"), self.metadata.get("format_version")
        if found != (FORMAT, FORMAT_VERSION):
            raise ValueError(
                f"{path} is no packed model of format version {FORMAT_VERSION} (its header says {found[0]!r} "
                f"{found[1]!r}); point to a {PACKED_FILE} written by this version"
            )
        if header_checksum({k: v for k, v in self.metadata.items() if k != "checksum"}) != self.metadata.get(
            "checksum"
        ):
            raise self._damaged("its header does not match its checksum")
        self.entries = self._read_entries()

    def _read_entries(self) -> dict[str, Entry]:
        wanted, names = set(), {field.name for field in fields(Entry)}
        entries = {}
        try:
            found = json.loads(self.metadata["tensors"])
            for name, given in found.items():
                if given.keys() != names:
                    raise ValueError("unknown fields")
                entry = Entry(**{**given, "shape": tuple(given["shape"])})
                entry.check()
                entries[name] = entry
                wanted |= {prefix + name for prefix in entry.streams}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise self._damaged(f"its header does not describe tensors ({error})") from error
        if wanted != self._keys:
            raise self._damaged("its tensors do not match its header")
        return entries

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """name -> (dtype, shape) of the dense tensors."""
        return {name: (_TORCH[entry.dtype], entry.shape) for name, entry in self.entries.items()}

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is damaged: {what}; restore the file")

    def tensor(self, name: str) -> Tensor:
        """The dense tensor, on the CPU.

        Raises:
            ValueError: its bytes do not match its checksum, or do not decode.
        """
        return self._decode(name)[0]

    def tensor_and_mask(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The dense tensor and, where it was stored sparse, the boolean mask of what was kept."""
        dense, where = self._decode(name)
        if where is None:
            return dense, None
        mask = torch.zeros(dense.numel(), dtype=torch.bool)
        mask[where] = True
        return dense, mask.view(dense.shape)

    def _decode(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The dense tensor and, where it was stored sparse, the flat positions (int64) of what was kept."""
        entry = self.entries[name]
        dtype, stored = _TORCH[entry.dtype], _TORCH[entry.stored]
        keys = [prefix + name for prefix in (_WHERE, _VALUES, _SCALE) if prefix + name in self._keys]
        try:
            streams = {key.partition("/")[0]: self._file.get_tensor(key) for key in keys}
        except SafetensorError as error:
            raise self._damaged(f"{name} cannot be read ({error})") from error
        if _sha(streams.values()) != entry.sha256:
            raise self._damaged(f"{name} does not match its checksum")
        values = streams["values"]
        shape = (entry.kept,)
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
    """Flat positions of the kept weights of a sparse entry."""
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


def _locate(flat: Tensor, keep: Tensor, bits: int, masked: bool) -> tuple[str, Tensor | None, int, int, Tensor]:
    """(coding, where, kept, k, values) of the smallest of raw, bits and gaps; bits: size of a stored value; masked:
    raw would lose the mask."""
    positions, total = keep.nonzero().view(-1), keep.numel()
    kept, gaps = positions.numel(), gaps_of(positions)
    k, cost = rice_parameter(gaps, total)
    if not masked and min(cost, total) + bits * kept >= bits * total:
        return "raw", None, total, 0, flat
    values = flat[positions]
    if cost >= total:
        return "bits", pack_bits(keep), kept, 0, values
    return "gaps", encode_gaps(gaps, k), kept, k, values


def _narrow(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in a narrower dtype; what is not zero stays so, as the smallest number of its sign."""
    if values.dtype == dtype:
        return values
    narrow = values.to(dtype)
    if bool((torch.isinf(narrow) & ~torch.isinf(values)).any()):
        raise ValueError(
            f"{name} has values up to {float(values.abs().max()):.3g}, which {dtype} cannot hold: use values='bf16'"
        )
    gone = (narrow == 0) & (values != 0)
    if bool(gone.any()):
        least = torch.tensor(1, dtype=torch.int16).view(dtype)
        narrow[gone] = torch.copysign(least, values[gone].to(dtype))
    return narrow


def quantize_rows(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 of the same shape, float32 scale of each row): symmetric, to the nearest of 255 steps."""
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
