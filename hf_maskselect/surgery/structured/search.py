"""The search for the shape: which layers go, how many, and how many heads stay, at a width that meets the target.

Which layer goes matters most, so each is first removed alone. Larger sets are made of the layers that are missed
least. Then one layer or some heads are exchanged at random in the best shapes so far. A candidate is scored as fitted.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from .shapes import STEP, Encoder, Shape

WidthOf = Callable[[tuple[int, ...], int], int]
_ROOM = 5  # layers are compared with at least a fifth of their width, if that takes no more than fewer heads
_PATIENCE = 2  # depths in a row that are worse than the best, after which the sets do not grow on
_DRAWS = 500  # exchanges in a row that were all tried before


@dataclass(frozen=True)
class Candidate:
    """A shape that was tried, and the divergence of its outputs on held-out rows, as fitted."""

    shape: Shape
    divergence: float


class ShapeSearch:
    """Tries shapes that meet a target.

    Args:
        encoder: the dense sizes.
        first_stays: the first layer cannot go.
        cuts_heads: heads may go.
        width_of: the largest width that meets the target, for layers that stay and a number of heads; below 8 if none.
        evaluate: fits a model of a shape and returns its divergence.
        count: number of candidates.
        seed: of the random exchanges.
    """

    def __init__(
        self,
        encoder: Encoder,
        first_stays: bool,
        cuts_heads: bool,
        width_of: WidthOf,
        evaluate: Callable[[Shape], float],
        count: int,
        seed: int,
    ) -> None:
        self._encoder, self._width_of, self._evaluate = encoder, width_of, evaluate
        self._first_stays, self._cuts_heads, self._count = first_stays, cuts_heads, count
        self._random = random.Random(seed)
        self.tried: dict[Shape, float] = {}

    def run(self) -> list[Candidate]:
        """Return the candidates, the best first; an empty list if no shape meets the target."""
        depths = self._depths()
        if not depths:
            return []
        ranking = self._ranked(depths)
        worse = 0
        for gone in depths:
            before = min(self.tried.values(), default=float("inf"))
            tries = [self._try(ranking[:gone], heads) for heads in self._shares()]
            scores = [score for score in tries if score is not None]
            worse = worse + 1 if scores and min(scores) > before else 0
            if worse == _PATIENCE:
                break
        idle = 0
        while len(self.tried) < self._count and idle < _DRAWS:
            idle = idle + 1 if self._try(*self._changed(self._parent(), ranking, depths)) is None else 0
        return [Candidate(*each) for each in sorted(self.tried.items(), key=lambda each: each[1])]

    def _depths(self) -> list[int]:
        """Return how many layers may go: from where a width meets the target, to where the full width does."""
        encoder, depths = self._encoder, []
        for gone in range(1 if encoder.shared else encoder.depth):
            widths = [self._width_of(tuple(range(encoder.depth - gone)), heads) for heads in self._head_counts()]
            if max(widths) >= STEP:
                depths.append(gone)
            if widths[-1] == encoder.width:
                break
        return depths

    def _head_counts(self) -> list[int]:
        return list(range(1, self._encoder.heads + 1)) if self._cuts_heads else [self._encoder.heads]

    def _shares(self) -> list[int]:
        """Return the numbers of heads to begin with."""
        shares = (1, 2 / 3, 1 / 2, 5 / 12) if self._cuts_heads else (1,)
        return [max(1, round(self._encoder.heads * share)) for share in shares]

    def _ranked(self, depths: list[int]) -> list[int]:
        """Return the layers that may go, that which is missed least first: each is removed alone."""
        encoder = self._encoder
        layers = range(1 if self._first_stays else 0, encoder.depth)
        if depths == [0]:
            return []
        scores = {}
        widths = {heads: self._width_of(tuple(range(encoder.depth - 1)), heads) for heads in self._shares()}
        heads = next((heads for heads in widths if widths[heads] * _ROOM >= encoder.width), encoder.heads)
        for layer in layers:
            score = self._try([layer], heads) if 1 in depths else None
            if score is None:  # it takes more than one layer: this shape only tells how much the layer is missed
                others = tuple(index for index in range(encoder.depth) if index != layer)
                width = max(self._width_of(tuple(range(encoder.depth - depths[-1])), heads), STEP)
                score = self._evaluate(encoder.uniform(others, width, heads))
            scores[layer] = score
        return sorted(layers, key=scores.__getitem__)

    def _try(self, gone: list[int], heads: int) -> float | None:
        """Score the shape without some layers; None if it was tried before or misses the target."""
        layers = tuple(layer for layer in range(self._encoder.depth) if layer not in gone)
        width = self._width_of(layers, heads)
        shape = self._encoder.uniform(layers, width, heads)
        if width < STEP or shape in self.tried or len(self.tried) >= self._count:
            return None
        self.tried[shape] = self._evaluate(shape)
        return self.tried[shape]

    def _parent(self) -> Shape:
        """Draw a shape to change: each is half as likely as the next better one."""
        ranked = sorted(self.tried, key=self.tried.__getitem__)
        return self._random.choices(ranked, [0.5**rank for rank in range(len(ranked))])[0]

    def _gone(self, shape: Shape) -> list[int]:
        return [layer for layer in range(self._encoder.depth) if layer not in shape.layers]

    def _changed(self, shape: Shape, ranking: list[int], depths: list[int]) -> tuple[list[int], int]:
        """Exchange one layer, let one more go or stay, or change the heads, at random; early ranks are more likely."""
        gone, heads, draw = self._gone(shape), shape.most_heads, self._random
        if self._cuts_heads and draw.random() < 0.5:
            heads = min(max(heads + draw.choice((-2, -1, 1, 2)), 1), self._encoder.heads)
        else:
            stay = [layer for layer in ranking if layer not in gone]
            weights = [1 / (1 + rank) for rank in range(len(stay))]
            move = draw.choice(("exchange", "more", "fewer"))
            if gone and move != "more":
                gone.remove(draw.choice(gone))
            if stay and move != "fewer":
                gone.append(draw.choices(stay, weights)[0])
        return (gone if len(gone) in depths else self._gone(shape)), heads
