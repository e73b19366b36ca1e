"""The 8-bit product of blocks of four inputs, for CPUs with AVX2: torch's own is fast only with AVX-512.

Three instructions multiply a block and eight tokens. numba does not find these instructions by itself, so the
innermost loop is written in LLVM's language.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from .jit import compiled

_TOKENS = 32  # of one tile
_LANES = 8  # tokens of one register
_BLOCK = 4  # numbers of 8 bits that one lane adds up
_OUTPUTS = 16  # outputs that are written at once
_NO_TABLE, _NO_FLOATS, _NO_CODES = np.empty(0, np.uint8), np.empty((0, 0), np.float32), np.empty((0, 0), np.uint8)


class BlockProduct:
    """A matrix of int8 whose blocks of four inputs are mostly zero; maps quantized rows to float32.

    Args:
        values: int8 (out, in), where `in` is a multiple of four and pairs of one sign add up to 127 at most.
        scales: float32 (out,), one a row.
        bias: float32 (out,), or None.

    Raises:
        NotImplementedError: the CPU lacks AVX2.
    """

    def __init__(self, values: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        if not binding.get_host_cpu_features().get("avx2"):
            raise NotImplementedError("this CPU lacks AVX2")
        blocks = values.reshape(len(values), -1, _BLOCK)
        kept = (blocks != 0).any(-1)
        starts = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
        self._starts = starts.int().numpy()
        self._columns = kept.nonzero()[:, 1].numpy().astype(np.uint16)
        self._blocks = blocks[kept].contiguous().numpy().view(np.int32).reshape(-1)
        self._sums = values.sum(1, dtype=torch.float32).numpy()
        self._scales = scales.float().contiguous().numpy()
        self._bias = np.zeros(len(values), np.float32) if bias is None else bias.detach().float().contiguous().numpy()

    def __call__(self, rows: Tensor, scale: float, zero: int) -> Tensor:
        """See `Int8Kernel`; the results are not rounded."""
        output = torch.empty(len(rows), len(self._scales))
        self._fill(rows, scale, zero, _NO_TABLE, output.numpy(), _NO_CODES)
        return output

    def mapped(
        self, rows: Tensor, scale: float, zero: int, function: Callable[[Tensor], Tensor], table: Tensor
    ) -> Tensor:
        """See `Int8Kernel`; each result is looked up in the table."""
        output = torch._empty_affine_quantized(
            (len(rows), len(self._scales)), scale=table.q_scale(), zero_point=table.q_zero_point(), dtype=torch.quint8
        )
        self._fill(rows, scale, zero, _bytes_of(table), _NO_FLOATS, _bytes_of(output))
        return output

    def _fill(self, rows: Tensor, scale: float, zero: int, table: Any, output: Any, coded: Any) -> None:
        factors = self._scales * np.float32(rows.q_scale() / scale)
        added = self._bias / np.float32(scale) - np.float32(rows.q_zero_point()) * self._sums * factors
        numbers = _bytes_of(rows).view(np.int32)
        weights = self._starts, self._columns, self._blocks, factors, added
        _product(numbers, *weights, np.float32(scale), np.float32(zero), table, output, coded)


def _bytes_of(rows: Tensor) -> np.ndarray:
    """Return the numbers of a quint8 tensor without a copy; `int_repr` takes as long as the product."""
    rows = rows.contiguous()
    view = torch.empty(0, dtype=torch.uint8)
    return view.set_(rows.untyped_storage(), rows.storage_offset(), rows.shape, rows.stride()).numpy()


def _sum_of_blocks(context: Any, columns: Any, blocks: Any, start: Any, stop: Any, inputs: Any, sums: Any) -> Any:
    """Write the sums of one output over its blocks, int32 (32,), for a tile of inputs: uint8 (in / 4, 32, 4).

    All but `start` and `stop` are addresses.
    """
    signature = types.void(types.intp, types.intp, types.int32, types.int32, types.intp, types.intp)
    byte, short, word, wide = (ir.IntType(bits) for bits in (8, 16, 32, 64))
    bytes32, shorts16, words8 = ir.VectorType(byte, 32), ir.VectorType(short, 16), ir.VectorType(word, _LANES)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        columns, blocks, start, stop, inputs, sums = args
        columns, blocks = builder.inttoptr(columns, short.as_pointer()), builder.inttoptr(blocks, word.as_pointer())
        inputs, sums = builder.inttoptr(inputs, byte.as_pointer()), builder.inttoptr(sums, words8.as_pointer())
        declare = builder.module.declare_intrinsic
        in_pairs = declare("llvm.x86.avx2.pmadd.ub.sw", (), ir.FunctionType(shorts16, (bytes32, bytes32)))
        in_fours = declare("llvm.x86.avx2.pmadd.wd", (), ir.FunctionType(words8, (shorts16, shorts16)))
        before = builder.block
        head, body, end = (builder.append_basic_block(name) for name in ("head", "body", "end"))
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(word)
        index.add_incoming(start, before)
        totals = [builder.phi(words8) for _ in range(_TOKENS // _LANES)]
        for total in totals:
            total.add_incoming(ir.Constant(words8, None), before)
        builder.cbranch(builder.icmp_signed("<", index, stop), body, end)
        builder.position_at_end(body)
        place = builder.sext(index, wide)
        column = builder.zext(builder.load(builder.gep(columns, [place])), wide)
        empty = ir.Constant(words8, ir.Undefined)
        block = builder.insert_element(empty, builder.load(builder.gep(blocks, [place])), ir.Constant(word, 0))
        block = builder.shuffle_vector(block, empty, ir.Constant(words8, [0] * _LANES))
        block = builder.bitcast(block, bytes32)
        tile = builder.gep(inputs, [builder.mul(column, ir.Constant(wide, _TOKENS * _BLOCK))])
        grown = []
        for number, total in enumerate(totals):
            tokens = builder.gep(tile, [ir.Constant(wide, number * _LANES * _BLOCK)])
            tokens = builder.load(builder.bitcast(tokens, bytes32.as_pointer()), align=1)
            pairs = builder.call(in_pairs, [tokens, block])
            grown.append(builder.add(total, builder.call(in_fours, [pairs, ir.Constant(shorts16, [1] * 16)])))
        index.add_incoming(builder.add(index, ir.Constant(word, 1)), builder.block)
        for total, value in zip(totals, grown, strict=True):
            total.add_incoming(value, builder.block)
        builder.branch(head)
        builder.position_at_end(end)
        for number, total in enumerate(totals):
            builder.store(total, builder.gep(sums, [ir.Constant(wide, number)]), align=1)
        return context.get_dummy_value()

    return signature, generate


_add_blocks: Any = intrinsic(_sum_of_blocks)


def _multiply(rows, starts, columns, blocks, factors, added, scale, zero, table, output, coded):
    """Multiply rows, four numbers of 8 bits in an int32 (n, in / 4), tile by tile.

    Fills `output` with float32; if there is a table, `coded` with the table's numbers instead.
    """
    count, size = rows.shape
    outputs = len(factors)
    inputs = np.empty((size, _TOKENS), np.int32)
    sums = np.empty(_TOKENS, np.int32)
    results = np.empty((_OUTPUTS, _TOKENS), np.float32)
    low, high = -zero, 255 - zero
    for first in range(0, count, _TOKENS):
        tokens = min(_TOKENS, count - first)
        if tokens < _TOKENS:
            inputs[:] = 0
        whole = size - size % 8
        for group in range(0, whole, 8):
            for token in range(tokens):
                for lane in range(8):
                    inputs[group + lane, token] = rows[first + token, group + lane]
        for column in range(whole, size):
            for token in range(tokens):
                inputs[column, token] = rows[first + token, column]
        for group in range(0, outputs, _OUTPUTS):
            width = min(_OUTPUTS, outputs - group)
            for lane in range(width):
                row = group + lane
                addresses = columns.ctypes.data, blocks.ctypes.data
                _add_blocks(*addresses, starts[row], starts[row + 1], inputs.ctypes.data, sums.ctypes.data)
                factor, start = factors[row], added[row]
                for token in range(_TOKENS):
                    results[lane, token] = np.float32(sums[token]) * factor + start
            if len(table):
                for lane in range(width):
                    for token in range(_TOKENS):
                        results[lane, token] = min(max(np.rint(results[lane, token]), low), high)
                for token in range(tokens):
                    for lane in range(width):
                        coded[first + token, group + lane] = table[np.uint8(results[lane, token] + zero)]
            elif width == _OUTPUTS:  # a fixed number of turns is faster
                for token in range(tokens):
                    for lane in range(_OUTPUTS):
                        output[first + token, group + lane] = results[lane, token] * scale
            else:
                for token in range(tokens):
                    for lane in range(width):
                        output[first + token, group + lane] = results[lane, token] * scale


_product = compiled(
    _multiply,
    "void(i4[:,::1], i4[::1], u2[::1], i4[::1], f4[::1], f4[::1], f4, f4, u1[::1], f4[:,::1], u1[:,::1])",
)
