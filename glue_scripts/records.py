"""What is known of finished cells: in their own folders, and in one small file that goes where their models do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

if TYPE_CHECKING:
    from compare import Cell

CELL, COMMAND = "cell.json", "command.txt"
KEYS = ("task", "seed", "target", "method")


def read_cell(folder: Path, method: str) -> dict | None:
    """`told` and `results` of a cell that was finished in its folder; None of one that was not. The dense model is
    `run_glue.py`'s."""
    path = folder / ("all_results.json" if method == "dense" else CELL)
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    return {"told": json.loads((folder / "recipe.json").read_text()), "results": found} if method == "dense" else found


class Records:
    """Finished cells by their names.

    Args:
        output_dir: where the cells have their folders.
        path: a file of JSON lines, a cell each, which new ones are added to (several processes may do so); None: what
            is in the folders is all there is.

    Raises:
        ValueError: a line of the file is no cell.
    """

    def __init__(self, output_dir: Path, path: Path | None = None) -> None:
        self.path, self._output_dir = path, output_dir
        self._lines: dict[tuple, dict] = {}
        if path is None or not path.is_file():
            return
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            try:
                made = json.loads(line)
                key = tuple(made[name] for name in KEYS)
                self._lines[key] = {"told": dict(made["told"]), "results": dict(made["results"])}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"line {number} of {path} is no finished cell ({error}): delete that line") from error

    def find(self, cell: Cell) -> dict | None:
        """`told` and `results` of a finished cell, first of all as the file has them; None of one that is missing."""
        known = self._lines.get(self._key(cell))
        return read_cell(cell.folder(self._output_dir), cell.method) if known is None else known

    def add(self, cell: Cell) -> None:
        """Write a cell down that is finished in its folder, with its command and the versions that made it."""
        folder, key = cell.folder(self._output_dir), self._key(cell)
        if self.path is None or key in self._lines:
            return
        made = read_cell(folder, cell.method)
        self._lines[key] = made
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
        line = dict(zip(KEYS, key, strict=True)) | made | {"command": (folder / COMMAND).read_text().strip()}
        line["made_with"] = {"torch": torch.__version__, "transformers": transformers.__version__, "device": device}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")

    @staticmethod
    def _key(cell: Cell) -> tuple:
        return tuple(getattr(cell, name) for name in KEYS)
