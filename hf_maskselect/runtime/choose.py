"""Time the products on this machine, and choose the fastest for each number of rows."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..utils.clock import least_seconds
from .kernels import BLOCK, BLOCK_KINDS, INT8_KINDS, ZERO_KINDS, missing, quantized_rows
from .linears import Choice, Int8Linear, Int8Plan, Step, exact_linear

Times = dict[int, dict[str, float]]  # rows -> kind -> seconds
# The least share of zeros, or of zero blocks, at which a sparse product is tried.
_SPARSE = {"csr": 0.6, "numba": 0.4, "1x4": 0.4, "numba-1x4": 0.2}
_SECONDS = 0.1  # time spent on one kind at one number of rows
_BYTES = {  # that a weight takes; of sparse products those of a weight that is kept, and of its place
    "dense": 4.0,
    "onednn": 4.0,
    "bf16": 2.0,
    "int8": 1.0,
    "csr": 8.0,
    "numba": 6.0,
    "1x4": 1.5,
    "numba-1x4": 1.5,
}


def zeros_of(weight: Tensor, kind: str) -> float:
    """Return the share of a matrix's entries that a sparse product skips; 0 for dense products."""
    if kind in BLOCK_KINDS and weight.shape[1] % BLOCK == 0:
        return float((weight.reshape(-1, BLOCK) == 0).all(1).float().mean())
    return float((weight == 0).float().mean()) if kind in ZERO_KINDS else 0.0


def usable(weight: Tensor, kinds: Sequence[str]) -> list[str]:
    """Return those of the kinds that work here and may pay for this matrix."""
    return [kind for kind in kinds if not missing(kind) and zeros_of(weight, kind) >= _SPARSE.get(kind, 0.0)]


class Timer:
    """Times kinds of products. Matrices of one shape and nearly one sparsity are timed once."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = sorted(set(counts))
        self._times: dict[tuple, dict[int, float]] = {}

    def times(self, weight: Tensor, kinds: Sequence[str]) -> Times:
        """Return the seconds of each kind at each number of rows."""
        keys = {kind: (kind, *weight.shape, round(zeros_of(weight, kind) * 20)) for kind in kinds}
        new = {kind: built(kind, weight) for kind, key in keys.items() if key not in self._times}
        for count in self.counts if new else ():
            rows = torch.randn(count, weight.shape[1])
            jobs = {kind: (lambda linear=linear, rows=rows: linear(rows)) for kind, linear in new.items()}
            for kind, seconds in least_seconds(jobs, _SECONDS).items():
                self._times.setdefault(keys[kind], {})[count] = seconds
        return {count: {kind: self._times[key][count] for kind, key in keys.items()} for count in self.counts}


def built(kind: str, weight: Tensor) -> nn.Module:
    """Build a layer of one kind, to be timed."""
    choice, weight = Choice.always(kind), weight.detach()
    if kind not in INT8_KINDS:
        return exact_linear(choice, weight, torch.zeros(len(weight)))
    step = Step(0.03, 128)
    return Int8Linear(Int8Plan(choice, *quantized_rows(weight), torch.zeros(len(weight)), step, step))


def fastest(times: Times, weight: Tensor) -> Choice:
    """Choose the fastest kind for each number of rows.

    If the forms of several kinds take more memory than float32, one kind is chosen: that which loses least to the
    fastest, summed over the numbers of rows, among those that are nowhere slower than the best dense kind.
    """
    best = {count: min(by_kind, key=by_kind.__getitem__) for count, by_kind in sorted(times.items())}
    names = set(best.values())
    if sum(_bytes(kind, weight) for kind in names) > 4 or len(names) == 1:
        return Choice.always(_one_kind(times))
    kinds: list[tuple[int, str]] = []
    for count, kind in best.items():
        if kinds and kinds[-1][1] == kind:
            kinds.pop()
        kinds.append((count, kind))
    return Choice(tuple(kinds))


def _one_kind(times: Times) -> str:
    def loss(kind: str) -> tuple[bool, float]:
        ratios = [by_kind[kind] / min(by_kind.values()) for by_kind in times.values()]
        dense = [
            min((s for k, s in by_kind.items() if k not in _SPARSE), default=float("inf"))
            for by_kind in times.values()
        ]
        slower = any(by_kind[kind] > best for by_kind, best in zip(times.values(), dense, strict=True))
        return slower, sum(ratios)

    return min(next(iter(times.values())), key=loss)


def _bytes(kind: str, weight: Tensor) -> float:
    """Return the bytes that a weight of the matrix takes on average."""
    return _BYTES[kind] * (1 - zeros_of(weight, kind))
