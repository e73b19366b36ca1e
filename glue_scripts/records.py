"""What is known of finished cells: in their own folders, and in one small file that goes where their models do not."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

import hf_maskselect

if TYPE_CHECKING:
    from compare import Cell

CELL, COMMAND, MADE_WITH = "cell.json", "command.txt", "made_with.json"
KEYS = ("task", "seed", "target", "method")


def read_cell(folder: Path, method: str) -> dict | None:
    """`told` and `results` of a cell that was finished in its folder; None of one that was not. The dense model is
    `run_glue.py`'s."""
    path = folder / ("all_results.json" if method == "dense" else CELL)
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    return {"told": json.loads((folder / "recipe.json").read_text()), "results": found} if method == "dense" else found


def write_origin(folder: Path, script: str, flags: Sequence[str], device: torch.device) -> None:
    """Write down, as its run begins, how to make a cell again: the command, the versions and the kind of device."""
    folder.mkdir(parents=True, exist_ok=True)
    threads = f"OMP_NUM_THREADS={torch.get_num_threads()}"  # sums depend on it
    (folder / COMMAND).write_text(f"{threads} python glue_scripts/{script} {shlex.join(flags)}\n")
    versions = {module.__name__: module.__version__ for module in (hf_maskselect, torch, transformers)}
    kind = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else torch.cuda.get_device_name(device)
    (folder / MADE_WITH).write_text(json.dumps(versions | {"device": kind}))


class Records:
    """Finished cells by their names.

    Args:
        output_dir: where the cells have their folders.
        path: a file of JSON lines, a cell each, which new ones are added to (several processes may do so); None: what
            is in the folders is all there is.
        writes: whether cells will be added; if not, the file must be there.

    Raises:
        ValueError: the file cannot be read or written, a line of it is no cell, or two lines tell of the same cell
            otherwise.
    """

    def __init__(self, output_dir: Path, path: Path | None = None, writes: bool = True) -> None:
        self.path, self._output_dir = path, output_dir
        self._lines: dict[tuple, dict] = {}
        if path is None:
            return
        try:
            if writes:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.open("a").close()
            text = path.read_text()
        except OSError as error:
            raise ValueError(
                f"--records {path} cannot be {'written' if writes else 'read'}: {error.strerror}"
            ) from error
        first: dict[tuple, int] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                made = json.loads(line)
                key = tuple(made[name] for name in KEYS)
                known = {"told": dict(made["told"]), "results": dict(made["results"])}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"line {number} of {path} is no finished cell ({error}): delete that line") from error
            if self._lines.setdefault(key, known) != known:
                name = " ".join(map(str, filter(None, key)))
                raise ValueError(
                    f"lines {first[key]} and {number} of {path} tell of {name} otherwise: delete the wrong one"
                )
            first.setdefault(key, number)

    def find(self, cell: Cell) -> dict | None:
        """`told` and `results` of a finished cell, first of all as the file has them; None of one that is missing."""
        known = self._lines.get(self._key(cell))
        return read_cell(cell.folder(self._output_dir), cell.method) if known is None else known

    def where(self, cell: Cell) -> str:
        """What `find` knows of it comes from there."""
        recorded = self._key(cell) in self._lines
        return f"{cell} in {self.path}" if recorded else str(cell.folder(self._output_dir))

    def lacks(self, cell: Cell) -> bool:
        """Whether there is a file, and the cell not in it."""
        return self.path is not None and self._key(cell) not in self._lines

    def add(self, cell: Cell) -> None:
        """Write a cell down that is finished in its folder, with its origin.

        Raises:
            ValueError: the folder does not tell it.
        """
        if not self.lacks(cell):
            return
        folder, key = cell.folder(self._output_dir), self._key(cell)
        made = read_cell(folder, cell.method)
        try:
            command = (folder / COMMAND).read_text().strip()
            made_with = json.loads((folder / MADE_WITH).read_text())
        except FileNotFoundError as error:
            raise ValueError(f"{error.filename} is missing: delete its folder, and the cell is made again") from error
        self._lines[key] = made
        line = dict(zip(KEYS, key, strict=True)) | made | {"command": command, "made_with": made_with}
        torn = self.path.read_bytes()[-1:] not in (b"", b"\n")  # as a write that was interrupted leaves it
        with self.path.open("ab") as file:
            file.write(b"\n" * torn + json.dumps(line, sort_keys=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _key(cell: Cell) -> tuple:
        return tuple(getattr(cell, name) for name in KEYS)
