"""What a search at one level tried and found: its table, on disk and for people."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from ..utils.tables import text_table

SEARCH_FILE = "search.json"


def rank_of(score: float, index: int) -> tuple[float, int]:
    """Of a candidate: the lower, the better."""
    return (math.inf if math.isnan(score) else score, index)


@dataclass
class Candidate:
    """One row of the table of candidates. overlap: share of its kept weights that the deterministic mask keeps too."""

    index: int
    proposal: str
    ratio: float | None
    overlap: float
    digest: str
    scores: list[float] = field(default_factory=list)
    steps: int = 0
    chosen: bool = False

    @property
    def rank(self) -> tuple[float, int]:
        """By last score, ties by index; a diverged trial (NaN) comes last of all."""
        return rank_of(self.scores[-1], self.index)


@dataclass
class LevelSearch:
    """What one search did. step_equivalents: the whole cost, of all ranks together, in steps of the training (by rows,
    a forward pass counted as a third); seconds: by the clock; cut_error, refit_error: of the matrices' outputs under
    the chosen masks, before and after they were fitted, as shares of their variance (mean; None where none was)."""

    level: int
    sparsity: float
    step: int
    candidates: list[Candidate]
    step_equivalents: float = 0.0
    seconds: float = 0.0
    cut_error: float | None = None
    refit_error: float | None = None

    def metrics(self) -> dict[str, float]:
        """The `search_*` values that are logged."""
        last = [c.scores[-1] for c in self.candidates if c.scores]
        logged = {
            "search_level": self.level + 1,
            "search_step_equivalents": self.step_equivalents,
            "search_seconds": self.seconds,
        }
        if self.refit_error is not None:
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
        """The candidates as text, one a line, best last score first."""
        rungs = max(len(c.scores) for c in self.candidates)
        trained = any(c.steps for c in self.candidates)
        scores = [f"rung {i + 1}" if trained else "as fitted" for i in range(rungs)]
        header = ["#", "proposal", "overlap", *scores, "steps", ""]
        ranked = sorted(self.candidates, key=lambda c: (-len(c.scores), c.scores[-1] if c.scores else 0, c.index))
        rows = [
            [c.index, c.proposal, f"{c.overlap:.3f}", *(f"{s:.4f}" for s in c.scores), *[""] * (rungs - len(c.scores))]
            + [c.steps, "<- chosen" if c.chosen else ""]
            for c in ranked
        ]
        return text_table(header, rows)


def read_searches(path: Path) -> list[LevelSearch]:
    """What `MaskSearch.write` wrote.

    Raises:
        ValueError: the file is no such table.
    """
    try:
        told = json.loads(path.read_text())
        if not all(type(e[key]) is int for e in told for key in ("level", "step")):
            raise ValueError("levels and steps are whole numbers")
        return [LevelSearch(**{**e, "candidates": [Candidate(**c) for c in e["candidates"]]}) for e in told]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it, and the searches it tells of are left out of the totals"
        ) from error
