"""The processes of one run, as a search needs them: small values told to all, errors shared, nobody left waiting."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """This process among those of the run, or alone.

    What is exchanged are Python objects of a few hundred bytes, over a gloo group of their own: trials run for
    minutes, in which the backend of the training (NCCL, with its watchdog) is not waited on.
    """

    def __init__(self) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.count = dist.get_world_size() if distributed else 1
        self._group: dist.ProcessGroup | None = None
        self._seconds = 0.0

    def open(self, seconds: float) -> None:
        """Set for how long a rank waits for another one. All ranks must call it together."""
        if self.count == 1:
            return
        if self._group is not None:
            dist.destroy_process_group(self._group)
        self._seconds = seconds
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank.

        Raises:
            RuntimeError: a process is gone, or did not come within the time of `open`.
        """
        if self.count == 1:
            return [value]
        told: list = [None] * self.count
        try:
            dist.all_gather_object(told, value, group=self._group)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} waited for the other ranks in vain: one of them has died, which its own log tells, "
                f"or was busy for more than {self._seconds:.0f} s, for which ddp_timeout can be raised ({error})"
            ) from error
        return told

    def first(self, value: T) -> T:
        """Rank 0's value; what the others pass does not matter."""
        return self.gather(value if self.rank == 0 else None)[0]

    def share(self, tensors: Mapping[str, Tensor] | None, source: int) -> Mapping[str, Tensor]:
        """The tensors of rank `source`; the others pass None."""
        if self.count == 1:
            return tensors
        told = self.gather(None if tensors is None else {n: (t.shape, t.dtype) for n, t in tensors.items()})[source]
        shared = {}
        for name, (shape, dtype) in told.items():
            shared[name] = torch.empty(shape, dtype=dtype) if tensors is None else tensors[name].cpu().contiguous()
            dist.broadcast(shared[name], source, group=self._group)
        return shared

    def together(self, work: Callable[[], T]) -> list[T]:
        """Every rank does its own work; what it returned, by rank.

        Raises:
            Exception: where the work of a rank failed: there the error itself, elsewhere a RuntimeError that tells it.
        """
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        told = self.gather((result, None if failure is None else f"{type(failure).__name__}: {failure}"))
        if failure is not None:
            raise failure
        for rank, (_, text) in enumerate(told):
            if text is not None:
                raise RuntimeError(f"rank {rank} failed: {text}")
        return [result for result, _ in told]

    def agree(self, digests_of: Callable[[], Mapping[str, str]], what: str) -> None:
        """Raise a RuntimeError on every rank unless all hold the same digests by name, and name the first that
        differs."""
        if self.count == 1:
            return
        digests = digests_of()
        whole = hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()
        if len(set(self.gather(whole))) == 1:
            return
        told = self.gather(dict(digests))
        names = dict.fromkeys(name for digest in told for name in digest)
        differ = [name for name in names if len({digest.get(name) for digest in told}) > 1]
        groups = {digest.get(differ[0]): rank for rank, digest in reversed(list(enumerate(told)))}
        others = f" (and {len(differ) - 1} others)" if len(differ) > 1 else ""
        raise RuntimeError(
            f"{what} of {differ[0]}{others} differ between ranks {' and '.join(map(str, sorted(groups.values())))}: "
            "start all ranks from the same weights, data, seed and number of threads, on the same kind of device"
        )


def deal_to_holders(work: Sequence[int], holders: Mapping[int, Collection[int]], ranks: int) -> list[list[int]]:
    """Share `work` out, every piece to one of those who hold it, as evenly as that allows.

    >>> deal_to_holders([0, 2, 4, 6], {0: [0, 1], 2: [0], 4: [0], 6: [0, 1]}, ranks=2)
    [[2, 4], [0, 6]]
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for piece in sorted(work, key=lambda piece: len(holders[piece])):
        shares[min(sorted(holders[piece]), key=lambda rank: len(shares[rank]))].append(piece)
    return [sorted(share) for share in shares]


def deal(work: Sequence[int], holders: Mapping[int, Collection[int]], ranks: int) -> list[list[int]]:
    """Share `work` out in shares that differ by at most one. Who holds a piece gets it, unless others would wait.

    Args:
        work: what is to be done, by number.
        holders: for each piece, the ranks that need no preparation for it.

    >>> deal([0, 2, 4, 6], {0: [0, 1], 2: [0], 4: [0], 6: [0]}, ranks=2)
    [[2, 4], [0, 6]]
    """
    least, more = divmod(len(work), ranks)
    shares: list[list[int]] = [[] for _ in range(ranks)]

    def room(rank: int) -> int:
        full = sum(len(share) > least for share in shares)
        return least + (full < more or len(shares[rank]) > least) - len(shares[rank])

    rest = []
    for piece in sorted(work, key=lambda piece: len(holders[piece])):  # what only one rank holds comes first
        free = [rank for rank in sorted(holders[piece]) if room(rank) > 0]
        if free:
            shares[min(free, key=lambda rank: len(shares[rank]))].append(piece)
        else:
            rest.append(piece)
    for piece in rest:
        shares[min(range(ranks), key=lambda rank: len(shares[rank]))].append(piece)
    return [sorted(share) for share in shares]
