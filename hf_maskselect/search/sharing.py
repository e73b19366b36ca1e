"""The processes of a search, and trials shared among them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from tqdm.auto import tqdm

from ..methods.base import Method
from ..utils.processes import Ranks
from .results import Candidate
from .sandbox import Sandbox

T = TypeVar("T")
Holders = Mapping[int, Collection[int]]  # candidate -> the processes that can try it


class Team:
    """The processes of a search: an error of one stops all."""

    def __init__(self, processes: Ranks, method: Method) -> None:
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


class SharedTrials:
    """Scores candidates on all processes: each tries its share, and after every trial all learn the scores.

    Args:
        team: the processes.
        sandbox: restores the run after the trials.
        deal: candidates, and who can try them (None: any process) -> the share of each process, masks at hand.
        score_one: tries one candidate for some steps on this process.
        progress: a bar, moved by what the other processes have done.
    """

    def __init__(
        self,
        team: Team,
        sandbox: Sandbox,
        deal: Callable[[Sequence[Candidate], Holders | None], list[list[Candidate]]],
        score_one: Callable[[Candidate, int], float],
        progress: tqdm,
    ) -> None:
        self._team, self._sandbox, self._deal = team, sandbox, deal
        self._score_one, self._progress = score_one, progress

    def __call__(
        self,
        candidates: Sequence[Candidate],
        steps: int,
        on_scores: Callable[[Mapping[int, float]], None] | None = None,
        able: Holders | None = None,
    ) -> dict[int, float]:
        """Return the scores by index; `on_scores` gets those of each turn as soon as they are there."""
        shares = self._deal(candidates, able)
        mine, scores = shares[self._team.processes.rank], {}
        with self._sandbox.untouched():
            for turn in range(max(map(len, shares))):
                own = mine[turn : turn + 1]
                results = self._team.processes.together(functools.partial(self._score, own, steps))
                finished = {index: score for result in results for index, score in result}
                scores |= finished
                self._progress.update(max(steps, 1) * (len(finished) - len(own)))
                if on_scores is not None:
                    on_scores(finished)
        return scores

    def _score(self, candidates: Sequence[Candidate], steps: int) -> list[tuple[int, float]]:
        return [(candidate.index, self._score_one(candidate, steps)) for candidate in candidates]
