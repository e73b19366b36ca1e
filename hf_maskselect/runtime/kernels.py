"""The matrix products for a CPU: those that torch has, and those that numba compiles.

They are probed, never assumed: a product may leave torch, and numba is optional.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # numba is optional, and takes a second to import
    from .jit import SparseRows

# exact: dense, onednn (dense by another library, faster on some CPUs), csr, numba (single zeros, compiled here).
# 16 bits: bf16. 8 bits: int8, 1x4 (blocks of four zeros), numba-1x4 (the same, compiled here).
KINDS = ("dense", "onednn", "csr", "numba", "bf16", "int8", "1x4", "numba-1x4")
INT8_KINDS = ("int8", "1x4", "numba-1x4")
EXACT_KINDS = ("dense", "onednn", "csr", "numba")
ZERO_KINDS, BLOCK_KINDS = ("csr", "numba"), ("1x4", "numba-1x4")  # skip single zeros, or blocks of four zeros
BLOCK = 4
# The 1x4 kernel adds pairs of products in 16 bits: 255 * (a + b) must not exceed 32,767 for weights of one sign.
_PAIR = 128.0


@functools.cache
def missing(kind: str) -> str:
    """Return why a kind of product does not work here, or an empty text."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 32, generator=generator)
    weight[:, 4:12] = 0
    rows = torch.rand(5, 32, generator=generator)
    expected = nn.functional.linear(rows, weight)
    try:
        if kind in INT8_KINDS:
            values, scales = quantized_rows(weight)
            product = int8_product(kind, values, scales, None)
            output = product(torch.quantize_per_tensor(rows, 1 / 255, 0, torch.quint8), 0.2, 128)
        else:
            output = exact_product(kind, rows, prepared(kind, weight), None)
    except ImportError as error:  # also of a numba that does not go together with this NumPy
        return f"numba cannot be imported ({str(error).splitlines()[0]}): pip install 'hf_maskselect[cpu]'"
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return f"the {kind} product does not run on this machine ({str(error).splitlines()[0]})"
    if not torch.allclose(output, expected, atol=0.2 if kind in INT8_KINDS else 0.1 if kind == "bf16" else 1e-4):
        return f"the {kind} product computes something else on this machine"
    return ""


def quantized_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a float32 matrix (out, in) to int8; returns it and float32 scales (out,), one a row.

    The scales keep every pair of products within 16 bits, so that kernels without wider sums stay exact.
    """
    pairs = nn.functional.pad(weight, (0, weight.shape[1] % 2)).view(len(weight), -1, 2)
    largest = weight.abs().amax(1) / 127
    same_sign = torch.maximum(pairs.clamp(min=0).sum(-1).amax(1), pairs.clamp(max=0).sum(-1).neg().amax(1))
    # Each of the two may round up by a half.
    scales = torch.maximum(largest, same_sign / (_PAIR - 1))
    scales[scales == 0] = 1.0  # the kernels divide the bias by the scale, also in a row without weights
    return (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8), scales


class Int8Kernel(Protocol):
    """A matrix of int8 (out, in) in packed form."""

    def __call__(self, rows: Tensor, scale: float, zero: int) -> Tensor:
        """Multiply quint8 rows (n, in); returns float32 (n, out), which a kernel may round by this scale and zero."""

    def mapped(
        self, rows: Tensor, scale: float, zero: int, function: Callable[[Tensor], Tensor], table: Tensor
    ) -> Tensor:
        """Multiply quint8 rows (n, in), round the results to 8 bits, and apply an elementwise function.

        Args:
            rows: quint8 (n, in).
            scale: of the results before the function.
            zero: zero point of these.
            function: maps float32 to float32.
            table: the function of each of the 256 results, as quint8.

        Returns:
            quint8 (n, out), of the scale and zero point of `table`.
        """


def int8_product(kind: str, values: Tensor, scales: Tensor, bias: Tensor | None) -> Int8Kernel:
    """Pack a matrix for a kind of product.

    Args:
        kind: one of `INT8_KINDS`.
        values: int8 (out, in), as `quantized_rows` makes it.
        scales: float32 (out,), one a row.
        bias: float32 (out,), or None.

    Raises:
        ImportError: the product needs numba, which is not there.
        NotImplementedError: this torch or CPU lacks the product.
    """
    if kind == "numba-1x4":
        from .jit_int8 import BlockProduct

        return BlockProduct(values, scales, bias)
    return TorchProduct(kind, values, scales, bias)


class TorchProduct:
    """A matrix of int8 for a product of torch, which rounds its results to 8 bits; see `int8_product`."""

    def __init__(self, kind: str, values: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        zeros = torch.zeros(len(scales), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that quantized tensors may leave torch
            weight = torch._make_per_channel_quantized_tensor(values.contiguous(), scales.double(), zeros, 0)
        bias = torch.zeros(len(scales)) if bias is None else bias.detach()
        if kind == "1x4":
            with _engine("fbgemm"):
                self._packed = torch.ops.sparse.qlinear_prepack(weight, bias, 1, BLOCK)
            self._apply = torch.ops.sparse.qlinear
        else:
            with _engine("x86"):
                self._packed = torch.ops.quantized.linear_prepack(weight, bias)
            self._apply = torch.ops.quantized.linear

    def __call__(self, rows: Tensor, scale: float, zero: int) -> Tensor:
        """See `Int8Kernel`."""
        return self._apply(rows, self._packed, scale, zero).dequantize()

    def mapped(
        self, rows: Tensor, scale: float, zero: int, function: Callable[[Tensor], Tensor], table: Tensor
    ) -> Tensor:
        """See `Int8Kernel`."""
        output = function(self(rows, scale, zero))
        return torch.quantize_per_tensor(output, table.q_scale(), table.q_zero_point(), torch.quint8)


def prepared(kind: str, weight: Tensor) -> Tensor | SparseRows:
    """Return a float32 matrix in the form that an exact or bf16 product reads."""
    if kind == "numba":
        from .jit import SparseRows

        return SparseRows.of(weight)
    if kind == "csr":
        counts = (weight != 0).sum(1).cumsum(0, dtype=torch.int32)
        starts, columns = nn.functional.pad(counts, (1, 0)), weight.nonzero()[:, 1].int()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that CSR tensors are in beta state
            return torch.sparse_csr_tensor(starts, columns, weight[weight != 0], weight.shape, check_invariants=False)
    return weight.bfloat16() if kind == "bf16" else weight


def exact_product(kind: str, rows: Tensor, weight: Tensor | SparseRows, bias: Tensor | None) -> Tensor:
    """Multiply float32 rows (n, in) by a prepared matrix; returns float32 (n, out)."""
    if not isinstance(weight, Tensor):
        from .jit import sparse_product

        return sparse_product(rows, weight, bias)
    if kind == "onednn":
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    if kind == "bf16":
        output = nn.functional.linear(rows.bfloat16(), weight, None if bias is None else bias.bfloat16())
        return output.float()
    if kind == "csr":
        output = (weight @ rows.t()).t()
        return output if bias is None else output + bias
    return nn.functional.linear(rows, weight, bias)


@contextmanager
def _engine(name: str) -> Iterator[None]:
    """Choose the library that packs quantized matrices inside the block, where torch has it."""
    before = torch.backends.quantized.engine
    if name in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before
