"""The record of the search at one level: its candidates, scores and cost, on disk and as a table."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..utils.files import replacing
from ..utils.reading import build, read_json_file, typed
from ..utils.tables import text_table

SEARCH_FILE = "search.json"


def order_of(score: float, index: int) -> tuple[bool, float, float]:
    """Return a sort key, the best first: by score, ties by index; a diverged trial (NaN) comes last of all."""
    diverged = math.isnan(score)
    return (diverged, 0.0 if diverged else score, index)


@dataclass
class Candidate:
    """One candidate mask of a level, a row of the table."""

    index: int  # 0 is the deterministic mask
    proposal: str
    ratio: float | None  # draws of votes per removed weight
    overlap: float  # share of its kept weights that candidate 0 keeps too
    digest: str
    scores: list[float] = field(default_factory=list)  # one a rung, lower is better
    steps: int = 0  # of all its trials
    chosen: bool = False

    @property
    def order(self) -> tuple[bool, float, float]:
        """Sort key by the last score, if there is one: see `order_of`."""
        return order_of(self.scores[-1] if self.scores else 0.0, self.index)


@dataclass
class LevelSearch:
    """The search of one level."""

    level: int
    sparsity: float
    step: int  # the optimizer step before which it ran
    candidates: list[Candidate]  # without those whose mask an earlier one has
    step_equivalents: float = 0.0  # cost of all processes, in training steps (by rows; a forward pass is a third)
    seconds: float = 0.0
    cut_error: float | None = None  # mean error of the matrices' outputs after the cut, as a share of their variance
    refit_error: float | None = None  # and after the refit

    def metrics(self) -> dict[str, float]:
        """Return the `search_*` values that are logged."""
        last = [c.scores[-1] for c in self.candidates if c.scores]
        logged: dict[str, float] = {
            "search_level": self.level + 1,
            "search_step_equivalents": self.step_equivalents,
            "search_seconds": self.seconds,
        }
        if self.cut_error is not None and self.refit_error is not None:
            logged |= {"cut_error": self.cut_error, "refit_error": self.refit_error}
        if last:
            chosen = next(c for c in self.candidates if c.chosen)
            logged |= {
                "search_best_score": chosen.scores[-1],
                "search_deterministic_score": self.candidates[0].scores[-1],
                "search_spread": max(last) - min(last),
                "search_chosen": chosen.index,
            }
        return logged

    def table(self) -> str:
        """Return the candidates as text, one a line, best last score first."""
        rungs = max(len(c.scores) for c in self.candidates)
        trained = any(c.steps for c in self.candidates)
        scores = [f"rung {i + 1}" if trained else "after refit" for i in range(rungs)]
        header = ["#", "proposal", "overlap", *scores, "steps", ""]
        ranked = sorted(self.candidates, key=lambda c: (-len(c.scores), c.order))
        rows = [
            [c.index, c.proposal, f"{c.overlap:.3f}", *(f"{s:.4f}" for s in c.scores), *[""] * (rungs - len(c.scores))]
            + [c.steps, "<- chosen" if c.chosen else ""]
            for c in ranked
        ]
        return text_table(header, rows)


def write_searches(folder: Path, searches: Sequence[LevelSearch]) -> None:
    """Write `search.json` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / SEARCH_FILE) as temporary:
        temporary.write_text(json.dumps([asdict(search) for search in searches], indent=1))


def read_searches(path: Path) -> list[LevelSearch]:
    """Read what `write_searches` wrote.

    Raises:
        ValueError: the file is damaged.
    """
    remedy = "delete it; totals then leave its searches out"
    searches = []
    for content in typed(read_json_file(path, remedy), list[dict[str, Any]], path, remedy):
        found = typed(content.get("candidates"), list, f"{path}: candidates", remedy)
        candidates = [build(Candidate, candidate, path, remedy) for candidate in found]
        searches.append(build(LevelSearch, {**content, "candidates": candidates}, path, remedy))
        scored = [bool(candidate.scores) for candidate in candidates]
        if any(scored) and not (all(scored) and sum(candidate.chosen for candidate in candidates) == 1):
            raise ValueError(f"{path} holds a search without scores or without one chosen candidate: {remedy}")
    return searches
