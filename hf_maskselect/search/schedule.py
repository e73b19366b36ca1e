"""How long trials are and who goes on: the rungs of a search ("early mask evaluation" of arXiv 2310.13183, successive
halving, and halving that goes on from the trained weights)."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import PruningConfig
from ..masking.schedule import LevelPlan
from .results import Candidate

SHORTEST_TRIAL = 40  # of survivors, where the level allows it: shorter ones order good masks the wrong way round


def halving_rungs(candidates: int, first_steps: int, longest: int) -> list[tuple[int, int]]:
    """(candidates, steps) of each rung: the better half goes on with twice the steps, until two have met or trials
    are `longest` steps long. Every trial of a rung starts afresh and has the same budget.

    >>> halving_rungs(8, 40, 240)
    [(8, 40), (4, 80), (2, 160)]
    """
    rungs = [(candidates, min(first_steps, longest))]
    while rungs[-1][0] > 2 and rungs[-1][1] < longest:
        count, steps = (rungs[-1][0] + 1) // 2, min(2 * rungs[-1][1], longest)
        rungs.append((count, steps))
    return rungs


def survivor_rungs(candidates: int, first_steps: int, longest: int) -> list[tuple[int, int]]:
    """(candidates, further steps) of each rung: all are trained for `first_steps`, the better half goes on from its
    own weights to twice as many, until two have met or `longest` steps are reached.

    >>> survivor_rungs(8, 10, 40)
    [(8, 10), (4, 10), (2, 20)]
    """
    reached = [0, *(steps for _, steps in halving_rungs(candidates, first_steps, longest))]
    counts = [count for count, _ in halving_rungs(candidates, first_steps, longest)]
    return [(count, after - before) for count, before, after in zip(counts, reached, reached[1:], strict=False)]


def search_rungs(
    config: PruningConfig, plan: LevelPlan, level: int, epoch: int, fits: bool = True
) -> list[tuple[int, int]]:
    """(candidates, steps) of each rung at a level; empty when nothing is chosen. One rung of no steps where the masks
    are compared as they are fitted.

    epoch: its length in trial steps. fits: whether any matrix can be fitted; if none can, masks that are not trained
    could hardly be told apart, and are unless `trial_steps` is 0.
    """
    settings = config.resolved()
    if not settings.searches:
        return []
    if settings.scores_after_refit and (fits or config.trial_steps == 0):
        return [(settings.num_candidates, 0)]
    if config.selection == "early":
        return [(settings.num_candidates, config.trial_steps or min(epoch, plan.length(level)))]
    if config.selection == "survivors":
        length = plan.length(level)
        first = config.trial_steps or max(-(-length // 8), min(SHORTEST_TRIAL, -(-length // 2)))
        return survivor_rungs(settings.num_candidates, first, max(length // 2, first))
    first = config.trial_steps or -(-plan.length(level) // 3)
    return halving_rungs(settings.num_candidates, first, max(plan.length(level), first))


def rungs_text(rungs: Sequence[tuple[int, int]]) -> str:
    """For people: `"4 x 40 + 2 x 80"`, `"4 x fit"` where masks are compared as they are fitted, `""` for none."""
    return " + ".join(f"{count} x {steps or 'fit'}" for count, steps in rungs)


def survivors(candidates: list[Candidate], count: int) -> list[Candidate]:
    """The `count` best by last score, ties by index; candidate 0 is always among them, so that the winner has been
    compared with the deterministic mask at the longest trial."""
    ranked = sorted(candidates, key=lambda c: c.rank)[:count]
    if all(c.index for c in ranked):
        ranked[-1] = candidates[0]
    return sorted(ranked, key=lambda c: c.index)
