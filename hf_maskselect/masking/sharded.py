"""Masks of weights whose rows lie on several processes (FSDP2's `Shard(0)`), from all-reduced counts alone.

The k-th largest of all entries is found digit by digit, from the first to the last. Every float32 has an integer key
of 32 bits in the same order. The processes add up how many of their keys begin with each digit, so all of them see the
digit of the k-th largest, and only the keys that begin with it count for the next digit.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# Bits of the three digits. One pool: each message is 64 KiB or less up to 512 tensors (13 bits in int64, whose sum
# tells whether int32 holds the counts inside that digit). Many pools have their messages side by side.
_ONE_POOL = (13, 14, 5)
_MANY_POOLS = (11, 11, 10)
# Counters are int32 where fewer entries than this are counted.
_WIDE = 1 << 31
# Entries whose keys stay in a core's cache while they are counted.
_CHUNK = 1 << 18


class Shards:
    """The processes of `group` that hold the rows of every matrix: each one block, perhaps empty, in rank order.

    All processes call the same method at the same time, with the same number of pools, tensors and values. Bad data on
    one process raises an error on all, so that none waits. The group's backend sums on `device`.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"):
        self._group, self._device = group, device
        self._rank = dist.get_rank(group)
        self._size = dist.get_world_size(group)

    def sums(self, values: Sequence[int]) -> list[int]:
        """Each value summed over the processes; one all-reduce in int64."""
        return self._summed(torch.tensor(values, dtype=torch.int64, device=self._device)).tolist()

    def add(self, value: Tensor) -> Tensor:
        """`value` summed over the processes."""
        return self._summed(value.clone())

    def top_k_masks(
        self, pools: Sequence[Sequence[Tensor]], ks: Sequence[int]
    ) -> tuple[list[list[Tensor]], list[list[int]]]:
        """The local rows of `ranking.top_k_masks` over the whole tensors of each pool; four all-reduces in all.

        Returns boolean masks, and how many entries of each whole tensor they keep. The tensors must be contiguous
        float32 on one device; -inf is allowed. Raises a ValueError on every process if any of them has a NaN, or a k
        is out of range.
        """
        tensors = [t for pool in pools for t in pool]
        if not tensors:
            return [[] for _ in pools], [[] for _ in pools]
        owner = [index for index, pool in enumerate(pools) for _ in pool]
        device = tensors[0].device
        first, second, third = _ONE_POOL if len(pools) == 1 else _MANY_POOLS

        counts = self._summed(torch.stack([_first_digits(pool, first, device) for pool in pools]))
        if counts[:, -1].any():
            raise ValueError("NaN among the values to rank: check the weights and the criterion")
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
        local_masks, numbers = iter(masks), iter(stay)
        return [[next(local_masks) for _ in pool] for pool in pools], [[next(numbers) for _ in pool] for pool in pools]

    def _kept_ties(
        self, ties: list[int], everywhere: list[int], wanted: list[int], owner: list[int], above: list[int]
    ) -> tuple[list[int], list[int]]:
        """How many entries equal to the threshold each tensor keeps here, and how many entries it keeps in all.

        Each pool keeps the first `wanted` of its ties: earlier tensors first, then lower ranks. `ties` and `above` are
        the local numbers of entries equal to the threshold and above it, `everywhere` the ties of all processes.
        """
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
        """`counts` summed over the processes, in place."""
        dist.all_reduce(counts, group=self._group)
        return counts


def _folded(bits: Tensor, width: int = 32) -> Tensor:
    """Bits of float32 values (or their first `width` bits, signed) to keys in the values' order, and back."""
    return bits ^ ((bits >> (width - 1)) & ((1 << (width - 1)) - 1))


def _bits(values: Tensor) -> Iterable[Tensor]:
    """The int32 bits of a float32 tensor, flat, a chunk at a time."""
    for chunk in values.view(-1).split(_CHUNK):
        yield (chunk + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0


def _digits(parts: Iterable[Tensor], start: int, bits: int, rest: int, device: torch.device) -> Tensor:
    """Number of keys by the digit of `bits` bits before their last `rest` bits: int64 (2**bits,), in rising order.

    `start` is the key, without its last `rest` bits, whose digit is the lowest.
    """
    counts = torch.zeros(1 << bits, dtype=torch.int64, device=device)
    for keys in parts:
        counts += torch.bincount((keys >> rest) - start, minlength=1 << bits)
    return counts


def _first_digits(pool: Sequence[Tensor], bits: int, device: torch.device) -> Tensor:
    """`_digits` for the first digit of a pool's values; the last count, which no number has, is that of NaNs."""
    half = 1 << (bits - 1)
    counts = _digits((part for values in pool for part in _bits(values)), -half, bits, 32 - bits, device)
    counts[:half] = counts[:half].flip(0)  # to fold the counts is cheaper than to fold every key
    for values in pool:
        if values.numel():
            counts[-1] += values.max().isnan()
    return counts


def _beginning(keys: Tensor, begin: int, rest: int) -> Tensor:
    """The keys that equal `begin` without their last `rest` bits."""
    return keys[(keys >> rest) == begin]


def _descend(counts: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find by pool the digit of the last of the `wanted` largest keys; counts: (pools, digits), in rising order.

    Returns that digit (the highest, above every number, if none is wanted), how many of the keys that have it are
    still wanted, and how many keys have it; int64.
    """
    from_top = counts.flip(1).cumsum(1, dtype=torch.int64)
    above = (from_top < wanted.unsqueeze(1)).sum(1, keepdim=True)
    digits = (counts.shape[1] - 1 - above).clamp_(min=0)  # an empty pool reaches none
    inside = counts.gather(1, digits).squeeze(1).long()
    higher = from_top.gather(1, counts.shape[1] - 1 - digits).squeeze(1) - inside
    return digits.squeeze(1), wanted - higher, inside
