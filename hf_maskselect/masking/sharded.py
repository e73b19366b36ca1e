"""Masks over weights whose rows are cut among ranks (FSDP2's `Shard(0)`), from all-reduced counts alone.

The k-th largest of all entries is read as a number is, from its first digit to its last: every float32 has an integer
key of 32 bits in the same order; the ranks add up how many of their keys begin with each digit, all see in which one
the k-th largest lies, and only the keys that begin with it count for the next digit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .patterns import (
    NM,
    Channel,
    Unstructured,
    _cannot_keep,
    _too_few,
    _without_dead,
    allocate,
    joint_masks,
    kept_count,
)

# Bits of the three digits. One pool: each message is 64 KiB or less up to 512 tensors (13 bits in int64, whose sum
# tells whether int32 holds the counts inside that digit). Many pools have their messages side by side.
_ONE_POOL = (13, 14, 5)
_MANY_POOLS = (11, 11, 10)
# Counters are int32 where fewer entries than this are counted.
_WIDE = 1 << 31
# Entries whose keys stay in a core's cache while they are counted.
_CHUNK = 1 << 18


class Shards:
    """The ranks among which every matrix is cut by rows: each holds a contiguous block, perhaps of no row; blocks lie
    in rank order.

    All ranks call the same method at the same time with the same number of pools, tensors and values. What is wrong
    with the data of one rank raises on all, so that none waits.

    group: the ranks; the default group if None. device: where the group's backend wants what it sums.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"):
        self._group, self._device = group, device
        self._rank = dist.get_rank(group)
        self._size = dist.get_world_size(group)

    def sums(self, values: Sequence[int]) -> list[int]:
        """Each value summed over the ranks; one all-reduce in int64."""
        return self._summed(torch.tensor(values, dtype=torch.int64, device=self._device)).tolist()

    def add(self, value: Tensor) -> Tensor:
        """`value` summed over the ranks."""
        return self._summed(value.clone())

    def top_k_masks(
        self, pools: Sequence[Sequence[Tensor]], ks: Sequence[int]
    ) -> tuple[list[list[Tensor]], list[list[int]]]:
        """For each pool of local shards, boolean masks of the pool's k largest entries over all ranks together:
        `ranking.top_k_masks` of the whole tensors, cut to the shards. And how many entries of each whole tensor stay.

        All pools share four all-reduces.

        pools: contiguous float32 tensors on one device; -inf is allowed.

        Raises:
            ValueError: on every rank, if any of them has a NaN or a k is out of range.
        """
        tensors = [t for pool in pools for t in pool]
        if not tensors:
            return [[] for _ in pools], [[] for _ in pools]
        owner = [index for index, pool in enumerate(pools) for _ in pool]
        device = tensors[0].device
        first, second, third = _ONE_POOL if len(pools) == 1 else _MANY_POOLS

        counts = self._summed(torch.stack([_first_digits(pool, first, device) for pool in pools]))
        if counts[:, -1].any():
            raise ValueError("NaN among the values to be ranked")
        for k, total in zip(ks, counts.sum(1).tolist(), strict=True):
            if not 0 <= k <= total:
                raise ValueError(f"k must lie in 0..{total} (the number of entries), got {k}")
        digits, wanted, inside = _descend(counts, torch.tensor(ks, device=device))
        begins = digits - (1 << (first - 1))
        dtype = torch.int32 if int(inside.max()) < _WIDE else torch.int64

        keys = [
            [_folded(torch.cat([_beginning(part, begin, second + third) for part in _bits(t)])) for t in pool]
            for pool, begin in zip(pools, _folded(begins, first).tolist(), strict=True)
        ]
        counts = torch.stack(
            [
                _digits(parts, begin << second, second, third, device)
                for parts, begin in zip(keys, begins.tolist(), strict=True)
            ]
        )
        digits, wanted, _ = _descend(self._summed(counts.to(dtype)), wanted)
        begins = (begins << second) + digits

        local = torch.stack(  # by tensor, so that it tells where the ties lie
            [
                _digits([_beginning(part, begin, third)], begin << third, third, 0, device)
                for parts, begin in zip(keys, begins.tolist(), strict=True)
                for part in parts
            ]
        )
        counts = self._summed(local.to(dtype, copy=True))
        by_pool = counts.new_zeros(len(pools), 1 << third)
        by_pool.index_add_(0, torch.tensor(owner, device=device), counts)
        digits, wanted, _ = _descend(by_pool, wanted)
        thresholds = _folded(((begins << third) + digits).to(torch.int32)).view(torch.float32).tolist()

        column = digits[owner].unsqueeze(1)
        ties = local.gather(1, column).squeeze(1).tolist()
        masks = [t > thresholds[index] for t, index in zip(tensors, owner, strict=True)]
        above = [int(torch.count_nonzero(mask)) for mask in masks]
        everywhere = counts.gather(1, column).squeeze(1).tolist()
        kept, stay = self._kept_ties(ties, everywhere, wanted.tolist(), owner, above)
        for mask, t, index, count in zip(masks, tensors, owner, kept, strict=True):
            if count:
                mask.view(-1)[(t == thresholds[index]).view(-1).nonzero().squeeze(1)[:count]] = True
        found, numbers = iter(masks), iter(stay)
        return [[next(found) for _ in pool] for pool in pools], [[next(numbers) for _ in pool] for pool in pools]

    def _kept_ties(
        self, ties: list[int], everywhere: list[int], wanted: list[int], owner: list[int], above: list[int]
    ) -> tuple[list[int], list[int]]:
        """By tensor, how many of the `ties` (entries equal to the threshold) of this rank stay, if each pool keeps the
        first `wanted` of them: those of earlier tensors, then those of lower ranks. And how many entries stay on all
        ranks together, with those `above` the threshold."""
        left = list(wanted)
        quotas = []
        for index, count in zip(owner, everywhere, strict=True):
            quotas.append(min(count, left[index]))
            left[index] -= quotas[-1]
        cut = [i for i, quota in enumerate(quotas) if 0 < quota < everywhere[i]]
        by_rank = [0] * (len(cut) * self._size)
        by_rank[self._rank :: self._size] = [ties[i] for i in cut]
        sums = self.sums(above + by_rank)
        before = [0] * len(ties)
        for row, i in enumerate(cut):
            before[i] = sum(sums[len(ties) + row * self._size :][: self._rank])
        kept = [min(count, max(0, quotas[i] - before[i])) for i, count in enumerate(ties)]
        return kept, [sums[i] + quota for i, quota in enumerate(quotas)]

    def _summed(self, counts: Tensor) -> Tensor:
        """`counts` summed over the ranks, in place."""
        dist.all_reduce(counts, group=self._group)
        return counts


def sharded_masks(
    pattern: Unstructured | NM | Channel,
    scores: Mapping[str, Tensor],
    sparsity: float,
    shards: Shards,
    alive: Mapping[str, Tensor] | None = None,
    sizes: Sequence[int] | None = None,
    room: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """`pattern.masks` where every rank holds only its rows: boolean masks by name, shaped like the local scores.

    They are the rows of the masks of the whole to the bit, but for the scope "balanced", whose means are summed in
    float64 over the ranks instead of in float32 by one: there they agree up to the rounding of that mean.

    scores: float32 (local rows, ...), the same names in the same order on every rank; `alive`: boolean, of the same
    shapes, whose dead weights never return. sizes, room: entries of the whole matrices and those alive, where they are
    known; else the ranks sum theirs.

    Raises:
        ValueError: on every rank, as in `pattern.masks`; or a score is NaN.
    """
    if isinstance(pattern, NM):  # its groups lie within a row
        _check_groups_alive(pattern, sparsity, shards, alive or {})
        return pattern.masks(scores, sparsity, alive)
    if isinstance(pattern, Channel):
        return _channel_masks(pattern, scores, sparsity, shards, alive)
    names = list(scores)
    if sizes is None or room is None:
        local = [scores[name].numel() for name in names]
        living = local if alive is None else [int(torch.count_nonzero(alive[name])) for name in names]
        sums = shards.sums(local + living)
        sizes, room = sums[: len(names)], sums[len(names) :]
    keep = kept_count(sum(sizes), sparsity)
    ranked = [_without_dead(scores[name], name, alive, consume=False) for name in names]
    if pattern.scope == "layer":
        masks, _ = shards.top_k_masks([[score] for score in ranked], allocate(keep, sizes, room))
        return {name: mask for name, (mask,) in zip(names, masks, strict=True)}
    if keep > sum(room):
        raise ValueError(_too_few(keep, sum(room)))
    if pattern.scope == "balanced":
        roots = _roots_of_means(scores, sizes, shards, alive)
        ranked = [score / root for score, root in zip(ranked, roots, strict=True)]
    masks = joint_masks(ranked, keep, pattern.floors(keep, sizes, room), shards.top_k_masks)
    return dict(zip(names, masks, strict=True))


def _roots_of_means(
    scores: Mapping[str, Tensor], sizes: Sequence[int], shards: Shards, alive: Mapping[str, Tensor] | None
) -> Tensor:
    """What "balanced" divides each matrix's scores by (float32, one a matrix): the root of their mean with the dead as
    zeros, or 1 where that is not above 0."""
    sums = []
    for name, score in scores.items():
        in_force = score if alive is None else score.masked_fill(alive[name].logical_not(), 0)
        sums.append(in_force.sum(dtype=torch.float64))
    sums = shards._summed(torch.stack(sums))
    roots = (sums / torch.tensor(sizes, device=sums.device)).to(torch.float32).sqrt()
    return torch.where(roots > 0, roots, 1.0)


def _check_groups_alive(pattern: NM, sparsity: float, shards: Shards, alive: Mapping[str, Tensor]) -> None:
    short = shards.sums([pattern.short_groups(mask, sparsity) for mask in alive.values()]) if alive else []
    for name, count in zip(alive, short, strict=True):
        if count:
            raise ValueError(_cannot_keep(name, pattern.too_few(count, sparsity)))


def _channel_masks(
    pattern: Channel,
    scores: Mapping[str, Tensor],
    sparsity: float,
    shards: Shards,
    alive: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    norms = [pattern.norms(name, score, alive) for name, score in scores.items()]
    # A row that is not whole has the norm -inf.
    sums = shards.sums([*map(len, norms), *(int(torch.count_nonzero(norm != float("-inf"))) for norm in norms)])
    keeps = [pattern.rows((count,), sparsity) for count in sums[: len(norms)]]
    for name, whole, keep in zip(scores, sums[len(norms) :], keeps, strict=True):
        if whole < keep:
            raise ValueError(_cannot_keep(name, pattern.too_few(whole, keep)))
    kept, _ = shards.top_k_masks([[norm] for norm in norms], keeps)
    return {name: pattern.spread(mask, score) for (name, score), (mask,) in zip(scores.items(), kept, strict=True)}


def _folded(bits: Tensor, width: int = 32) -> Tensor:
    """Bits of float32 values (or their first `width`, as a signed number) -> keys in the values' order, and back."""
    return bits ^ ((bits >> (width - 1)) & ((1 << (width - 1)) - 1))


def _bits(values: Tensor) -> Iterable[Tensor]:
    """The int32 bits of a float32 tensor, flat, a chunk at a time."""
    for chunk in values.view(-1).split(_CHUNK):
        yield (chunk + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0


def _digits(parts: Iterable[Tensor], start: int, bits: int, rest: int, device: torch.device) -> Tensor:
    """How many keys have each digit of `bits` bits, in rising order, before their last `rest` bits: int64 (2**bits,).
    start: the key, without these last bits, whose digit is the lowest."""
    counts = torch.zeros(1 << bits, dtype=torch.int64, device=device)
    for keys in parts:
        counts += torch.bincount((keys >> rest) - start, minlength=1 << bits)
    return counts


def _first_digits(pool: Sequence[Tensor], bits: int, device: torch.device) -> Tensor:
    """The same for the first digit of a pool's values. The last one is that of no number: it counts any NaN."""
    half = 1 << (bits - 1)
    counts = _digits((part for values in pool for part in _bits(values)), -half, bits, 32 - bits, device)
    counts[:half] = counts[:half].flip(0)  # to fold the counts is cheaper than to fold every key
    for values in pool:
        if values.numel():
            counts[-1] += values.max().isnan()
    return counts


def _beginning(keys: Tensor, begin: int, rest: int) -> Tensor:
    """The keys that are `begin` when their last `rest` bits are cut off."""
    return keys[(keys >> rest) == begin]


def _descend(counts: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By pool, from `counts` (pools, digits) in rising order and how many of the largest are wanted: the digit in
    which the last of them lies (the highest, above every number, if none is wanted), how many are still wanted there,
    how many lie there; int64."""
    from_top = counts.flip(1).cumsum(1, dtype=torch.int64)
    above = (from_top < wanted.unsqueeze(1)).sum(1, keepdim=True)
    digits = (counts.shape[1] - 1 - above).clamp_(min=0)  # an empty pool reaches none
    inside = counts.gather(1, digits).squeeze(1).long()
    higher = from_top.gather(1, counts.shape[1] - 1 - digits).squeeze(1) - inside
    return digits.squeeze(1), wanted - higher, inside
