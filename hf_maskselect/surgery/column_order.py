"""Which input channels share a group: a search for the order of columns under which N:M keeps the most magnitude.

After Pool and Yu, "Channel Permutations for N:M Sparsity" (NeurIPS 2021): groups are compared two by two, and their
columns dealt anew wherever that keeps more. Here all groups are paired at random in every round, and every pair tries
every way to deal (35 for groups of four), so that a round is a few hundred operations on whole matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import combinations

import torch
from torch import Tensor

_EVERY_WAY = 4  # larger groups try exchanges of two columns only: 16 columns can be dealt in 6,435 ways
_PATIENCE = 16  # rounds without a gain worth it


def kept_magnitude(weight: Tensor, n: int, m: int) -> float:
    """Sum of the `n` largest magnitudes of every `m` consecutive columns, over all rows."""
    return float(
        _kept(list(weight.detach().abs().float().unflatten(1, (-1, m)).unbind(2)), n).sum(dtype=torch.float64)
    )


def search_permutation(
    weight: Tensor, n: int, m: int, block: int | None = None, rounds: int = 200, seed: int = 0, least: float = 2e-5
) -> Tensor:
    """An order of the columns under which `n` of `m` keeps at least as much magnitude as before.

    Args:
        weight: `(rows, columns)`, any float dtype.
        block: columns that may be exchanged with each other, such as those of one head; all by default. A multiple of
            `m` that divides the columns.
        rounds: at most so many.
        seed: of the pairing; the result depends on nothing else.
        least: the search ends when 16 rounds gained less than this share of the kept magnitude.

    Returns:
        int64 `(columns,)`: place -> the column that comes there, so that `weight[:, order]` is the better matrix.

    Raises:
        ValueError: columns, block and `m` do not fit.
    """
    rows, columns = weight.shape
    block = columns if block is None else block
    if columns % block or block % m:
        raise ValueError(f"{columns} columns in blocks of {block} cannot be grouped by {m}: each must divide the next")
    generator = torch.Generator().manual_seed(seed)
    # One row a column of the matrix: a group's columns are then gathered as whole rows.
    magnitudes = weight.detach().abs().float().t().contiguous()
    order = torch.arange(columns, device=weight.device).view(-1, m)
    total, gains = kept_magnitude(weight, n, m), []
    for _ in range(rounds):
        first, second = _pairs(columns // block, block // m, generator)
        if not len(first):
            break
        both = torch.cat([order[first], order[second]], dim=1)
        dealt, gain = _deal(magnitudes, both, n)
        order[first], order[second] = dealt[:, :m], dealt[:, m:]
        gains.append(gain)
        if len(gains) >= _PATIENCE and sum(gains[-_PATIENCE:]) < least * total:
            break
    return order.view(-1)


def _pairs(blocks: int, groups: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of the groups, paired at random inside each block; of an odd number one is left out."""
    shuffled = torch.rand(blocks, groups, generator=generator).argsort(1)
    shuffled += groups * torch.arange(blocks).unsqueeze(1)
    half = groups // 2
    return shuffled[:, :half].reshape(-1), shuffled[:, half : 2 * half].reshape(-1)


def _deal(magnitudes: Tensor, both: Tensor, n: int) -> tuple[Tensor, float]:
    """The best way to deal each row of `both` (pairs, 2m) to two groups, and the gain of all; a tie stays as it is."""
    m = both.shape[1] // 2
    columns = list(magnitudes[both].unbind(1))  # 2m of (pairs, rows)
    found: dict[tuple[int, ...], Tensor] = {}

    def kept(group: tuple[int, ...]) -> Tensor:
        if group not in found:
            found[group] = _kept([columns[i] for i in group], n).sum(1)
        return found[group]

    ways = deals(m)
    scores = torch.stack([kept(way[:m]) + kept(way[m:]) for way in ways])
    best = scores.argmax(0)
    # A tie, or a gain that is rounding, leaves the columns where they are.
    top = scores.gather(0, best.unsqueeze(0)).squeeze(0)
    best[top <= scores[0] * (1 + 1e-6)] = 0
    gain = float((scores.gather(0, best.unsqueeze(0)) - scores[0]).sum())
    table = torch.tensor(ways, device=both.device)
    return both.gather(1, table[best]), gain


@cache
def deals(m: int) -> list[tuple[int, ...]]:
    """Ways to deal 2m columns to two groups of m, each once, the first as they are: all of them for m up to 4, else
    those that exchange one column."""
    every = range(2 * m)
    if m <= _EVERY_WAY:
        firsts = [(0, *rest) for rest in combinations(range(1, 2 * m), m - 1)]
    else:
        firsts = [tuple(range(m))]
        firsts += [tuple(sorted({*range(m)} - {i} | {j})) for i in range(m) for j in range(m, 2 * m)]
    return [first + tuple(i for i in every if i not in first) for first in firsts]


def _kept(columns: Sequence[Tensor], n: int) -> Tensor:
    """Elementwise sum of the `n` largest of several tensors: the first rounds of a bubble sort."""
    left, total = list(columns), None
    for _ in range(n):
        best, rest = left[0], []
        for other in left[1:]:
            rest.append(torch.minimum(best, other))
            best = torch.maximum(best, other)
        total = best if total is None else total + best
        left = rest
    return total
