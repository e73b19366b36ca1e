"""The journal of finished trials, so that a killed run repeats none."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..utils.files import read_json, write_json
from ..utils.reading import typed
from .identity import changed_parts, key_of
from .race import ScoreAll
from .results import Candidate
from .sharing import Team, Trials

JOURNAL_FILE = "_search-journal.json"  # uploads to the Hub leave out what begins with an underscore


class Journal:
    """Scores of finished trials in a file in `folder`, by search. Only rank 0 uses it.

    Each search has the identity of all that its scores depend on, and counts for no other. A trial is identified by
    the digest of its masks and its length. All searches of a run stay until it ends: a run that resumes before a level
    whose mask was already chosen finds the whole search here.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self._path = Path(folder) / JOURNAL_FILE
        self._searches: dict[str, dict[str, float]] = {}
        self._identities: dict[str, dict[str, str]] = {}

    def open(self, identity: Mapping[str, str]) -> None:
        """Continue, or begin, the search of this identity; warn if the trials that the file has are of another.

        Raises:
            ValueError: the file is damaged.
        """
        remedy = "delete it, and its trials are repeated"
        content: Any = typed(read_json(self._path, remedy) if self._path.is_file() else {}, dict, self._path, remedy)
        if content.keys() != {"scores", "identities"}:  # an earlier version wrote no identities
            content = {"scores": content, "identities": {}}
        self._searches = typed(content["scores"], dict[str, dict[str, float]], self._path, remedy)
        self._identities = typed(content["identities"], dict[str, dict[str, str]], self._path, remedy)
        key = key_of(identity)
        if key not in self._searches:
            self._warn(identity)
        self._scores = self._searches.setdefault(key, {})
        self._identities[key] = dict(identity)

    def _warn(self, identity: Mapping[str, str]) -> None:
        """Say why trials of the same level are not taken, if there are any: name what has changed the least."""
        others = [changed_parts(other, identity) for other in self._identities.values()]
        changed = min((parts for parts in others if parts and "level" not in parts), key=len, default=[])
        if changed:
            warnings.warn(
                f"{self._path}: level {int(identity.get('level', 0)) + 1} is searched afresh, because other trials "
                f"that the file holds were made with other {', '.join(changed)}",
                stacklevel=2,
            )

    def find(self, digest: str, steps: int) -> float | None:
        """Return the score of a finished trial, or None."""
        return self._scores.get(f"{digest}:{steps}")

    def add(self, scores: Mapping[str, float], steps: int) -> None:
        """Write the scores of trials, by digest (exactly: JSON holds a float's shortest form)."""
        self._scores.update({f"{digest}:{steps}": score for digest, score in scores.items()})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, {"scores": self._searches, "identities": self._identities})

    def forget(self) -> None:
        """Remove the file: the run is over."""
        self._path.unlink(missing_ok=True)


def journaled(trials: Trials, journal: Journal, team: Team) -> ScoreAll:
    """Wrap `trials`: skip those that the journal holds, and write down every new score as soon as it is there."""

    def score_all(candidates: Sequence[Candidate], steps: int) -> dict[int, float]:
        found = team.first(lambda: {c.index: journal.find(c.digest, steps) for c in candidates})
        scores = {index: score for index, score in found.items() if score is not None}
        digests = {c.index: c.digest for c in candidates}

        def write(finished: Mapping[int, float]) -> None:
            by_digest = {digests[index]: score for index, score in finished.items()}
            team.first(lambda: journal.add(by_digest, steps))

        return scores | trials([c for c in candidates if c.index not in scores], steps, on_scores=write)

    return score_all
