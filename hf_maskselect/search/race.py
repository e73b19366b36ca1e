"""The race between candidates: a pure function of their scores."""

from collections.abc import Callable, Mapping, Sequence

from .results import Candidate

# (candidates, further steps) -> score of each by index, lower is better.
ScoreAll = Callable[[Sequence[Candidate], int], Mapping[int, float]]


def race(candidates: Sequence[Candidate], rungs: Sequence[tuple[int, int]], score_all: ScoreAll) -> Candidate:
    """Return the candidate that is best after the last rung; write scores and steps into the candidates.

    Args:
        candidates: candidate 0, the deterministic mask, comes first.
        rungs: (candidates, steps) of each round; see `search_rungs`.
        score_all: scores some candidates; it handles the journal, the processes and the disk.
    """
    racing = list(candidates)
    for count, steps in rungs:
        racing = best_of(racing, count)
        scores = score_all(racing, steps)
        for candidate in racing:
            candidate.scores.append(scores[candidate.index])
            candidate.steps += steps
    return min(racing, key=lambda candidate: candidate.order)


def best_of(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """Return the `count` best by last score, in the order of their indices; ties go to the lower index.

    Candidate 0 is always among them, so that the winner is compared with the deterministic mask at the longest trial.
    """
    if len(candidates) <= count:
        return list(candidates)
    best = sorted(candidates, key=lambda candidate: candidate.order)[:count]
    if all(candidate.index for candidate in best):
        best[-1] = candidates[0]
    return sorted(best, key=lambda candidate: candidate.index)
