"""What a saved folder tells of its run: masks, zeros, searches, scores."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from ..search.results import SEARCH_FILE, LevelSearch, read_searches
from ..storage.runs import last_checkpoint
from ..storage.state import PruningState
from ..utils.files import read_object
from .sparsity import SparsityReport, sparsity_report

RESULTS_FILE = "all_results.json"
_REMEDY = "restore the file or delete it"
_NO_SCORES = ("runtime", "per_second", "sparsity", "samples", "loss")
_LAYER = re.compile(r"^(.*?\.)?(\d+)\.(.*)\.weight$")


@dataclass(frozen=True)
class RunRecord:
    """A run, as its output folder tells of it.

    history: the trainer's log entries, each with its `step`. results: `all_results.json`, as the scripts write it;
    `dense_eval_*` are the scores of the model before pruning.
    """

    folder: Path
    report: SparsityReport
    state: PruningState | None
    searches: list[LevelSearch] = field(default_factory=list)
    history: list[dict] = field(default_factory=list)
    results: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> RunRecord:
        """Read a folder; what is not there is empty.

        Raises:
            ValueError: no model there, or a damaged file.
        """
        folder = Path(folder)
        searches = read_searches(folder / SEARCH_FILE) if (folder / SEARCH_FILE).is_file() else []
        history: list[dict] = []
        last = last_checkpoint(folder)
        for path in (folder / TRAINER_STATE_NAME, Path(last or folder) / TRAINER_STATE_NAME):
            if path.is_file():
                history = read_object(path, _REMEDY).get("log_history", [])
                break
        results = read_object(folder / RESULTS_FILE, _REMEDY) if (folder / RESULTS_FILE).is_file() else {}
        return cls(folder, sparsity_report(folder), PruningState.find(folder), searches, history, results)

    def densities(self) -> tuple[list[str], list[str], dict[tuple[str, str], float]]:
        """(rows, columns, density by row and column) of the prunable tensors: rows are layers in order (with their
        stack, where there are several), columns what a layer consists of; a tensor outside layers has the row ""."""
        parsed = []
        for tensor in self.report.tensors:
            if tensor.prunable:
                match = _LAYER.match(tensor.name)
                stack, number, rest = match.groups() if match else ("", "", tensor.name.removesuffix(".weight"))
                parsed.append(((stack or "", int(number or 0)), number, rest, 1 - tensor.zeros / tensor.total))
        several = len({stack for (stack, _), _, _, _ in parsed}) > 1
        names = {layer: f"{layer[0]}{number}" if several else number for layer, number, _, _ in sorted(parsed)}
        found = {(names[layer], column): density for layer, _, column, density in parsed}
        return list(names.values()), list(dict.fromkeys(column for _, column in found)), found


def metrics_of(results: Mapping[str, object], prefix: str) -> dict[str, float]:
    """The scores among results whose keys begin with `prefix`, without it: no times, counts and losses."""
    found = {key.removeprefix(prefix): value for key, value in results.items() if key.startswith(prefix)}
    return {k: v for k, v in found.items() if not k.endswith(_NO_SCORES) and isinstance(v, int | float)}
