"""From scores to an exact mask. One class a pattern; each knows how many entries it keeps and where they may lie."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .ranking import top_k_masks

SCOPES = ("layer", "balanced", "global")


class Pattern(Protocol):
    """What a pattern offers."""

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raise a ValueError when a weight of this shape cannot hold the pattern."""

    def check_sparsity(self, sparsity: float) -> None:
        """Raise a ValueError when the pattern cannot have this sparsity."""

    def keeps(self, shapes: Iterable[Sequence[int]], sparsity: float) -> int:
        """How many weights of matrices of these shapes stay at `sparsity`, to the exact count."""

    def holds(self, mask: Tensor, sparsity: float) -> bool:
        """Whether one boolean mask has the pattern of `sparsity`, however many weights it keeps in all: no group keeps
        more than its share, no row is kept in part."""

    def shortage(self, alive: Tensor, sparsity: float) -> str:
        """Why one matrix cannot keep its exact count at `sparsity` among the weights that are `alive` (boolean), in
        words; empty where it can, or where other matrices may keep more instead."""

    def masks(
        self,
        scores: Mapping[str, Tensor],
        sparsity: float,
        alive: Mapping[str, Tensor] | None = None,
        consume: bool = False,
    ) -> dict[str, Tensor]:
        """Boolean masks (True = kept) by name, shaped like the scores, with the exact count of zeros.

        `scores`: float32, larger = more important; `alive`: masks of an earlier level, whose dead weights never
        return; `consume`: the scores may be overwritten, which saves a copy of them. A ValueError where too few
        are alive.
        """


def kept_count(total: int, sparsity: float) -> int:
    """How many of `total` weights stay at `sparsity` (a fraction in [0, 1)): the zeros are `round(total *
    sparsity)`."""
    return total - round(total * sparsity)


def allocate(keep: int, sizes: Sequence[int], capacities: Sequence[int]) -> list[int]:
    """Share `keep` over matrices in proportion to `sizes`, none above its capacity, the sum exact.

    Matrices that cannot take their share are filled and their rest is shared again; fractions go to the largest
    remainders, ties by index.
    """
    if keep > sum(capacities):
        raise ValueError(_too_few(keep, sum(capacities)))
    quotas = [0] * len(sizes)
    open_ = list(range(len(sizes)))
    left = keep
    while True:
        weight = sum(sizes[i] for i in open_)
        full = [i for i in open_ if left * sizes[i] >= capacities[i] * weight]
        if not full:
            break
        for i in full:
            quotas[i] = capacities[i]
            left -= capacities[i]
        open_ = [i for i in open_ if i not in full]
        if not open_:
            return quotas
    for i in open_:
        quotas[i] = left * sizes[i] // weight
    by_remainder = sorted(open_, key=lambda i: (-(left * sizes[i] % weight), i))
    for i in by_remainder[: left - sum(quotas[i] for i in open_)]:
        quotas[i] += 1
    return quotas


def _too_few(keep: int, alive: int) -> str:
    return f"cannot keep {keep} weights: only {alive} are left alive; ask for a higher sparsity"


def _cannot_keep(name: str, shortage: str) -> str:
    return f"{name} cannot keep its share: {shortage}; ask for a higher sparsity, or let dead weights return"


@dataclass(frozen=True)
class Unstructured:
    """Single weights, anywhere.

    scope: "layer" gives every matrix the target sparsity (method 1's paper); "global" makes one ranking of all
    matrices; "balanced" lies half-way: each matrix's scores are divided by the root of their mean, then ranked
        together.
    floor: in a joint ranking every matrix keeps at least this share of what "layer" would leave it, so that
    none is emptied (0.125 by default; 0 switches it off).
    """

    scope: str = "layer"
    floor: float = 0.125

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"scope={self.scope!r} is unknown: choose one of {', '.join(SCOPES)}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor={self.floor} must lie in [0, 1]: it is a share of the uniform allocation")

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Every shape can hold it."""

    def check_sparsity(self, sparsity: float) -> None:
        """Every sparsity is possible."""

    def keeps(self, shapes: Iterable[Sequence[int]], sparsity: float) -> int:
        return kept_count(sum(math.prod(shape) for shape in shapes), sparsity)

    def holds(self, mask: Tensor, sparsity: float) -> bool:
        return True

    def shortage(self, alive: Tensor, sparsity: float) -> str:
        return ""

    def masks(
        self,
        scores: Mapping[str, Tensor],
        sparsity: float,
        alive: Mapping[str, Tensor] | None = None,
        consume: bool = False,
    ) -> dict[str, Tensor]:
        names = list(scores)
        keep = kept_count(sum(s.numel() for s in scores.values()), sparsity)
        sizes = [scores[name].numel() for name in names]
        room = sizes if alive is None else [int(torch.count_nonzero(alive[name])) for name in names]
        if self.scope == "layer":
            quotas = allocate(keep, sizes, room)
            return {
                name: top_k_masks([_without_dead(scores[name], name, alive, consume)], quota)[0]
                for name, quota in zip(names, quotas, strict=True)
            }
        ranked = []
        for name in names:
            score = scores[name]
            if self.scope == "balanced" and alive is not None:  # the mean is that of the weights in force
                dead = alive[name].logical_not()
                score = score.masked_fill_(dead, 0) if consume else score.masked_fill(dead, 0)
            score = self.comparable(score, consume)
            ranked.append(_without_dead(score, name, alive, consume or score is not scores[name]))
        if keep > sum(room):
            raise ValueError(_too_few(keep, sum(room)))
        return dict(zip(names, joint_masks(ranked, keep, self.floors(keep, sizes, room), _top_k), strict=True))

    def floors(self, keep: int, sizes: Sequence[int], room: Sequence[int]) -> list[int]:
        """How many entries each matrix keeps at least in a joint ranking of `keep`; room: entries alive."""
        uniform = allocate(keep, sizes, sizes)
        return [min(alive, math.ceil(self.floor * share)) for alive, share in zip(room, uniform, strict=True)]

    def comparable(self, score: Tensor, consume: bool = False) -> Tensor:
        """One matrix's scores as they enter the joint ranking (only "balanced" changes them; in place if
        `consume`)."""
        if self.scope != "balanced":
            return score
        root = score.mean().sqrt()
        if not root > 0:
            return score
        return score.div_(root) if consume else score / root


# (pools of scores, how many of each stay) -> masks, and how many entries of each tensor stay, by pool
TopK = Callable[[Sequence[Sequence[Tensor]], Sequence[int]], tuple[list[list[Tensor]], list[list[int]]]]


def _top_k(pools: Sequence[Sequence[Tensor]], ks: Sequence[int]) -> tuple[list[list[Tensor]], list[list[int]]]:
    masks = [top_k_masks(pool, k) for pool, k in zip(pools, ks, strict=True)]
    return masks, [[int(torch.count_nonzero(mask)) for mask in pool] for pool in masks]


def joint_masks(scores: list[Tensor], keep: int, floors: Sequence[int], top_k: TopK) -> list[Tensor]:
    """One ranking of all matrices; those that would fall below their floor keep their own best, the rest is ranked
    again."""
    open_, own = list(range(len(scores))), []
    while True:
        (joint,), (counts,) = top_k([[scores[i] for i in open_]], [keep])
        short = [i for i, count in zip(open_, counts, strict=True) if count < floors[i]]
        if not short:
            break
        own += short
        keep -= sum(floors[i] for i in short)
        open_ = [i for i in open_ if i not in short]
    best, _ = top_k([[scores[i]] for i in own], [floors[i] for i in own])
    masks = dict(zip(open_, joint, strict=True)) | {i: mask for i, (mask,) in zip(own, best, strict=True)}
    return [masks[i] for i in range(len(scores))]


def _without_dead(score: Tensor, name: str, alive: Mapping[str, Tensor] | None, consume: bool) -> Tensor:
    score = score.contiguous()
    if alive is None:
        return score
    if consume:
        return score.masked_fill_(alive[name].logical_not(), float("-inf"))
    return torch.where(alive[name], score, float("-inf"))


def grouped(tensor: Tensor, size: int) -> Tensor:
    """A view with `size` consecutive entries along the input axis as its last dimension. The input axis is the
    reduction axis of the GEMM: the last one of a linear weight, the channels (axis 1) of a convolution."""
    last = tensor.movedim(1, -1) if tensor.dim() > 2 else tensor
    return last.unflatten(-1, (-1, size))


@dataclass(frozen=True)
class NM:
    """At most `n` of every `m` consecutive weights along the input axis (see `grouped`)."""

    n: int
    m: int
    scope: str = "layer"  # every group keeps the same count, so every matrix does

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(f"pattern '{self.n}:{self.m}' must keep N of M with 0 < N < M, as in '2:4'")

    @property
    def sparsity(self) -> float:
        """1 - n / m."""
        return 1 - self.n / self.m

    def check(self, name: str, shape: Sequence[int]) -> None:
        inputs = shape[1] if len(shape) > 2 else shape[-1]
        if inputs % self.m:
            raise ValueError(
                f"pattern '{self.n}:{self.m}' does not fit {name}: its {inputs} columns are no multiple of {self.m}; "
                "leave the module out with exclude_modules or choose another M"
            )

    def check_sparsity(self, sparsity: float) -> None:
        zeros = sparsity * self.m
        if abs(zeros - round(zeros)) > 1e-9 or not 0 <= round(zeros) <= self.m - self.n:
            raise ValueError(
                f"sparsity {sparsity} is not possible with pattern '{self.n}:{self.m}': choose a multiple of "
                f"1/{self.m} up to {self.sparsity:g}"
            )

    def of_group(self, sparsity: float) -> int:
        """How many weights of a group stay."""
        return self.m - round(sparsity * self.m)

    def keeps(self, shapes: Iterable[Sequence[int]], sparsity: float) -> int:
        return sum(math.prod(shape) // self.m * self.of_group(sparsity) for shape in shapes)

    def holds(self, mask: Tensor, sparsity: float) -> bool:
        return not bool((grouped(mask, self.m).sum(-1) > self.of_group(sparsity)).any())

    def short_groups(self, alive: Tensor, sparsity: float) -> int:
        """How many groups have fewer weights alive than they keep."""
        if bool(alive.all()):
            return 0
        return int(torch.count_nonzero(grouped(alive, self.m).sum(-1) < self.of_group(sparsity)))

    def shortage(self, alive: Tensor, sparsity: float) -> str:
        short = self.short_groups(alive, sparsity)
        return self.too_few(short, sparsity) if short else ""

    def too_few(self, short: int, sparsity: float) -> str:
        """The words of `shortage`."""
        return f"{short} of its groups of {self.m} have fewer than {self.of_group(sparsity)} living weights"

    def masks(
        self,
        scores: Mapping[str, Tensor],
        sparsity: float,
        alive: Mapping[str, Tensor] | None = None,
        consume: bool = False,
    ) -> dict[str, Tensor]:
        self.check_sparsity(sparsity)
        keep = self.of_group(sparsity)
        masks = {}
        for name, score in scores.items():
            self.check(name, score.shape)
            if alive is not None and (short := self.shortage(alive[name], sparsity)):
                raise ValueError(_cannot_keep(name, short))
            groups = grouped(_without_dead(score, name, alive, consume), self.m)
            mask = _best_of_groups(groups.reshape(-1, self.m), keep).view(groups.shape).flatten(-2)
            masks[name] = mask.movedim(-1, 1).contiguous() if mask.dim() > 2 else mask
        return masks


@dataclass(frozen=True)
class Channel:
    """Whole output channels: the rows of a linear weight, the filters of a convolution. Every matrix keeps the same
    share of them, rounded, and at least one. A row is scored by the L2 norm of its scores."""

    scope: str = "layer"

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Every shape can hold it."""

    def check_sparsity(self, sparsity: float) -> None:
        """Every sparsity is possible."""

    @staticmethod
    def rows(shape: Sequence[int], sparsity: float) -> int:
        """How many rows of a weight of this shape stay."""
        return max(1, kept_count(shape[0], sparsity))

    def keeps(self, shapes: Iterable[Sequence[int]], sparsity: float) -> int:
        return sum(self.rows(shape, sparsity) * math.prod(shape[1:]) for shape in shapes)

    def holds(self, mask: Tensor, sparsity: float) -> bool:
        rows = mask.flatten(1)
        return torch.equal(rows.all(1), rows.any(1))

    def shortage(self, alive: Tensor, sparsity: float) -> str:
        whole, keep = int(torch.count_nonzero(alive.flatten(1).all(1))), self.rows(alive.shape, sparsity)
        return self.too_few(whole, keep) if whole < keep else ""

    @staticmethod
    def too_few(whole: int, keep: int) -> str:
        """The words of `shortage`."""
        return f"{keep} of its rows must stay whole, and only {whole} have no dead weight"

    def masks(
        self,
        scores: Mapping[str, Tensor],
        sparsity: float,
        alive: Mapping[str, Tensor] | None = None,
        consume: bool = False,
    ) -> dict[str, Tensor]:
        masks = {}
        for name, score in scores.items():
            if alive is not None and (short := self.shortage(alive[name], sparsity)):
                raise ValueError(_cannot_keep(name, short))
            kept = top_k_masks([self.norms(name, score, alive)], self.rows(score.shape, sparsity))[0]
            masks[name] = self.spread(kept, score)
        return masks

    @staticmethod
    def norms(name: str, score: Tensor, alive: Mapping[str, Tensor] | None) -> Tensor:
        """What rows are ranked by; one with a dead weight comes last, for it cannot be kept whole."""
        norms = score.flatten(1).norm(dim=1)
        return norms if alive is None else norms.masked_fill_(~alive[name].flatten(1).all(1), float("-inf"))

    @staticmethod
    def spread(kept: Tensor, score: Tensor) -> Tensor:
        """The mask of a matrix from that of its rows."""
        return kept.view(-1, *[1] * (score.dim() - 1)).expand_as(score).contiguous()


def _best_of_groups(groups: Tensor, keep: int) -> Tensor:
    """Mask of the `keep` largest per row of `groups` (rows, m), ties by index."""
    size = groups.shape[1]
    if (keep, size) == (2, 4):
        return _two_of_four(groups)
    if size > 16:  # pairwise comparisons grow with the square of the group
        best = groups.argsort(dim=1, descending=True, stable=True)[:, :keep]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True)
    columns = [column.contiguous() for column in groups.unbind(1)]
    beaten = [torch.zeros(groups.shape[0], dtype=torch.int8, device=groups.device) for _ in columns]
    for i in range(size):
        for j in range(i + 1, size):
            later_wins = columns[j] > columns[i]
            beaten[i] += later_wins
            beaten[j] += later_wins.logical_not_()
    return torch.stack([count < keep for count in beaten], dim=1)


def _two_of_four(groups: Tensor) -> Tensor:
    """The same for two of four, in four comparisons instead of six; these are what the time goes into. Unless the
    worse of one pair beats the better of the other, the better of each pair stay."""
    a, b, c, d = (column.contiguous() for column in groups.unbind(1))
    b_better, d_better = b > a, d > c
    first_pair = torch.minimum(a, b) >= torch.maximum(c, d)
    second_pair = torch.minimum(c, d) > torch.maximum(a, b)
    mask = torch.empty_like(groups, dtype=torch.bool)
    for i, better, both, none in ((0, b_better, first_pair, second_pair), (2, d_better, second_pair, first_pair)):
        mask[:, i + 1] = better.logical_and(none.logical_not()).logical_or_(both)
        mask[:, i] = better.logical_or_(none).logical_not_().logical_or_(both)
    return mask


def parse_pattern(text: str, scope: str = "layer", floor: float = 0.125) -> Unstructured | NM | Channel:
    """`"unstructured"`, `"N:M"` or `"channel"` -> the pattern.

    Raises:
        ValueError: the name is unknown, or N >= M.
    """
    if text == "unstructured":
        return Unstructured(scope, floor)
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(match[1]), int(match[2]))
    if text == "channel":
        return Channel()
    raise ValueError(f"pattern={text!r} is unknown: use 'unstructured', 'channel' or 'N:M' such as '2:4'")
