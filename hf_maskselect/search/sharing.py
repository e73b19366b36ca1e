"""The processes of a search, and trials shared among them."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from tqdm.auto import tqdm

from ..methods.base import Method
from ..utils.processes import Processes
from .results import Candidate
from .sandbox import Sandbox

T = TypeVar("T")
Holders = Mapping[int, Collection[int]]  # candidate -> the processes that can try it
# (candidates, steps, on_scores=..., able=...) -> scores by index: what `shared_trials` makes and the memories wrap.
Trials = Callable[..., dict[int, float]]


class Team:
    """The processes of a search: an error of one stops all."""

    def __init__(self, processes: Processes, method: Method) -> None:
        self.processes, self._method = processes, method

    def first(self, work: Callable[[], T]) -> T:
        """Return to all what rank 0 computes alone."""
        results: list = self.processes.together(work if self.processes.rank == 0 else lambda: None)
        return results[0]

    def each(self, work: Callable[[], T]) -> T:
        """Return this process's result of what all compute.

        With sharded weights the work itself is a collective, in which nobody can wait for another's error.
        """
        if self._method.shards is not None:
            return work()
        result: list[T] = []
        self.processes.together(lambda: result.append(work()))
        return result[0]

    def share(self, load: Callable[[], Mapping], source: int) -> Mapping:
        """Return the tensors that the process `source` loads."""
        tensors = self.each(lambda: load() if self.processes.rank == source else None)
        return self.processes.share(tensors, source)


def shared_trials(
    team: Team,
    sandbox: Sandbox,
    deal: Callable[[Sequence[Candidate], Holders | None], list[list[Candidate]]],
    score_one: Callable[[Candidate, int], float],
    progress: tqdm,
) -> Trials:
    """Make a function that scores candidates on all processes; after every trial all learn the scores.

    Args:
        team: the processes.
        sandbox: restores the run after the trials.
        deal: candidates, and who can try them (None: any process) -> the share of each process, masks at hand.
        score_one: tries a candidate for some steps on this process.
        progress: a bar, moved here by the trials of other processes.
    """

    def try_own(candidates: Sequence[Candidate], steps: int) -> list[tuple[int, float]]:
        return [(candidate.index, score_one(candidate, steps)) for candidate in candidates]

    def score_all(
        candidates: Sequence[Candidate],
        steps: int,
        on_scores: Callable[[Mapping[int, float]], None] = lambda scores: None,
        able: Holders | None = None,
    ) -> dict[int, float]:
        shares, scores = deal(candidates, able), dict[int, float]()
        with sandbox.untouched():
            for turn in range(max(map(len, shares))):
                own = shares[team.processes.rank][turn : turn + 1]
                results = team.processes.together(functools.partial(try_own, own, steps))
                finished = {index: score for result in results for index, score in result}
                scores |= finished
                progress.update(max(steps, 1) * (len(finished) - len(own)))
                on_scores(finished)
        return scores

    return score_all
