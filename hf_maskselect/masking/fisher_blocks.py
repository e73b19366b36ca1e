"""The inverse of the empirical Fisher information in blocks, for the saliency of Optimal Brain Surgeon.

From "The Optimal BERT Surgeon" (Kurtic et al.; EMNLP 2022; arXiv 2203.07259). The Fisher matrix `1/m sum g g^T` of m
gradients is cut into blocks of 50 neighbouring weights of a row, and only the diagonal of each block's inverse is
kept: one number a weight. The gradients of a few matrices at a time are held in half precision, which bounds memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .dtensors import local_rows, shards_of

BLOCK = 50
DAMPING = 0.1
MEMORY = float(1 << 30)
_BYTES = 2  # of a number of a gradient, in bfloat16
_ENTRIES = 1 << 22  # entries of the blocks that are inverted at a time


def chunks_of(sizes: Sequence[int], samples: int, memory: float) -> list[list[int]]:
    """Indices of matrices, in order, whose gradients of `samples` batches are held together.

    Args:
        sizes: number of weights of each matrix.
        samples: gradients of each matrix.
        memory: bytes for the gradients of a chunk. A chunk has at least one matrix.
    """
    chunks: list[list[int]] = []
    for index, size in enumerate(sizes):
        if not chunks or bytes_of([sizes[i] for i in chunks[-1]] + [size], samples) > memory:
            chunks.append([])
        chunks[-1].append(index)
    return chunks


def bytes_of(sizes: Sequence[int], samples: int) -> int:
    """Bytes of the gradients of `samples` batches, as they are held."""
    return _BYTES * samples * sum(sizes)


def shortened(grad: Tensor, weight: Tensor) -> Tensor:
    """The local rows of a gradient as they are held, flat from the second axis on, with 0 where the weight is pruned.

    The blocks are then those of the kept weights alone.
    """
    grad, weight = local_rows(grad), local_rows(weight)
    return (grad * (weight != 0)).flatten(1).to(torch.bfloat16)


def inverse_diagonal(gradients: Sequence[Tensor], weight: Tensor, samples: int, damping: float) -> Tensor:
    """The diagonal of each block's inverse, float32, shaped like the local rows of `weight`.

    All processes that hold rows of the weight call it together.

    Args:
        gradients: those of every sample that has one, as `shortened`.
        weight: the weight that they belong to.
        samples: number of all samples.
        damping: added to the diagonal of the blocks, as a multiple of the matrix's mean squared gradient.

    Returns:
        infinity everywhere, if all gradients are zero; NaN in a block that has no inverse, as with NaN in a gradient.
    """
    own, shards = local_rows(weight), shards_of({"": weight})
    inverse = torch.full(own.shape, float("inf"), dtype=torch.float32, device=own.device)
    if not gradients:
        return inverse
    square = torch.stack([grad.double().square().sum() for grad in gradients]).sum()
    added = damping * float(square if shards is None else shards.add(square)) / (samples * weight.numel())
    if added == 0:
        return inverse
    flat = inverse.view(own.shape[0], -1)
    rows, columns = flat.shape
    whole = columns - columns % BLOCK
    step = max(1, _ENTRIES // (BLOCK * columns))
    for first in range(0, rows, step):
        part = torch.stack([grad[first : first + step] for grad in gradients], dim=-1).double().div_(samples**0.5)
        for start, end, size in ((0, whole, BLOCK), (whole, columns, columns - whole)):
            if start < end:
                blocks = part[:, start:end].reshape(-1, size, len(gradients))
                flat[first : first + step, start:end] = _diagonals(blocks, added).view(-1, end - start)
    return inverse


def _diagonals(blocks: Tensor, added: float) -> Tensor:
    """The diagonals of the inverses; `blocks` has the gradients, over the root of their number, in its last axis."""
    fisher = blocks @ blocks.mT
    fisher.diagonal(dim1=1, dim2=2).add_(added)
    factor, failed = torch.linalg.cholesky_ex(fisher)
    one = torch.eye(fisher.shape[1], dtype=fisher.dtype, device=fisher.device)
    # The inverse is L^-T L^-1, whose diagonal has the squared norms of the columns of L^-1.
    diagonals = torch.linalg.solve_triangular(factor, one.expand_as(fisher), upper=False).square().sum(1)
    return diagonals.masked_fill(failed[:, None] != 0, float("nan"))
