"""The patterns: from scores to an exact mask, one class a pattern."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .allocation import allocate, cannot_keep, joint_masks, kept_count, only_allowed, too_few, top_k
from .base import Counts, Masks, Pattern, Tensors, counted
from .groups import Groups
from .ranking import top_k_masks
from .schedule import cubic_levels
from .sharded import Shards

SCOPES = ("layer", "balanced", "global")


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Single weights, anywhere. Its units compete in a matrix or over all of them.

    Attributes:
        scope: "layer" gives every matrix the target sparsity (as the paper on random masks does). "global" makes one
            ranking of all matrices. "balanced" lies half-way: it divides each matrix's scores by the root of their
            mean, then ranks all together.
        floor: in a joint ranking every matrix keeps at least this share of what "layer" would leave it, so that none
            is emptied; 0 switches it off.
    """

    scope: str = "layer"
    floor: float = 0.125

    scopes = SCOPES
    searchable = row_local = transposable = True
    unit = "weights"

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"scope={self.scope!r} is unknown: choose one of {', '.join(SCOPES)}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor={self.floor} must lie in [0, 1]: it is a share of the uniform allocation")

    def scoped(self, scope: str) -> Unstructured:
        """The same pattern with another scope."""
        return replace(self, scope=scope)

    def comparable(self, score: Tensor, consume: bool = False) -> Tensor:
        """The scores of one matrix as they enter the joint ranking; only "balanced" changes them."""
        if self.scope != "balanced":
            return score
        root = score.mean().sqrt()
        if not root > 0:
            return score
        return score.div_(root) if consume else score / root

    def keeps(self, shapes: Iterable[Sequence[int]], sparsity: float) -> int:
        """The exact count over all matrices together."""
        size = self.unit_size(())  # of every shape
        return kept_count(sum(math.prod(shape) // size for shape in shapes), sparsity) * size

    def shortage(self, allowed: Tensor, sparsity: float) -> str:
        """Empty: other matrices may keep more instead."""
        return ""

    def unit_masks(
        self, units: Tensors, sparsity: float, allowed: Tensors | None = None, consume: bool = False
    ) -> Masks:
        """The best of every matrix, or of all matrices together; ties by index."""
        names, scores = list(units), units
        sizes, room = counted(units, allowed)
        keep = self._keep(sizes, room, sparsity)
        if self.scope == "layer":
            quotas = allocate(keep, sizes, room)
            return {
                name: top_k_masks([only_allowed(scores[name], name, allowed, consume)], quota)[0]
                for name, quota in zip(names, quotas, strict=True)
            }
        ranked = []
        for name in names:
            score = scores[name]
            if self.scope == "balanced" and allowed is not None:  # a pruned weight counts as 0 in the mean
                pruned = allowed[name].logical_not()
                score = score.masked_fill_(pruned, 0) if consume else score.masked_fill(pruned, 0)
            score = self.comparable(score, consume)
            ranked.append(only_allowed(score, name, allowed, consume or score is not scores[name]))
        return dict(zip(names, joint_masks(ranked, keep, self._floors(keep, sizes, room), top_k), strict=True))

    def _keep(self, sizes: Sequence[int], room: Sequence[int], sparsity: float) -> int:
        """How many units all matrices keep together; a ValueError if fewer are allowed."""
        keep = kept_count(sum(sizes), sparsity)
        if keep > sum(room):
            raise ValueError(too_few(keep, sum(room), self.unit))
        return keep

    def _floors(self, keep: int, sizes: Sequence[int], room: Sequence[int]) -> list[int]:
        """How many entries each matrix keeps at least in a joint ranking of `keep`; room: entries allowed."""
        uniform = allocate(keep, sizes, sizes)
        return [min(left, math.ceil(self.floor * share)) for left, share in zip(room, uniform, strict=True)]

    def sharded_unit_masks(
        self, units: Tensors, sparsity: float, shards: Shards, allowed: Tensors | None = None, counts: Counts = None
    ) -> Masks:
        """`unit_masks` from all-reduced counts."""
        names, scores = list(units), units
        sizes, room = counted(units, allowed, shards) if counts is None else counts
        keep = self._keep(sizes, room, sparsity)
        ranked = [only_allowed(scores[name], name, allowed, consume=False) for name in names]
        if self.scope == "layer":
            by_matrix, _ = shards.top_k_masks([[score] for score in ranked], allocate(keep, sizes, room))
            return {name: mask for name, (mask,) in zip(names, by_matrix, strict=True)}
        floors = self._floors(keep, sizes, room)
        if self.scope == "balanced":
            roots = _roots_of_means(scores, sizes, shards, allowed)
            ranked = [score / root for score, root in zip(ranked, roots, strict=True)]
        return dict(zip(names, joint_masks(ranked, keep, floors, shards.top_k_masks), strict=True))


def _roots_of_means(scores: Tensors, sizes: Sequence[int], shards: Shards, allowed: Tensors | None) -> Tensor:
    """The root of each matrix's mean score (float32), with pruned weights as zeros; 1 where that is not above 0."""
    sums = []
    for name, score in scores.items():
        in_force = score if allowed is None else score.masked_fill(allowed[name].logical_not(), 0)
        sums.append(in_force.sum(dtype=torch.float64))
    total = shards.add(torch.stack(sums))
    roots = (total / torch.tensor(sizes, device=total.device)).to(torch.float32).sqrt()
    return torch.where(roots > 0, roots, 1.0)


@dataclass(frozen=True)
class NM(Pattern):
    """At most `n` of every `m` consecutive weights along the input axis (see `Groups.view`)."""

    n: int
    m: int

    searchable = row_local = True

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(f"pattern '{self.n}:{self.m}' must keep N of M with 0 < N < M, as in '2:4'")

    def view(self, tensor: Tensor) -> Tensor:
        """A view whose last axis runs through one group, over which a threshold of the group broadcasts."""
        return self.groups.view(tensor)

    @property
    def sparsity(self) -> float:
        """1 - n / m."""
        return 1 - self.n / self.m

    @property
    def groups(self) -> Groups:
        """The groups at the target."""
        return Groups(self.n, self.m)

    def at(self, sparsity: float) -> Groups:
        """The groups of a level, which keep `m` down to `n` weights."""
        return Groups(self.m - round(sparsity * self.m), self.m)

    def levels(self, sparsity: float, num_levels: int | None = None) -> list[float]:
        """Levels at which groups lose whole weights, one by default. Equal levels are merged."""
        zeros = {max(1, round(level * self.m)) for level in cubic_levels(sparsity, num_levels or 1)}
        return [count / self.m for count in sorted(zeros)[:-1]] + [sparsity]

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raise a ValueError if the input axis does not consist of whole groups."""
        inputs = shape[1] if len(shape) > 2 else shape[-1]
        if inputs % self.m:
            raise ValueError(
                f"pattern '{self.n}:{self.m}' does not fit {name}: its {inputs} columns are no multiple of {self.m}; "
                "leave the module out with exclude_modules or choose another M"
            )

    def check_sparsity(self, sparsity: float) -> None:
        """Raise a ValueError unless `sparsity` is a multiple of 1/M up to the target."""
        zeros = sparsity * self.m
        if abs(zeros - round(zeros)) > 1e-9 or not 0 <= round(zeros) <= self.m - self.n:
            raise ValueError(
                f"sparsity {sparsity} is not possible with pattern '{self.n}:{self.m}': choose a multiple of "
                f"1/{self.m} up to {self.sparsity:g}"
            )

    def keeps(self, shapes: Iterable[Sequence[int]], sparsity: float) -> int:
        """The same count in every group."""
        return sum(math.prod(shape) // self.m * self.at(sparsity).keep for shape in shapes)

    def holds(self, mask: Tensor, sparsity: float) -> bool:
        """Whether no group keeps more than its count."""
        return not self.at(sparsity).exceeded(mask)

    def shortage(self, allowed: Tensor, sparsity: float) -> str:
        """Words for groups with fewer weights left than they keep."""
        return self._too_few_left(self.at(sparsity).short(allowed), sparsity)

    def _too_few_left(self, short: int, sparsity: float) -> str:
        words = f"{short} of its groups of {self.m} have fewer than {self.at(sparsity).keep} weights left"
        return words if short else ""

    def unit_masks(
        self, units: Tensors, sparsity: float, allowed: Tensors | None = None, consume: bool = False
    ) -> Masks:
        """The best of every group, ties by index."""
        self.check_sparsity(sparsity)
        masks = {}
        for name, score in units.items():
            if allowed is not None and (short := self.shortage(allowed[name], sparsity)):
                raise ValueError(cannot_keep(name, short))
            masks[name] = self.at(sparsity).best(only_allowed(score, name, allowed, consume))
        return masks

    def sharded_unit_masks(
        self, units: Tensors, sparsity: float, shards: Shards, allowed: Tensors | None = None, counts: Counts = None
    ) -> Masks:
        """`unit_masks` of the local rows, since a group lies within a row; all processes raise if one of them does."""
        left = allowed or {}
        short = shards.sums([self.at(sparsity).short(mask) for mask in left.values()]) if left else []
        for name, count in zip(left, short, strict=True):
            if count:
                raise ValueError(cannot_keep(name, self._too_few_left(count, sparsity)))
        return self.unit_masks(units, sparsity, allowed)


@dataclass(frozen=True)
class Channel(Pattern):
    """Whole output channels, at least one per matrix: the rows of a linear weight, the filters of a convolution."""

    row_local = True
    unit = "rows"

    def unit_axes(self, dim: int) -> tuple[int, ...]:
        """All but the first."""
        return tuple(range(1, dim))

    def kept_units(self, units: int, sparsity: float) -> int:
        """How many of a matrix's rows stay: at least one."""
        return max(1, kept_count(units, sparsity))


@dataclass(frozen=True)
class Blocks(Unstructured):
    """Blocks of `rows` neighbouring outputs and `columns` neighbouring inputs, kept or pruned whole.

    A block's score is the sum of its weights' scores. The blocks of a convolution lie along its channels, at one place
    of the kernel, as the groups of `NM` do. Counts, scopes and floors are those of `Unstructured`, in blocks.

    Attributes:
        scope, floor: as in `Unstructured`.
        rows: outputs of a block.
        columns: inputs of a block.
    """

    rows: int = 1
    columns: int = 4

    transposable = False
    unit = "blocks"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows < 1 or self.columns < 1 or self.rows * self.columns == 1:
            raise ValueError(
                f"pattern '{self}' must be blocks of at least two weights, as in '1x4': for "
                "single weights use 'unstructured'"
            )

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"

    @property
    def row_local(self) -> bool:  # type: ignore[override]
        """Whether a block lies within a row."""
        return self.rows == 1

    def unit_axes(self, dim: int) -> tuple[int, ...]:
        """The rows and the columns of a block."""
        return (1, 3)

    def view(self, tensor: Tensor) -> Tensor:
        """A view of shape `(out / rows, rows, in / columns, columns, ...)`."""
        return tensor.unflatten(1, (-1, self.columns)).unflatten(0, (-1, self.rows))

    def unit_size(self, shape: Sequence[int]) -> int:
        """Number of weights of a block, whatever the shape."""
        return self.rows * self.columns

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raise a ValueError if a weight of this shape does not consist of whole blocks."""
        for axis, size, length in (("rows", shape[0], self.rows), ("columns", shape[1], self.columns)):
            if size % length:
                raise ValueError(
                    f"pattern '{self}' does not fit {name}: its {size} {axis} are no multiple of "
                    f"{length}; leave the module out with exclude_modules or choose other blocks"
                )

    def unit_scores(self, score: Tensor) -> Tensor:
        """The sum of each block's scores, flat."""
        # In double precision, where the order of the addends hardly matters: a process may hold only some of the rows.
        return self.view(score.contiguous()).sum((1, 3), dtype=torch.float64).float().flatten()


# A regex of the pattern's name -> the pattern, from the match, the scope and the floor of joint rankings.
PATTERNS: dict[str, Callable[[re.Match, str, float], Pattern]] = {
    "unstructured": lambda match, scope, floor: Unstructured(scope, floor),
    "channel": lambda match, scope, floor: Channel(),
    r"(\d+)x(\d+)": lambda match, scope, floor: Blocks(scope, floor, int(match[1]), int(match[2])),
    r"(\d+):(\d+)": lambda match, scope, floor: NM(int(match[1]), int(match[2])),
}


def parse_pattern(text: str, scope: str = "layer", floor: float = 0.125) -> Pattern:
    """The pattern that a text names: `"unstructured"`, `"channel"`, `"N:M"` or `"RxC"`; a ValueError for others."""
    for name, make in PATTERNS.items():
        if match := re.fullmatch(name, text):
            return make(match, scope, floor)
    raise ValueError(
        f"pattern={text!r} is unknown: use 'unstructured', 'channel' or 'N:M' such as '2:4', or 'RxC' such as '1x4'"
    )
