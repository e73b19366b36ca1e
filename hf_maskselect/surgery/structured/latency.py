"""The time of shapes on this machine: a table of a layer's time by width and heads, and that of whole models."""

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...utils.clock import clock, least_seconds
from .batches import Batch
from .cut import Cutter
from .notes import Notes
from .shapes import STEP, Shape

_SHARES = (2 / 3, 1 / 2, 1 / 3, 1 / 6, 1 / 12, 1 / 24)
_SECONDS = 2.5  # spent on a whole model


class Latency:
    """Times a dense model, and what smaller models would take.

    Args:
        cutter: of the dense model.
        batch: what is timed, on the device.
        dtype: what is timed, such as `torch.bfloat16`.
        device: what is timed.
        notes: the times of the table and the measured speed-ups. What they hold already is not timed again.
        cuts_heads: models with fewer heads are timed, too.
    """

    def __init__(
        self,
        cutter: Cutter,
        batch: Batch,
        dtype: torch.dtype,
        device: torch.device,
        notes: Notes,
        cuts_heads: bool = False,
    ) -> None:
        self._cuts_heads = cuts_heads
        self._dtype, self._device, self._notes = dtype, device, notes
        self._batch = {name: _moved(value, dtype, device) for name, value in batch.items()}
        self._dense = self._placed(cutter.model)
        self._cutter, self.encoder = Cutter(self._dense, cutter.family), cutter.encoder
        self._time_table()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the inputs that are timed, such as (batch size, length)."""
        return tuple(next(iter(self._batch.values())).shape)

    def __str__(self) -> str:
        size = " x ".join(map(str, self.shape))
        threads = torch.get_num_threads()
        where = f"{threads} thread{'s' * (threads > 1)}" if self._device.type == "cpu" else str(self._device)
        return f"{size}, {str(self._dtype).removeprefix('torch.')}, {where}"

    def _time_table(self) -> None:
        """Time whole models by width, with all heads, and by heads, at the full width.

        A layer alone may be faster than in a model, where the cache holds other things. So only models are timed: the
        dense one, one of half the depth, and one for each entry. They take turns, since the machine may be busy.
        """
        encoder, family = self.encoder, self._cutter.family
        full = encoder.full()
        shapes = {
            f"width {width}": encoder.uniform(full.layers, width, encoder.heads)
            for width in self._tabled(encoder.width, STEP)
        }
        if self._cuts_heads:
            shapes |= {
                f"heads {heads}": encoder.uniform(full.layers, encoder.width, heads)
                for heads in self._tabled(encoder.heads, 1)
            }
        half = -(-encoder.depth // 2)
        halved = self._small(
            full if encoder.shared else encoder.uniform(full.layers[:half], encoder.width, encoder.heads)
        )
        setattr(halved.config, family.depth, half)  # shared layers run at fewer depths
        jobs = {"dense": self._forward(self._dense), "half": self._forward(halved)}
        jobs |= {name: self._forward(self._small(shape)) for name, shape in shapes.items()}
        seconds = self._noted(jobs)
        self.dense = seconds["dense"]
        layer = max(0.0, self.dense - seconds["half"]) / max(1, encoder.depth - half)
        self._rest = max(0.0, self.dense - encoder.depth * layer) if encoder.depth > 1 else 0.0

        def table(kind: str, most: int) -> dict[int, float]:
            times = {int(name.split()[1]): time for name, time in seconds.items() if name.startswith(kind)}
            times[most] = self.dense
            return {size: max(0.0, times[size] - self._rest) / encoder.depth for size in sorted(times)}

        self._widths, self._heads = table("width", encoder.width), table("heads", encoder.heads)

    def _tabled(self, most: int, step: int) -> list[int]:
        """Return some sizes below the dense one, in multiples of a step."""
        sizes = {max(step, int(most * share // step) * step) for share in _SHARES}
        return sorted(size for size in sizes if size < most)

    def _small(self, shape: Shape) -> PreTrainedModel:
        """Return a model of a shape. It shares its embeddings with the dense one, which saves memory."""
        small = self._cutter.cut(shape)
        small.set_input_embeddings(self._dense.get_input_embeddings())
        return small

    def predicted(self, shape: Shape) -> float:
        """Return the seconds that a model of this shape would take, by the table."""
        sizes = zip(shape.widths, shape.heads, strict=True)
        return self._rest + sum(self.layer(width, heads) for width, heads in sizes)

    def layer(self, width: int, heads: int) -> float:
        """Return the seconds of one layer, by the table."""
        head = _between(self._heads, heads) - self._heads[self.encoder.heads]
        return max(0.0, _between(self._widths, width) + head)

    def speedup(self, shape: Shape) -> float:
        """Return how many times as fast as the dense model one of this shape is, measured."""
        key = f"speed-up of {shape}"
        if key not in self._notes:
            dense, small = self.measured(self._cutter.cut(shape))
            self._notes[key] = dense / small
        return self._notes[key]

    def measured(self, model: PreTrainedModel) -> tuple[float, float]:
        """Return the seconds of the dense model and of a smaller one, timed in turns."""
        jobs = {"dense": self._forward(self._dense), "small": self._forward(self._placed(model))}
        seconds = self._seconds(jobs)
        return seconds["dense"], seconds["small"]

    def _noted(self, jobs: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Time all jobs, unless the notes have them all."""
        keys = {name: f"seconds of {name}, {self}" for name in jobs}
        if not all(key in self._notes for key in keys.values()):
            for name, seconds in self._seconds(jobs).items():
                self._notes[keys[name]] = seconds
        return {name: self._notes[key] for name, key in keys.items()}

    def _seconds(self, jobs: dict[str, Callable[[], object]]) -> dict[str, float]:
        with torch.inference_mode():
            return least_seconds(jobs, _SECONDS, clock if self._device.type == "cpu" else time.perf_counter)

    def _placed(self, model: PreTrainedModel) -> PreTrainedModel:
        placed: Any = copy.deepcopy(model)
        return placed.to(device=self._device, dtype=self._dtype).eval().requires_grad_(False)

    def _forward(self, model: PreTrainedModel) -> Callable[[], object]:
        return lambda: self._done(model(**self._batch))

    def _done(self, output: object) -> object:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return output


def _moved(value: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return value.to(device, dtype if value.is_floating_point() else None)


def _between(table: dict[int, float], at: int) -> float:
    """Interpolate in a table; below its first entry, in proportion to the step between the first two."""
    keys = sorted(table)
    if at in table or len(keys) == 1:
        return table.get(at, table[keys[0]])
    above = next((index for index, key in enumerate(keys) if key > at), len(keys) - 1)
    low, high = keys[max(above - 1, 0)], keys[max(above, 1)]
    return table[low] + (table[high] - table[low]) * (at - low) / (high - low)
