"""What shapes cost, in seconds or in parameters, and how much they may cost."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from .shapes import STEP, Encoder, Shape


@dataclass(frozen=True)
class Budget:
    """The most that a shape may cost. encoder: the dense sizes. cost: of a shape, in the unit of the limit."""

    encoder: Encoder
    cost: Callable[[Shape], float]
    limit: float

    def width_of(self, layers: tuple[int, ...], heads: int) -> int:
        """Return the largest width that some layers may have, with so many heads; below 1 if there is none."""
        encoder = self.encoder
        fitting = [w for w in encoder.allowed_widths() if self.cost(encoder.uniform(layers, w, heads)) <= self.limit]
        return max(fitting, default=0)

    def scaled(self, shape: Shape) -> Shape | None:
        """Return the shape with all widths changed by one factor, the largest within the budget; None if none is."""
        most = [self.encoder.widths[layer] for layer in shape.layers]

        def wide(widest: int) -> Shape:
            factor = widest / shape.width
            sizes = (
                min(full, max(STEP, int(w * factor // STEP) * STEP))
                for w, full in zip(shape.widths, most, strict=True)
            )
            return replace(shape, widths=tuple(sizes))

        fitting = [each for each in map(wide, self.encoder.allowed_widths()) if self.cost(each) <= self.limit]
        return fitting[-1] if fitting else None
