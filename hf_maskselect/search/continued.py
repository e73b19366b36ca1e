"""Trials that go on from the weights which earlier rungs have trained (`selection="survivors"`)."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..utils.folders import remove
from .race import ScoreAll
from .results import Candidate
from .sharing import Team, Trials
from .weight_files import WeightStore

FOLDER = "_survivors"  # uploads to the Hub leave out what begins with an underscore
Scores = Mapping[int, float]  # steps trained -> score


class ContinuedTrials:
    """Keeps the weights of each candidate's longest training, and its score at every rung, in a folder on disk.

    A killed search finds them again and so repeats no trial; they stay until another search begins or the run ends.
    Processes without a common disk each have their own folder.
    """

    def __init__(self, output_dir: Path, team: Team) -> None:
        self._folder, self._team, self._key = output_dir / FOLDER, team, ""
        self._store = WeightStore(self._folder, f"delete {self._folder}, and its trials are repeated")

    def open(self, key: str) -> None:
        """Continue, or begin, the search `key`, and delete the files of others."""
        self._key = key
        if self._folder.is_symlink():
            remove(self._folder)  # nothing is deleted behind a link
        for path in self._folder.glob("*"):
            if not path.name.startswith(key[:16]):
                path.unlink(missing_ok=True)

    def scores(self, candidate: Candidate) -> Scores:
        """Return the scores that this process has on disk."""
        name = self._name(candidate)
        if (owner := self._store.header(name).get("owner")) not in (None, self._owner(candidate)):
            raise ValueError(
                f"{self._store.path(name)} has the weights of another search or candidate ({owner[:8]}): delete "
                f"{self._folder}, and its trials are repeated"
            )
        scores = self._store.value(name, "scores", dict[str, float]) or {}
        return {int(steps): score for steps, score in scores.items()}

    def start_of(self, candidate: Candidate) -> Callable[[], Mapping[str, Tensor]] | None:
        """Return a loader of the weights that the next trial starts from; None for the first trial."""
        return functools.partial(self._store.load, self._name(candidate)) if candidate.steps else None

    def keep(self, candidate: Candidate, steps: int, score: float, weights: Mapping[str, Tensor]) -> None:
        """Keep the weights and the score of a trial of so many further steps."""
        scores = {**(self.scores(candidate) if candidate.steps else {}), candidate.steps + steps: score}
        self._store.write(
            self._name(candidate), weights, {"scores": json.dumps(scores), "owner": self._owner(candidate)}
        )

    def remembered(self, trials: Trials) -> ScoreAll:
        """Wrap `trials`: skip those that are finished, and give the others to processes that have their weights."""

        def score_all(candidates: Sequence[Candidate], steps: int) -> dict[int, float]:
            reports = self._team.processes.together(lambda: {c.index: self.scores(c) for c in candidates})
            before, finished = candidates[0].steps, dict[int, float]()
            for report in reversed(reports):  # the lowest rank that has a score has the last word
                finished |= {i: scores[before + steps] for i, scores in report.items() if before + steps in scores}
            rest = [candidate for candidate in candidates if candidate.index not in finished]
            able = {c.index: self._holders(c, [report[c.index] for report in reports]) for c in rest if before}
            return finished | trials(rest, steps, able=able if before else None)

        return score_all

    def winner_weights(self, winner: Candidate) -> Mapping[str, Tensor]:
        """Return what the winner has trained to all processes, from one that has it."""
        source = self._holders(winner, self._team.processes.together(lambda: self.scores(winner)))[0]
        return self._team.share(functools.partial(self._store.load, self._name(winner)), source)

    def _holders(self, candidate: Candidate, reports: Sequence[Scores]) -> list[int]:
        """Return the processes that have the weights of a candidate after its last trial.

        Raises:
            RuntimeError: none has.
        """
        holders = [rank for rank, scores in enumerate(reports) if max(scores, default=0) == candidate.steps]
        if not holders:
            raise RuntimeError(
                f"the weights that candidate {candidate.index} had trained are gone from {self._folder}: go on from "
                "the last checkpoint, and the search is repeated"
            )
        return holders

    def forget(self) -> None:
        """Remove all files."""
        remove(self._folder)

    def _name(self, candidate: Candidate) -> str:
        return f"{self._key[:16]}-{candidate.digest[:16]}"

    def _owner(self, candidate: Candidate) -> str:
        return f"{self._key} {candidate.digest}"
