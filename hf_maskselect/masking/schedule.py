"""From an optimizer step to its level: pure functions of the configuration, the run length and the start sparsity."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass


def cubic_levels(sparsity: float, num_levels: int) -> list[float]:
    """`sparsity * (1 - (1 - t / num_levels)^3)` for t = 1..num_levels: big cuts first, small ones near the target.

    Four levels to 0.9375 give 0.542, 0.820, 0.923, 0.9375 (the list of "Randomized Pruning Mask Generation and
    Selection", EMNLP Findings 2023, whose second value is rounded up to 0.83).
    """
    return [sparsity * (1 - (1 - t / num_levels) ** 3) for t in range(1, num_levels)] + [sparsity]


def check_levels(levels: Sequence[float], sparsity: float) -> None:
    """Raise a ValueError unless `levels` rise strictly within (0, 1) and end at `sparsity`."""
    if not levels:
        raise ValueError("levels is empty: give at least the target sparsity, as in levels=[0.54, 0.83, 0.9375]")
    if any(not 0 < level < 1 for level in levels):
        raise ValueError(f"levels={list(levels)} must lie inside (0, 1): they are fractions of zeros")
    if any(a >= b for a, b in zip(levels, levels[1:], strict=False)):
        raise ValueError(f"levels={list(levels)} must be strictly increasing: a pruned weight never returns")
    if levels[-1] != sparsity:
        raise ValueError(
            f"levels={list(levels)} end at {levels[-1]} but sparsity={sparsity}: make the last level the target "
            "sparsity"
        )


@dataclass(frozen=True)
class LevelPlan:
    """When each level starts and how long it lasts, in optimizer steps (never micro-steps).

    Attributes:
        levels: the sparsity of every level; a soft method has one.
        starts: the first step under the masks of each level; earlier ones are dense, or soft from `soft_start` on. The
            level of a soft method may start at `max_steps`.
        soft_start: the first step under soft masks; None for hard methods.
        ramp_steps: the steps in which the sparsity of soft masks rises linearly to the target.
    """

    levels: tuple[float, ...]
    starts: tuple[int, ...]
    max_steps: int
    soft_start: int | None = None
    ramp_steps: int = 1

    @classmethod
    def build(
        cls, levels: Sequence[float], max_steps: int, warmup_steps: int = 0, last_weight: float = 2.0
    ) -> LevelPlan:
        """Share `max_steps - warmup_steps` evenly over the levels, the last one `last_weight` times as long.

        Raises:
            ValueError: some level would get no step, so the target could not be reached.
        """
        steps = max_steps - warmup_steps
        if steps < len(levels):
            raise ValueError(
                f"the plan cannot reach sparsity {levels[-1]}: {len(levels)} levels and {warmup_steps} dense "
                f"warm-up steps do not fit into {max_steps} optimizer steps; raise max_steps or num_train_epochs, "
                "or lower num_levels or pruning_warmup_steps"
            )
        weight = len(levels) - 1 + last_weight
        starts = [warmup_steps + round(i * steps / weight) for i in range(len(levels))]
        for i in range(len(levels)):  # very short plans: at least one step a level, in order
            starts[i] = max(starts[i], starts[i - 1] + 1 if i else warmup_steps)
            starts[i] = min(starts[i], max_steps - (len(levels) - i))
        return cls(tuple(levels), tuple(starts), max_steps)

    @classmethod
    def build_soft(
        cls, sparsity: float, max_steps: int, warmup_steps: int, frozen_steps: int, ramp: float
    ) -> LevelPlan:
        """Plan dense warm-up, a soft phase, and `frozen_steps` under the hard mask at the end.

        `ramp` is the share of the soft phase, in [0, 1], in which the sparsity rises to the target. Raises a
        ValueError if no step is left for the soft phase.
        """
        soft = max_steps - warmup_steps - frozen_steps
        if soft < 1:
            raise ValueError(
                f"the plan cannot reach sparsity {sparsity}: {warmup_steps} dense warm-up steps and {frozen_steps} "
                f"steps under the frozen mask leave no soft step of {max_steps}; raise max_steps or num_train_epochs, "
                "or lower pruning_warmup_steps or frozen_steps"
            )
        return cls((sparsity,), (max_steps - frozen_steps,), max_steps, warmup_steps, max(1, round(ramp * soft)))

    def ramp_at(self, step: int) -> float:
        """Share of the target sparsity that soft masks have at `step`: 0 in the warm-up, 1 after the ramp."""
        if self.soft_start is None or step < self.soft_start:
            return 0.0
        return min(1.0, (step - self.soft_start + 1) / self.ramp_steps)

    def level_at(self, step: int) -> int:
        """Index of the level of optimizer step `step` (from 0); -1 before the first level."""
        return bisect.bisect_right(self.starts, step) - 1

    def span(self, level: int) -> tuple[int, int]:
        """First step and one past the last step of `level`; level -1 is what comes before the first."""
        first = 0 if level < 0 else self.starts[level]
        last = self.starts[level + 1] if level + 1 < len(self.starts) else self.max_steps
        return first, last

    def length(self, level: int) -> int:
        """Optimizer steps of `level`."""
        first, last = self.span(level)
        return last - first
