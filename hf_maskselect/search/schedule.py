"""The rungs of a search: how many candidates are tried in each round of the race, and for how many steps.

"Early mask evaluation" of arXiv 2310.13183, successive halving, and halving that goes on from the trained weights.
"""

from collections.abc import Sequence

from ..config import PruningConfig
from ..masking.schedule import LevelPlan

SHORTEST_TRIAL = 40  # steps of "survivors", if the level is long enough: shorter trials rank good masks wrongly


def halving_rungs(candidates: int, first_steps: int, longest: int) -> list[tuple[int, int]]:
    """Return (candidates, steps) of each rung of `selection="halving"`.

    The better half continues with twice the steps, up to a rung of two candidates or of `longest` steps.
    All trials of a rung start from the run's weights and have the same length.

    >>> halving_rungs(8, 40, 240)
    [(8, 40), (4, 80), (2, 160)]
    """
    rungs = [(candidates, min(first_steps, longest))]
    while rungs[-1][0] > 2 and rungs[-1][1] < longest:
        count, steps = (rungs[-1][0] + 1) // 2, min(2 * rungs[-1][1], longest)
        rungs.append((count, steps))
    return rungs


def survivor_rungs(candidates: int, first_steps: int, longest: int) -> list[tuple[int, int]]:
    """Return (candidates, further steps) of each rung of `selection="survivors"`.

    All are trained for `first_steps`. The better half continues from its own weights to twice as many, up to a rung
    of two candidates or of `longest` steps.

    >>> survivor_rungs(8, 10, 40)
    [(8, 10), (4, 10), (2, 20)]
    """
    reached = [0, *(steps for _, steps in halving_rungs(candidates, first_steps, longest))]
    counts = [count for count, _ in halving_rungs(candidates, first_steps, longest)]
    return [(count, after - before) for count, before, after in zip(counts, reached, reached[1:], strict=False)]


def search_rungs(
    config: PruningConfig, plan: LevelPlan, level: int, epoch: int, refits: bool = True
) -> list[tuple[int, int]]:
    """Return (candidates, steps) of each rung at a level: one rung of 0 steps if masks are scored after refit.

    The list is empty when nothing is chosen. `epoch`: trial steps per epoch. `refits`: whether any matrix can be
    refitted. If none can, trials train, since masks right after the cut score too much alike, unless
    `trial_steps` is 0.
    """
    settings = config.resolved()
    candidates = settings.num_candidates
    if not settings.searches:
        return []
    if settings.scores_after_refit and (refits or config.trial_steps == 0):
        return [(candidates, 0)]
    if config.selection == "early":
        return [(candidates, config.trial_steps or min(epoch, plan.length(level)))]
    if config.selection == "survivors":
        length = plan.length(level)
        first = config.trial_steps or max(-(-length // 8), min(SHORTEST_TRIAL, -(-length // 2)))
        return survivor_rungs(candidates, first, max(length // 2, first))
    first = config.trial_steps or -(-plan.length(level) // 3)
    return halving_rungs(candidates, first, max(plan.length(level), first))


def rungs_text(rungs: Sequence[tuple[int, int]]) -> str:
    """Return text such as `"4 x 40 + 2 x 80"`, `"4 x refit"` if masks are scored after refit, `""` without rungs."""
    return " + ".join(f"{count} x {steps or 'refit'}" for count, steps in rungs)
