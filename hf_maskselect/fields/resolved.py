"""`ResolvedConfig`: what a run reads, with every default filled in."""

from dataclasses import asdict, dataclass

import torch

from ..masking.base import Pattern
from ..masking.schedule import LevelPlan
from ..methods.gumbel import GumbelOptions

_SAME_NAME = "method sparsity scope criterion num_candidates refit_rows frozen_steps"
_SAME_NAME += " selection_metric selection_greater_is_better"
_LISTS = ("levels", "proposals", "target_modules", "exclude_modules")
_GUMBEL_NAMES = {"logit_rate": "learning_rate", "scale_rate": "scale_learning_rate"}


@dataclass(frozen=True)
class StructureOptions:
    """What a run with `pattern="structured"` reads.

    by_speedup: whether levels are speed-ups, and not shares of the layers' parameters. free: whether every layer may
    have a shape of its own. num_candidates: shapes tried at a level. rows: of train, to fit on. latency_shape: batch
    size and length that are timed. latency_dtype, latency_device: None for those of the model.
    """

    by_speedup: bool
    free: bool
    num_candidates: int
    rows: int
    latency_shape: tuple[int, int]
    latency_dtype: torch.dtype | None
    latency_device: str | None


@dataclass(frozen=True)
class ResolvedConfig:
    """Everything that follows from the fields of a `PruningConfig`; made by [`PruningConfig.resolved`].

    Attributes:
        sparsity: the target; where it emerges, a placeholder that prunes nothing.
        soft: whether the method trains through soft masks.
        criterion: of candidate 0; what a soft method begins from.
        pdp_taus: width of the soft band of `"pdp"`, absolute and relative; the absolute one is None where the other
            counts.
        movement_prior: weight of the logarithms in the first scores of `"movement"`.
        emergent: whether the sparsity is a result and not a target.
        pattern: with the scope of candidate 0.
        levels: rising sparsities; the last one is the target.
        proposals, target_modules, exclude_modules: tuples, also where one string was given.
        gumbel: options of the Gumbel method; None for other methods.
        selection_metric: without its prefix `eval_`; None where a run takes the teacher's soft labels or the loss.
        selection_greater_is_better: direction of `selection_metric`; False for the two losses.
        searches: whether a level has more than one candidate.
        scores_after_refit: whether candidates are scored right after their refit (if they have one), without training.
        structure: options of a structured run, which has no masks; None for another one. `sparsity` is then the share
            of the layers' parameters that goes, and 0 where the target is a speed-up.
        needs_selection_split: whether the run makes a choice that must not look at the evaluation data.
        fits_start: whether the model is refitted once, when its soft phase begins (`"pdp"`, `"movement"`).
        soft_ramp: 0 where a soft phase begins at the target.
        lr_rewind: whether the schedule of learning rates restarts at every level.
    """

    method: str
    soft: bool
    emergent: bool
    sparsity: float
    pattern: Pattern
    scope: str
    criterion: str
    levels: tuple[float, ...]
    num_candidates: int
    proposals: tuple[str, ...]
    refit_rows: int
    fits_start: bool
    frozen_steps: float
    pdp_taus: tuple[float | None, float]
    movement_prior: float
    gumbel: GumbelOptions | None
    structure: StructureOptions | None
    selection_metric: str | None
    selection_greater_is_better: bool
    target_modules: tuple[str, ...] | None
    exclude_modules: tuple[str, ...] | None
    searches: bool
    scores_after_refit: bool
    needs_selection_split: bool
    pruning_warmup_steps: float
    soft_ramp: float
    lr_rewind: bool
    last_level_weight: float

    @property
    def refits_cuts(self) -> bool:
        """Whether the model is refitted after every cut (`"gumbel"`: when its mask hardens)."""
        return self.refit_rows > 0 and not self.fits_start

    def plan(self, max_steps: int, start: float = 0.0) -> LevelPlan:
        """Return when each level starts in a run of `max_steps` optimizer steps.

        Args:
            max_steps: length of the run.
            start: sparsity of the model that the run begins with. Levels up to it are left out, except the last.

        Raises:
            ValueError: the target cannot be reached in so few steps.
        """
        warmup = _steps(self.pruning_warmup_steps, max_steps)
        if self.soft:
            frozen = _steps(self.frozen_steps, max_steps)
            if self.needs_selection_split and not frozen:
                raise ValueError(
                    f"frozen_steps={self.frozen_steps} of {max_steps} steps is less than one step, and choosing needs "
                    "some: raise frozen_steps"
                )
            return LevelPlan.build_soft(self.sparsity, max_steps, warmup, frozen, self.soft_ramp)
        levels = [level for level in self.levels if level > start] or self.levels[-1:]
        return LevelPlan.build(levels, max_steps, warmup, self.last_level_weight)

    def record(self) -> dict[str, object]:
        """Return the resolved values under the names of their fields, with lists for tuples, to be written down."""
        values: dict[str, object] = {name: getattr(self, name) for name in _SAME_NAME.split()}
        for name in _LISTS:
            value = getattr(self, name)
            values[name] = None if value is None else list(value)
        for name, value in {} if self.gumbel is None else asdict(self.gumbel).items():
            values[f"gumbel_{_GUMBEL_NAMES.get(name, name)}"] = value
        if self.soft:
            values["soft_ramp"] = self.soft_ramp or None  # None: at the target from the first step
        if self.method == "movement":
            values["movement_prior"] = self.movement_prior
        if self.method == "pdp":
            absolute, relative = self.pdp_taus
            values |= {"pdp_tau": absolute} if absolute is not None else {"pdp_relative_tau": relative}
        if self.structure is not None:
            values["sparsity"] = None if self.structure.by_speedup else self.sparsity
            values |= {"num_candidates": self.structure.num_candidates, "refit_rows": self.structure.rows}
        return {**values, "num_levels": len(self.levels)}


def _steps(value: float, max_steps: int) -> int:
    """Return a number of steps; `value` below 1 is a share of `max_steps`."""
    return int(value * max_steps) if 0 < value < 1 else int(value)
