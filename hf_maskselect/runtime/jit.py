"""Products of a sparse float32 matrix, compiled on this machine by numba (`pip install 'hf_maskselect[cpu]'`).

The product works on a tile of tokens at a time. The tile is transposed, so that one weight multiplies neighbouring
numbers. A chunk of the tile's inputs stays in the cache while all outputs read it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

_TILES = (32, 64, 128)  # tokens of one tile; a kernel is compiled for each
_CHUNK = 384  # inputs of one chunk
_AT_ONCE = 4  # weights of one step
_OUTPUTS = 16  # outputs that are written at once
# As in torch, sums may be reordered and fused; numbers that are infinite or not a number stay what they are.
_MATH = {"contract", "reassoc", "nsz"}


@dataclass(frozen=True)
class SparseRows:
    """The weights of a float32 matrix (out, in) that are not zero, chunk by chunk, and in a chunk row by row.

    starts: int32 (chunks, out + 1), where the weights of each row begin. columns: uint16, where 0 is the first of the
    chunk. values: float32. Each row of a chunk is filled up to a multiple of four weights with zeros.
    """

    out_features: int
    starts: np.ndarray
    columns: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, weight: Tensor) -> "SparseRows":
        """Take the weights out of a matrix, and compile what multiplies them, so that no request has to wait."""
        for tile in _TILES:
            _kernel(tile)
        starts, columns, values, begin = [], [], [], 0
        for chunk in weight.split(_CHUNK, dim=1):
            counts = chunk.count_nonzero(1)
            room = (counts + _AT_ONCE - 1).div(_AT_ONCE, rounding_mode="floor") * _AT_ONCE
            ends = room.cumsum(0)
            rows, places = chunk.nonzero(as_tuple=True)
            # A weight's place: where its row begins, and how many weights of the row come before it.
            before = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
            at = (ends - room)[rows] + before
            size = int(ends[-1])
            columns.append(torch.zeros(size, dtype=torch.long).index_put_((at,), places))
            values.append(torch.zeros(size).index_put_((at,), chunk[rows, places]))
            starts.append(torch.cat([ends.new_zeros(1), ends]) + begin)
            begin += size
        return cls(
            len(weight),
            torch.stack(starts).int().numpy(),
            torch.cat(columns).numpy().astype(np.uint16),
            torch.cat(values).numpy(),
        )


def sparse_product(rows: Tensor, weight: SparseRows, bias: Tensor | None) -> Tensor:
    """Multiply float32 rows (n, in); returns float32 (n, out)."""
    output = rows.new_empty(len(rows), weight.out_features)
    given, result = rows.contiguous().numpy(), output.numpy()
    added = np.zeros(weight.out_features, np.float32) if bias is None else bias.numpy()
    start = 0
    while start < len(rows):
        left = len(rows) - start
        tile = next((size for size in _TILES if size >= left), _TILES[-1])
        stop = len(rows) if left <= tile else len(rows) - left % tile
        part = given[start:stop], weight.starts, weight.columns, weight.values, added, result[start:stop]
        _kernel(tile)(*part)
        start = stop
    return output


@functools.cache
def _kernel(tile: int) -> Callable[..., Any]:
    """Return the product for tiles of this many tokens."""

    def product(rows, starts, columns, values, bias, output):
        count, size = rows.shape
        outputs = output.shape[1]
        inputs = np.empty((_CHUNK, tile), np.float32)
        sums = np.empty((outputs, tile), np.float32)
        for first in range(0, count, tile):
            tokens = min(tile, count - first)
            if tokens < tile:
                inputs[:] = 0
            for chunk in range(len(starts)):
                begin = chunk * _CHUNK
                width = min(_CHUNK, size - begin)
                whole = width - width % 8
                for group in range(0, whole, 8):
                    for token in range(tokens):
                        for lane in range(8):
                            inputs[group + lane, token] = rows[first + token, begin + group + lane]
                for column in range(whole, width):
                    for token in range(tokens):
                        inputs[column, token] = rows[first + token, begin + column]
                for row in range(outputs):
                    if chunk == 0:
                        for token in range(tile):
                            sums[row, token] = bias[row]
                    for at in range(starts[chunk, row], starts[chunk, row + 1], 4):
                        c0, c1, c2, c3 = columns[at], columns[at + 1], columns[at + 2], columns[at + 3]
                        w0, w1, w2, w3 = values[at], values[at + 1], values[at + 2], values[at + 3]
                        for token in range(tile):
                            sums[row, token] += (
                                w0 * inputs[c0, token]
                                + w1 * inputs[c1, token]
                                + w2 * inputs[c2, token]
                                + w3 * inputs[c3, token]
                            )
            whole = outputs - outputs % _OUTPUTS
            for group in range(0, whole, _OUTPUTS):
                for token in range(tokens):
                    for lane in range(_OUTPUTS):
                        output[first + token, group + lane] = sums[group + lane, token]
            for row in range(whole, outputs):
                for token in range(tokens):
                    output[first + token, row] = sums[row, token]

    return compiled(product, "void(f4[:,::1], i4[:,::1], u2[::1], f4[::1], f4[::1], f4[:,::1])")


def compiled(function: Callable[..., Any], signature: str) -> Callable[..., Any]:
    """Compile a function now. It runs without Python's lock. The machine code is kept on the disk where that works.

    Raises:
        NotImplementedError: numba cannot compile it on this machine.
    """
    options: dict[str, Any] = {"nogil": True, "fastmath": _MATH}
    try:
        try:
            return numba.njit(signature, cache=True, **options)(function)
        except RuntimeError:  # no folder to keep it in can be written
            return numba.njit(signature, **options)(function)
    except numba.core.errors.NumbaError as error:
        raise NotImplementedError(f"numba cannot compile it: {error}") from error
