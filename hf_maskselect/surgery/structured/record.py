"""What `config.json` tells of how a smaller model came to its shape."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PretrainedConfig

from ...utils.reading import build, typed
from .report import ShrinkReport
from .shapes import Shape

STRUCTURED = "structured"  # the pattern that has no masks
KEY = "structure"  # in config.pruning
_WHERE = "config.pruning: structure"
_REMEDY = "remove it from config.json"
_MOST_TIMED = 1 << 24  # numbers in the inputs that are timed


@dataclass(frozen=True)
class StructureRecord:
    """The shape of a smaller model beside that of the dense one, after one or more levels.

    dense, shape: sizes at the start, and now; the layers that stay are numbered as in the dense model. target: as it
    was asked for. speedup: how many times as fast as the dense model one call is, as measured; of several levels the
    product. removed: share of the layers' parameters that is gone. divergence: from the model before the last level,
    as fitted. milliseconds: of one call, before and after the last level. timed,
    timed_shape: what was timed, and the shape of its inputs. seconds: of all searches and fits.
    """

    dense: Shape
    shape: Shape
    target: str
    speedup: float
    removed: float
    divergence: float
    milliseconds: tuple[float, float]
    timed: str
    timed_shape: tuple[int, ...]
    seconds: float

    @classmethod
    def of(cls, report: ShrinkReport, target: str, before: StructureRecord | None = None) -> StructureRecord:
        """Record a level, after the levels before it."""
        dense, shape, speedup, left, seconds = report.dense, report.shape, report.speedup, 1.0, report.seconds
        if before is not None:
            dense, speedup, seconds = before.dense, speedup * before.speedup, seconds + before.seconds
            shape, left = shape.within(before.shape), 1 - before.removed
        return cls(
            dense=dense,
            shape=shape,
            target=target,
            speedup=speedup,
            removed=1 - left * (1 - report.layers_removed),
            divergence=report.divergence,
            milliseconds=report.milliseconds,
            timed=report.timed,
            timed_shape=report.timed_shape,
            seconds=seconds,
        )

    @classmethod
    def find(cls, config: PretrainedConfig) -> StructureRecord | None:
        """Read the record of a configuration; None if it has none.

        Raises:
            ValueError: it is damaged.
        """
        pruning = vars(config).get("pruning")
        content = pruning.get(KEY) if isinstance(pruning, dict) else None
        if content is None:
            return None
        values = dict(typed(content, dict[str, Any], _WHERE, _REMEDY))
        for name in ("dense", "shape"):
            values[name] = build(Shape, values.get(name), f"{_WHERE}: {name}", _REMEDY)
        record = build(cls, values, _WHERE, _REMEDY)
        record.check(config)
        return record

    def check(self, config: PretrainedConfig) -> None:
        """Raise a ValueError if the numbers cannot be, or the shape is not that of the configuration."""
        dense, small, most = self.dense, self.shape, math.prod(self.timed_shape)
        depth = getattr(config, "num_hidden_layers", None)
        wrong = [
            (not all(0 < number < math.inf for number in (self.speedup, *self.milliseconds)), "a time is none"),
            (not 0 <= self.removed < 1, f"removed={self.removed} is no share"),
            (not (dense.is_whole() and small.is_whole()), "a shape is none"),
            (not set(small.layers) <= set(dense.layers), "its layers are not those of the dense model"),
            (len(small.layers) != depth, f"it tells of {len(small.layers)} layers and the configuration of {depth}"),
            (not 0 < most <= _MOST_TIMED or min(self.timed_shape) < 1, f"timed_shape={self.timed_shape} is too large"),
        ]
        for is_wrong, reason in wrong:
            if is_wrong:
                raise ValueError(f"{_WHERE}: {reason}: {_REMEDY}")

    def write(self, config: PretrainedConfig) -> None:
        """Write the record into a configuration."""
        pruning = vars(config).get("pruning")
        config.pruning = {**(pruning if isinstance(pruning, dict) else {}), KEY: self.content()}

    def content(self) -> dict[str, Any]:
        """Return the record as JSON holds it."""
        values = asdict(self)
        for name in ("dense", "shape"):
            values[name] = {field: list(numbers) for field, numbers in values[name].items()}
        return {**values, "milliseconds": list(self.milliseconds), "timed_shape": list(self.timed_shape)}

    def __str__(self) -> str:
        lines = [
            f"before: {self.dense}",
            f"after:  {self.shape}",
            f"asked for {self.target}; measured {self.speedup:.2f} times as fast ({self.timed}), without "
            f"{self.removed:.1%} of the layers' parameters",
        ]
        return "\n".join(lines)
