"""The cells of a comparison: their names, and the flags of each method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Flags for the search and its levels are for the methods that have them.
ONE_MASK = ["--num_candidates", "1"]
SOFT = [*ONE_MASK, "--num_levels", "1"]
METHODS = {
    "dense": [],
    "magnitude": ["--method", "magnitude", *ONE_MASK],
    "fisher": ["--method", "fisher", *ONE_MASK],
    "taylor": ["--method", "taylor", *ONE_MASK],
    "pdp": ["--method", "pdp", *SOFT],
    "gumbel": ["--method", "gumbel", *SOFT],
    "random-paper": ["--method", "random", "--proposals", "paper"],
    "random": ["--method", "random"],
}
TOTAL = "-total"  # ending of a method whose search counts among its steps
METHODS |= {name + TOTAL: METHODS[name] for name in ("fisher", "taylor", "random-paper", "random")}


def names_of(method: str) -> list[str]:
    """Whose own flags a method takes: those of `random` are also those of `random-total`."""
    return list(dict.fromkeys((method.removesuffix(TOTAL), method)))


@dataclass(frozen=True)
class Cell:
    """One run. target: a sparsity or an N:M pattern; None for the dense model."""

    task: str
    seed: int
    target: str | None
    method: str

    def __str__(self) -> str:
        return " ".join(map(str, (self.task, self.seed, *([self.target] if self.target else []), self.method)))

    def folder(self, output_dir: Path) -> Path:
        """Where it lies."""
        target = [] if self.target is None else [self.target.replace(":", "of")]
        return output_dir.joinpath(self.task, str(self.seed), *target, self.method)

    def flags(self, common: Sequence[str], own: dict[str, list[str]]) -> list[str]:
        """Those of `run_glue.py`: for all, of its target, then what is its own."""
        target = [] if self.target is None else ["--pattern" if ":" in self.target else "--sparsity", self.target]
        keys = [key for key in (self.task, self.target, *names_of(self.method)) if key in own]
        return [*common, *target, *(flag for key in keys for flag in own[key])]
