"""Exchange small values between the processes of one run, and divide work among them."""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Processes:
    """This process and the others of the run; a run without torch.distributed has one process.

    The processes exchange Python objects of a few hundred bytes in a gloo group of their own. Trials take minutes, and
    the training backend (NCCL and its watchdog) would not wait that long. `rank` is the number of this process, from 0
    to `count` - 1.
    """

    def __init__(self) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.count = dist.get_world_size() if distributed else 1
        self._group: dist.ProcessGroup | None = None
        self._seconds = 0.0

    def open(self, seconds: float) -> None:
        """Create the group; a process waits at most `seconds` for the others. All processes must call it together."""
        if self.count == 1:
            return
        if self._group is not None:
            dist.destroy_process_group(self._group)
        self._seconds = seconds
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, ordered by rank.

        Raises:
            RuntimeError: a process has died, or did not answer within the time given to `open`.
        """
        if self.count == 1:
            return [value]
        values: list = [None] * self.count
        try:
            dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} got no answer from the other ranks: one of them died (see its log), or was busy "
                f"for more than {self._seconds:.0f} s (raise ddp_timeout) ({error})"
            ) from error
        return values

    def first(self, value: T) -> T:
        """Return the value of rank 0; the values of the other processes are ignored."""
        return cast(T, self.gather(value if self.rank == 0 else None)[0])

    def share(self, tensors: Mapping[str, Tensor] | None, source: int) -> Mapping[str, Tensor]:
        """Send tensors by name from rank `source` to all processes, which pass None and receive them on the CPU."""
        if self.count == 1:
            assert tensors is not None
            return tensors
        layout = None if tensors is None else {name: (t.shape, t.dtype) for name, t in tensors.items()}
        layout, shared = self.gather(layout)[source], {}
        assert layout is not None
        for name, (shape, dtype) in layout.items():
            shared[name] = torch.empty(shape, dtype=dtype) if tensors is None else tensors[name].cpu().contiguous()
            dist.broadcast(shared[name], source, group=self._group)
        return shared

    def together(self, work: Callable[[], T]) -> list[T]:
        """Run `work` in every process and return the results ordered by rank.

        Raises:
            Exception: the error of `work` in the process where it failed, and a RuntimeError that quotes it in the
                others.
        """
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        outcomes = self.gather((result, None if failure is None else f"{type(failure).__name__}: {failure}"))
        if failure is not None:
            raise failure
        for rank, (_, message) in enumerate(outcomes):
            if message is not None:
                raise RuntimeError(f"rank {rank} failed: {message}")
        return [cast(T, result) for result, _ in outcomes]

    def agree(self, digests_of: Callable[[], Mapping[str, str]], what: str) -> None:
        """Raise a RuntimeError in every process unless all hold the same digests by name.

        The message names the things compared (`what`) and the first name that differs. A single process computes none.
        """
        if self.count == 1:
            return
        digests = digests_of()
        total = hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()
        if len(set(self.gather(total))) == 1:
            return
        by_rank = self.gather(dict(digests))
        names = dict.fromkeys(name for digest in by_rank for name in digest)
        differ = [name for name in names if len({digest.get(name) for digest in by_rank}) > 1]
        groups = {digest.get(differ[0]): rank for rank, digest in reversed(list(enumerate(by_rank)))}
        others = f" (and {len(differ) - 1} others)" if len(differ) > 1 else ""
        raise RuntimeError(
            f"{what} of {differ[0]}{others} differ between ranks {' and '.join(map(str, sorted(groups.values())))}: "
            "start all ranks from the same weights, data, seed and number of threads, on the same kind of device"
        )


def deal_to_holders(work: Sequence[int], holders: Mapping[int, Collection[int]], ranks: int) -> list[list[int]]:
    """Divide `work` among `ranks` processes, each piece to one of its holders, as evenly as possible.

    >>> deal_to_holders([0, 2, 4, 6], {0: [0, 1], 2: [0], 4: [0], 6: [0, 1]}, ranks=2)
    [[2, 4], [0, 6]]
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for piece in sorted(work, key=lambda piece: len(holders[piece])):
        shares[min(sorted(holders[piece]), key=lambda rank: len(shares[rank]))].append(piece)
    return [sorted(share) for share in shares]


def deal(work: Sequence[int], holders: Mapping[int, Collection[int]], ranks: int) -> list[list[int]]:
    """Divide `work` among processes in shares that differ by at most one piece, to holders where that allows it.

    holders: for each piece of `work`, the ranks that need no preparation for it.

    >>> deal([0, 2, 4, 6], {0: [0, 1], 2: [0], 4: [0], 6: [0]}, ranks=2)
    [[2, 4], [0, 6]]
    """
    least, more = divmod(len(work), ranks)
    shares: list[list[int]] = [[] for _ in range(ranks)]

    def room(rank: int) -> int:
        full = sum(len(share) > least for share in shares)
        return least + (full < more or len(shares[rank]) > least) - len(shares[rank])

    rest = []
    for piece in sorted(work, key=lambda piece: len(holders[piece])):  # pieces with a single holder come first
        free = [rank for rank in sorted(holders[piece]) if room(rank) > 0]
        if free:
            shares[min(free, key=lambda rank: len(shares[rank]))].append(piece)
        else:
            rest.append(piece)
    for piece in rest:
        shares[min(range(ranks), key=lambda rank: len(shares[rank]))].append(piece)
    return [sorted(share) for share in shares]
