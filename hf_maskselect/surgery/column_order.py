"""A search for the order of columns under which an N:M pattern keeps the most magnitude.

After Pool and Yu, "Channel Permutations for N:M Sparsity" (NeurIPS 2021): two groups exchange columns wherever that
keeps more. Here all groups are paired at random in every round. Every pair tries all ways to share its columns (35 for
groups of four), so that a round is a few hundred operations on whole matrices.
"""

from collections.abc import Sequence
from functools import cache
from itertools import combinations

import torch
from torch import Tensor

_EVERY_WAY = 4  # larger groups only try to exchange two columns: 16 columns can be shared in 6,435 ways
_PATIENCE = 16  # rounds over which the gain must reach `least`


def kept_magnitude(weight: Tensor, n: int, m: int) -> float:
    """Return the sum of the `n` largest magnitudes of every `m` consecutive columns, over all rows."""
    columns = weight.detach().abs().float().unflatten(1, (-1, m)).unbind(2)
    return float(_kept(columns, n).sum(dtype=torch.float64))


def search_permutation(
    weight: Tensor, n: int, m: int, block: int | None = None, rounds: int = 200, seed: int = 0, least: float = 2e-5
) -> Tensor:
    """Find an order of the columns under which `n` of `m` keeps at least as much magnitude as before.

    Args:
        weight: `(rows, columns)`, any float dtype.
        n: weights kept in each group.
        m: columns of a group.
        block: number of neighbouring columns that may change places with each other, such as those of one head; a
            multiple of `m` that divides the columns. Defaults to all columns.
        rounds: largest number of rounds.
        seed: seed of the pairing.
        least: the search ends when 16 rounds gained less than this share of the kept magnitude.

    Returns:
        int64 `(columns,)`: place -> column, so that `weight[:, order]` is the better matrix.

    Raises:
        ValueError: `m` does not divide the block, or the block does not divide the columns.
    """
    rows, columns = weight.shape
    block = columns if block is None else block
    if columns % block or block % m:
        raise ValueError(f"{columns} columns in blocks of {block} cannot be grouped by {m}: each must divide the next")
    generator = torch.Generator().manual_seed(seed)
    # Transposed, so that the columns of a group are gathered as whole rows.
    magnitudes = weight.detach().abs().float().t().contiguous()
    order = torch.arange(columns, device=weight.device).view(-1, m)
    total, gains = kept_magnitude(weight, n, m), []
    for _ in range(rounds):
        first, second = _pairs(columns // block, block // m, generator)
        if not len(first):
            break
        both = torch.cat([order[first], order[second]], dim=1)
        shared, gain = _share_columns(magnitudes, both, n)
        order[first], order[second] = shared[:, :m], shared[:, m:]
        gains.append(gain)
        if len(gains) >= _PATIENCE and sum(gains[-_PATIENCE:]) < least * total:
            break
    return order.view(-1)


def _pairs(blocks: int, groups: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pair the groups of each block at random, and return their indices; an odd group is left out."""
    shuffled = torch.rand(blocks, groups, generator=generator).argsort(1)
    shuffled += groups * torch.arange(blocks).unsqueeze(1)
    half = groups // 2
    return shuffled[:, :half].reshape(-1), shuffled[:, half : 2 * half].reshape(-1)


def _share_columns(magnitudes: Tensor, both: Tensor, n: int) -> tuple[Tensor, float]:
    """Share the columns in each row of `both` (pairs, 2m) between two groups; return them and the total gain."""
    m = both.shape[1] // 2
    columns = list(magnitudes[both].unbind(1))  # 2m of (pairs, rows)
    sums: dict[tuple[int, ...], Tensor] = {}

    def kept(group: tuple[int, ...]) -> Tensor:
        if group not in sums:
            sums[group] = _kept([columns[i] for i in group], n).sum(1)
        return sums[group]

    ways = partitions(m)
    scores = torch.stack([kept(way[:m]) + kept(way[m:]) for way in ways])
    best = scores.argmax(0)
    # A tie, or a gain that is rounding, leaves the columns where they are.
    top = scores.gather(0, best.unsqueeze(0)).squeeze(0)
    best[top <= scores[0] * (1 + 1e-6)] = 0
    gain = float((scores.gather(0, best.unsqueeze(0)) - scores[0]).sum())
    table = torch.tensor(ways, device=both.device)
    return both.gather(1, table[best]), gain


@cache
def partitions(m: int) -> list[tuple[int, ...]]:
    """List the ways to share 2m columns between two groups of m, the present one first.

    They are all ways for m up to 4, else the exchanges of one column.
    """
    every = range(2 * m)
    if m <= _EVERY_WAY:
        firsts = [(0, *rest) for rest in combinations(range(1, 2 * m), m - 1)]
    else:
        firsts = [tuple(range(m))]
        firsts += [tuple(sorted({*range(m)} - {i} | {j})) for i in range(m) for j in range(m, 2 * m)]
    return [first + tuple(i for i in every if i not in first) for first in firsts]


def _kept(columns: Sequence[Tensor], n: int) -> Tensor:
    """Return the elementwise sum of the `n` largest of several tensors, by the first rounds of a bubble sort."""
    remaining, total = list(columns), torch.zeros_like(columns[0])
    for _ in range(n):
        best, rest = remaining[0], []
        for other in remaining[1:]:
            rest.append(torch.minimum(best, other))
            best = torch.maximum(best, other)
        total += best
        remaining = rest
    return total
