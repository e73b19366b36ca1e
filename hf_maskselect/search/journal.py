"""What a search has found out so far, so that a killed run repeats no trial."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..utils.files import read_json, write_json

JOURNAL_FILE = "_search-journal.json"  # uploads to the Hub leave out what begins with an underscore


class Journal:
    """Scores of finished trials, by search.

    A search is known by its key, which covers everything its scores depend on; a trial within it by the digest of its
    masks and its length. All searches of a run stay until it ends: a run that goes on from a checkpoint before a
    level that was already chosen finds the whole search here.

    One process keeps it, rank 0, and tells the others.

    Args:
        folder: where the file lies.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self._path = Path(folder) / JOURNAL_FILE
        self._searches: dict[str, dict[str, float]] = {}

    def open(self, key: str) -> None:
        """Take up what is known of the search `key`.

        Raises:
            ValueError: the file is damaged.
        """
        remedy = "delete it, and the trials it tells of are repeated"
        self._searches = read_json(self._path, remedy) if self._path.is_file() else {}
        self._scores = self._searches.setdefault(key, {})

    def find(self, digest: str, steps: int) -> float | None:
        """The score of a trial that was finished before."""
        return self._scores.get(f"{digest}:{steps}")

    def add(self, scores: Mapping[str, float], steps: int) -> None:
        """Keep the scores of trials, by digest (exactly: JSON holds a float's shortest form)."""
        self._scores.update({f"{digest}:{steps}": score for digest, score in scores.items()})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, self._searches)

    def forget(self) -> None:
        """Remove the file: the run is over."""
        self._path.unlink(missing_ok=True)
