"""Pack 2:4 matrices for sparse tensor cores: the kept values, and two bits for the place of each in its group.

The layout is the one of CUTLASS for Ampere, which torch's `SparseSemiStructuredTensorCUTLASS` holds as `packed` and
`meta`. A group of four is read as one machine word, so that packing takes a few passes over words.
"""

import torch
from torch import Tensor

GROUP, KEPT = 4, 2
# dtype of the values -> (word of a group, word of its two values, word of the metadata, rows that are interleaved)
_WORDS = {
    torch.float16: (torch.int64, torch.int32, torch.int16, 32),
    torch.bfloat16: (torch.int64, torch.int32, torch.int16, 32),
    torch.int8: (torch.int32, torch.int16, torch.int32, 16),
}
# For each set of non-zero places (bit i: place i) the two places that are stored, the lower first. Smaller sets are
# filled up in torch's way, so that both write the same bits; larger sets are not 2:4 groups.
_PLACES = {
    0b0000: (2, 3), 0b0001: (0, 2), 0b0010: (1, 2), 0b0100: (2, 3), 0b1000: (2, 3),
    0b0011: (0, 1), 0b0101: (0, 2), 0b1001: (0, 3), 0b0110: (1, 2), 0b1010: (1, 3), 0b1100: (2, 3),
}  # fmt: skip
# For each set the two-bit places of the first (low bits) and the second stored value; 16 if the set is not 2:4.
_CODES = [_PLACES[places][0] | _PLACES[places][1] << 2 if places in _PLACES else 16 for places in range(16)]


def layout_of(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return the shape of a matrix's metadata, or None if the layout cannot hold the matrix.

    It holds float16, bfloat16 and int8, with rows a multiple of 32 (int8: 16) and columns of 32 (int8: 64).
    """
    if dtype not in _WORDS or len(shape) != 2:
        return None
    word, _, meta, rows = _WORDS[dtype]
    columns = 2 * GROUP * meta.itemsize * 8 // 4  # two metadata words, which are interleaved
    if not all(shape) or shape[0] % rows or shape[1] % columns:
        return None
    return shape[0], 2 * shape[1] // columns


def check_groups(name: str, weight: Tensor, n: int = KEPT, m: int = GROUP) -> None:
    """Raise a ValueError if more than `n` of `m` consecutive entries of a row are non-zero, in any group of `m`."""
    inputs = weight.shape[1] if weight.dim() > 2 else weight.shape[-1]
    if inputs % m:
        raise ValueError(
            f"{name} has {inputs} columns, not a multiple of {m}, so it cannot hold the pattern {n}:{m}: leave it "
            "dense with exclude_modules"
        )
    last = weight.movedim(1, -1) if weight.dim() > 2 else weight
    counts = last.ne(0).unflatten(-1, (-1, m)).sum(-1)
    broken = int(torch.count_nonzero(counts > n))
    if broken:
        first = tuple(int(i) for i in (counts > n).nonzero()[0])
        raise ValueError(
            f"{name} does not hold the pattern {n}:{m}: {broken} of its {counts.numel()} groups have more than {n} "
            f"weights (the first is group {first[-1]} of row {first[0]}); prune it with pattern='{n}:{m}', or leave "
            "it dense with exclude_modules"
        )


def compress(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a 2:4 matrix into values and metadata.

    Args:
        name: of the matrix, for messages.
        weight: contiguous, `(rows, columns)`, float16, bfloat16 or int8, of a shape that `layout_of` accepts; else a
            ValueError is raised, also for a group with more than two non-zeros.

    Returns:
        Values `(rows, columns / 2)` of the same dtype, and metadata in the order of CUTLASS: int16 `(rows, columns /
        16)`, for int8 int32 `(rows, columns / 32)`.
    """
    meta_shape = layout_of(weight.dtype, tuple(weight.shape))
    if weight.dtype not in _WORDS:
        raise ValueError(
            f"{name} has dtype {weight.dtype}, which cannot be packed for sparse tensor cores: convert it to float16, "
            "bfloat16 or int8 first"
        )
    if meta_shape is None:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}, which the packed layout cannot hold: rows must be a multiple of "
            f"{_WORDS[weight.dtype][3]} and columns of {8 * _WORDS[weight.dtype][2].itemsize * 2}; leave it dense"
        )
    if not weight.is_contiguous():
        raise ValueError(f"{name} is not contiguous and would be packed in another order: call .contiguous() first")
    word, pair, meta_dtype, _ = _WORDS[weight.dtype]
    bits = 8 * weight.dtype.itemsize
    codes = torch.tensor(_CODES, dtype=torch.uint8, device=weight.device).index_select(0, _places(weight))
    if bool((codes > 0b1111).any()):
        check_groups(name, weight)
    groups = weight.view(word).view(-1)
    low, high = codes & 0b11, codes >> 2
    lowest = (1 << bits) - 1
    values = (groups >> low.mul_(bits)) & lowest
    values |= ((groups >> high.mul_(bits)) & lowest) << bits
    values = values.to(pair).view(weight.dtype).view(weight.shape[0], -1)
    return values, _interleave(_gather_nibbles(codes, meta_dtype).view(meta_shape))


def decompress(values: Tensor, meta: Tensor) -> Tensor:
    """Return the dense matrix: the inverse of `compress`. Raises a ValueError if the two do not belong together."""
    shape = (values.shape[0], 2 * values.shape[-1])
    if values.dim() != 2 or layout_of(values.dtype, shape) != tuple(meta.shape):
        raise ValueError(f"values {tuple(values.shape)} and metadata {tuple(meta.shape)} do not belong together")
    word, pair, meta_dtype, _ = _WORDS[values.dtype]
    if meta.dtype != meta_dtype:
        raise ValueError(f"metadata of {values.dtype} values must be {meta_dtype}, not {meta.dtype}")
    bits = 8 * values.dtype.itemsize
    codes = _scatter_nibbles(_deinterleave(meta))
    low, high = codes & 0b11, codes >> 2
    if bool((low >= high).any()):
        raise ValueError("metadata does not name two places in every group")
    lowest = (1 << bits) - 1
    stored = values.contiguous().view(pair).to(word).view(-1)
    groups = (stored & lowest) << low.mul_(bits)
    groups |= ((stored >> bits) & lowest) << high.mul_(bits)
    return groups.view(values.dtype).view(shape)


def _places(weight: Tensor) -> Tensor:
    """Return an int32 per group: bit i is set if entry i is not zero."""
    # Four 0/1 bytes are one int32; the product gathers them in the low half of its top byte.
    flags = weight.ne(0).view(torch.uint8).view(torch.int32).view(-1)
    return ((flags * 0x01020408) >> 24) & 0b1111


def _gather_nibbles(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Join the codes of consecutive groups into words, the first in the lowest bits."""
    pairs = codes.view(-1, 2)
    return (pairs[:, 0] | pairs[:, 1] << 4).view(dtype)


def _scatter_nibbles(meta: Tensor) -> Tensor:
    pairs = meta.contiguous().view(torch.uint8).view(-1)
    return torch.stack([pairs & 0b1111, pairs >> 4], dim=1).view(-1)


def _interleave(meta: Tensor) -> Tensor:
    """Reorder metadata from row-major order to that of CUTLASS.

    In each block of 32 rows (int32 words: 16), row r goes to `r % 8 * (4 or 2) + r // 8`; 2x2 blocks are transposed;
    pairs of columns then follow each other.
    """
    rows, columns = meta.shape
    block = 32 if meta.dtype == torch.int16 else 16
    moved = meta.view(rows // block, block // 8, 8, columns).transpose(1, 2).reshape(rows // 2, 2, columns // 2, 2)
    # (row pair, row, column pair, column) -> (column pair, row pair, column, row): the blocks transposed
    return moved.permute(2, 0, 3, 1).reshape(rows, columns)


def _deinterleave(meta: Tensor) -> Tensor:
    rows, columns = meta.shape
    block = 32 if meta.dtype == torch.int16 else 16
    moved = (
        meta.reshape(columns // 2, rows // 2, 2, 2).permute(1, 3, 0, 2).reshape(rows // block, 8, block // 8, columns)
    )
    return moved.transpose(1, 2).reshape(rows, columns)
