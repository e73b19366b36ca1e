"""The record of a run: what its output folder holds about masks, zeros, searches and scores."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from ..search.results import SEARCH_FILE, Candidate, LevelSearch, read_searches
from ..storage.configs import load_config
from ..storage.models import of_transformers
from ..storage.runs import last_checkpoint, read_trainer_state
from ..storage.state import PruningState
from ..surgery.structured.record import STRUCTURED, StructureRecord
from ..utils.layer_names import layer_of
from ..utils.reading import is_number, read_object
from .sparsity import SparsityReport, sparsity_report

RESULTS_FILE = "all_results.json"
_REMEDY = "restore the file or delete it"
_NOT_SCORES = ("runtime", "per_second", "sparsity", "samples", "loss")  # endings of keys


@dataclass(frozen=True)
class RunRecord:
    """The files of one run, read.

    Attributes:
        folder: where the saved model lies.
        report: zeros of every tensor.
        state: the pruning state, None for a model without one.
        structure: how the model came to a smaller shape, None if it has that of the dense model.
        searches: one entry a level, as in `search.json`.
        history: log entries of the trainer, each with its `step`.
        results: `all_results.json`, which the scripts write; `dense_eval_*` are scores of the model before pruning.
    """

    folder: Path
    report: SparsityReport
    state: PruningState | None
    structure: StructureRecord | None = None
    searches: list[LevelSearch] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> RunRecord:
        """Read a folder; the fields of files that it lacks stay empty.

        Raises:
            ValueError: the folder holds no model, or a file is damaged.
        """
        folder = Path(folder)
        searches = read_searches(folder / SEARCH_FILE) if (folder / SEARCH_FILE).is_file() else []
        history: list[dict[str, Any]] = []
        last = last_checkpoint(folder)
        for path in (folder / TRAINER_STATE_NAME, Path(last or folder) / TRAINER_STATE_NAME):
            if path.is_file():
                history = read_trainer_state(path, _REMEDY)["log_history"]
                break
        results = read_object(folder / RESULTS_FILE, _REMEDY) if (folder / RESULTS_FILE).is_file() else {}
        structure = StructureRecord.find(load_config(folder)) if of_transformers(folder) else None
        report, state = sparsity_report(folder), PruningState.find(folder)
        return cls(folder, report, state, structure, searches, history, results)

    @property
    def sparse(self) -> bool:
        """Whether the model has the zeros of a mask; one that only became smaller has none."""
        return self.structure is None if self.state is None else self.state.pattern != STRUCTURED

    def densities(self) -> tuple[list[str], list[str], dict[tuple[str, str], float]]:
        """The share of kept weights of every prunable tensor, laid out as a table.

        Returns:
            (rows, columns, density by row and column). Rows are layers in order, with the name of their stack if there
            are several; columns are the matrices of a layer. A tensor outside of layers has the row "".
        """
        parsed = []
        for tensor in self.report.tensors:
            if tensor.prunable:
                stack, number, rest = layer_of(tensor.name)
                parsed.append(((stack, int(number or 0)), number, rest, 1 - tensor.zeros / tensor.total))
        several = len({stack for (stack, _), _, _, _ in parsed}) > 1
        names = {layer: f"{layer[0]}{number}" if several else number for layer, number, _, _ in sorted(parsed)}
        densities = {(names[layer], column): density for layer, _, column, density in parsed}
        return list(names.values()), list(dict.fromkeys(column for _, column in densities)), densities


def metrics_of(results: Mapping[str, object], prefix: str) -> dict[str, float]:
    """The scores among results whose keys begin with `prefix`, without the prefix: no times, counts or losses."""
    values = {key.removeprefix(prefix): value for key, value in results.items() if key.startswith(prefix)}
    return {k: v for k, v in values.items() if not k.endswith(_NOT_SCORES) and is_number(v)}


def best_first(search: LevelSearch) -> list[Candidate]:
    """The candidates of a level by the rungs they reached, then by last score; a diverged trial (NaN) comes last."""
    return sorted(search.candidates, key=lambda candidate: (-len(candidate.scores), candidate.order))
