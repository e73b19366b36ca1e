"""The cells of a comparison: their names, their folders, and the flags of each method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# A method takes the flags of the search and of its levels only if it has them.
ONE_MASK = ["--num_candidates", "1"]
SOFT = [*ONE_MASK, "--num_levels", "1"]
METHODS = {
    "dense": [],
    "magnitude": ["--method", "magnitude", *ONE_MASK],
    "fisher": ["--method", "fisher", *ONE_MASK],
    "taylor": ["--method", "taylor", *ONE_MASK],
    "platon": ["--method", "platon", *ONE_MASK],
    "obert": ["--method", "obert", *ONE_MASK],
    "pdp": ["--method", "pdp", *SOFT],
    "gumbel": ["--method", "gumbel", *SOFT],
    "movement": ["--method", "movement", *SOFT],
    "random-paper": ["--method", "random", "--proposals", "paper"],
    "random": ["--method", "random"],
}
TOTAL = "-total"  # suffix of a method that pays for its search out of its training steps
METHODS |= {name + TOTAL: METHODS[name] for name in ("fisher", "taylor", "platon", "obert", "random-paper", "random")}


def names_of(method: str) -> list[str]:
    """Names under which `--own_flags` are looked up for a method: flags of `random` also apply to `random-total`."""
    return list(dict.fromkeys((method.removesuffix(TOTAL), method)))


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Args:
        task: name of the GLUE task.
        seed: seed of the run and of its dense model.
        target: a sparsity or an N:M pattern; None for the dense model.
        method: a key of `METHODS`, or the name of a variant.
    """

    task: str
    seed: int
    target: str | None
    method: str

    def __str__(self) -> str:
        return " ".join(map(str, (self.task, self.seed, *([self.target] if self.target else []), self.method)))

    def folder(self, output_dir: Path) -> Path:
        """Folder of the cell below `output_dir`."""
        target = [] if self.target is None else [self.target.replace(":", "of")]
        return output_dir.joinpath(self.task, str(self.seed), *target, self.method)

    def dense(self) -> Cell:
        """Cell of the dense model that this cell starts from."""
        return Cell(self.task, self.seed, None, "dense")

    def flags(self, common: Sequence[str], own: dict[str, list[str]]) -> list[str]:
        """Flags of `run_glue.py`: the common ones, the target, then the own flags of task, target and method."""
        target = [] if self.target is None else ["--pattern" if ":" in self.target else "--sparsity", self.target]
        keys = [key for key in (self.task, self.target, *names_of(self.method)) if key in own]
        return [*common, *target, *(flag for key in keys for flag in own[key])]
