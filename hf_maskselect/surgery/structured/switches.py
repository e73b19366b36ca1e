"""The search among shapes with other heads and neurons in each layer, from a uniform one on.

As in EvoPress (arXiv 2410.14649), a few units are moved between layers, or between heads and neurons, so that the cost
stays the same. The best shape so far is changed; a change that is worse is forgotten.
"""

import random
from collections.abc import Callable
from dataclasses import replace

from .budget import Budget
from .search import Candidate
from .shapes import STEP, Shape

_MOVES = (1, 2, 3)  # units that are moved at once
_DRAWS = 200  # changes in a row that were all tried before


class SwitchSearch:
    """Moves heads and neurons between layers.

    Args:
        budget: that every shape has to meet. One unit is a head, or as many neurons as cost the same.
        evaluate: fits a model of a shape and returns its divergence.
        count: number of shapes to try.
        seed: of the random moves.
    """

    def __init__(self, budget: Budget, evaluate: Callable[[Shape], float], count: int, seed: int) -> None:
        self._budget, self._evaluate, self._count = budget, evaluate, count
        self._random = random.Random(seed)

    def run(self, start: Candidate) -> list[Candidate]:
        """Return the shapes that were tried, without the one to start from."""
        best, tried, unit = start, {start.shape: start.divergence}, self._unit(start.shape)
        idle = 0
        while len(tried) <= self._count and idle < _DRAWS:
            shape = self._changed(best.shape, unit)
            if shape is None or shape in tried:
                idle += 1
                continue
            idle, tried[shape] = 0, self._evaluate(shape)
            if tried[shape] < best.divergence:
                best = Candidate(shape, tried[shape])
        del tried[start.shape]
        return [Candidate(*each) for each in tried.items()]

    def _unit(self, shape: Shape) -> int:
        """Return how many neurons of a layer cost as much as a head, in multiples of 8."""
        encoder, cost = self._budget.encoder, self._budget.cost
        width = max(STEP, encoder.width // 2)
        full, narrow = (cost(encoder.uniform(shape.layers, w, encoder.heads)) for w in (encoder.width, width))
        fewer = cost(encoder.uniform(shape.layers, encoder.width, max(1, encoder.heads // 2)))
        neuron = (full - narrow) / max(1, encoder.width - width)
        head = (full - fewer) / max(1, encoder.heads - encoder.heads // 2)
        return max(STEP, round(head / neuron / STEP) * STEP) if neuron > 0 else STEP

    def _changed(self, shape: Shape, unit: int) -> Shape | None:
        """Move some units at random; None if they cannot move."""
        encoder, draw = self._budget.encoder, self._random
        sizes = {"heads": list(shape.heads), "widths": list(shape.widths)}
        most = {"heads": encoder.head_counts, "widths": encoder.widths}
        steps, least = {"heads": 1, "widths": unit}, {"heads": 1, "widths": STEP}
        places = [(kind, index) for kind in sizes for index in range(len(shape.layers))]
        for _ in range(draw.choice(_MOVES)):
            (kind, giver), (other, taker) = draw.sample(places, 2)
            given = sizes[kind][giver] - steps[kind]
            taken = min(sizes[other][taker] + steps[other], most[other][shape.layers[taker]])
            if given < least[kind] or taken == sizes[other][taker]:
                return None
            sizes[kind][giver], sizes[other][taker] = given, taken
        changed = replace(shape, heads=tuple(sizes["heads"]), widths=tuple(sizes["widths"]))
        return self._filled(changed) if changed != shape else None

    def _filled(self, shape: Shape) -> Shape | None:
        """Change the width of one layer, so that the shape costs as much as it may; None if that is not enough."""
        encoder, order = self._budget.encoder, list(range(len(shape.layers)))
        self._random.shuffle(order)
        for index in order:
            full = encoder.widths[shape.layers[index]]
            for width in sorted({*range(STEP, full, STEP), full}, reverse=True):
                widths = (*shape.widths[:index], width, *shape.widths[index + 1 :])
                if self._budget.cost(filled := replace(shape, widths=widths)) <= self._budget.limit:
                    return filled
        return None
