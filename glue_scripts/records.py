"""Finished cells, in their own folders and in one small file that can move to another machine."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers

import hf_maskselect
from cells import Cell
from dense import read_dense
from hf_maskselect.utils.reading import read_object

CELL, COMMAND, MADE_WITH = "cell.json", "command.txt", "made_with.json"


def read_cell(folder: Path, method: str) -> dict | None:
    """Read a finished cell from its folder.

    Returns:
        `told` (how it was made) and `results`; None for a cell that is not finished. A pruned cell also has the
        `dense_eval_loss` of its dense model and `searches`: for each level the last score of each proposal (lower is
        better).

    Raises:
        ValueError: one of its files cannot be read.
    """
    if method == "dense":
        return read_dense(folder)
    return read_object(folder / CELL, f"delete {folder}") if (folder / CELL).is_file() else None


def origin(device: torch.device) -> dict:
    """Versions, kind of device and number of threads: results depend on them (threads change the order of sums)."""
    kind = device.type
    if kind == "cuda":
        kind = torch.cuda.get_device_name(device)
    elif kind == "cpu":
        kind = torch.backends.cpu.get_cpu_capability()
    versions = {module.__name__: module.__version__ for module in (hf_maskselect, torch, transformers)}
    return versions | {"device": kind, "threads": torch.get_num_threads()}


def write_origin(folder: Path, script: str, flags: Sequence[str], device: torch.device) -> None:
    """Write the command that repeats a cell, and the origin of its results, before the run starts."""
    folder.mkdir(parents=True, exist_ok=True)
    threads = f"OMP_NUM_THREADS={torch.get_num_threads()}"
    (folder / COMMAND).write_text(f"{threads} python glue_scripts/{script} {shlex.join(flags)}\n")
    (folder / MADE_WITH).write_text(json.dumps(origin(device)))


def check_origin(made_with: Mapping, device: torch.device, where: str) -> None:
    """Refuse to repeat a cell on a machine that cannot give the same results.

    Raises:
        ValueError: it was made on another kind of device, or with another number of threads.
    """
    here = origin(device)
    for name in ("device", "threads"):
        if made_with.get(name) != here[name]:
            raise ValueError(
                f"{where} was made with {name} {made_with.get(name)}, this is {here[name]}: results are the same only "
                "on the same kind of machine with the same OMP_NUM_THREADS; go there, or choose other --records"
            )


class Records:
    """Store of the finished cells of a comparison.

    Args:
        output_dir: root of the cells' folders.
        path: a file with one JSON object a line, a cell each; new cells are appended (several processes may do so).
            None: only the folders are read.
        writes: whether cells will be added; if not, the file must exist.

    Raises:
        ValueError: the file cannot be read or written, a line is not a cell, or two lines of one cell differ.
    """

    def __init__(self, output_dir: Path, path: Path | None = None, writes: bool = True) -> None:
        self.path, self._output_dir = path, output_dir
        self._lines: dict[Cell, dict] = {}
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
        numbers: dict[Cell, int] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                entry = json.loads(line)
                cell = Cell(entry["task"], entry["seed"], entry["target"], entry["method"])
                entry |= {"told": dict(entry["told"]), "results": dict(entry["results"])}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"line {number} of {path} is not a cell ({error}): delete that line") from error
            if self._lines.setdefault(cell, entry) != entry:
                raise ValueError(
                    f"lines {numbers[cell]} and {number} of {path} differ on {cell}: delete the wrong one"
                )
            numbers.setdefault(cell, number)

    def find(self, cell: Cell) -> dict | None:
        """Return the cell's line in the file (which also has `made_with`), else `read_cell` of its folder."""
        line = self._lines.get(cell)
        return read_cell(cell.folder(self._output_dir), cell.method) if line is None else line

    def where(self, cell: Cell) -> str:
        """Name the place that `find` reads the cell from, for messages."""
        return f"{cell} in {self.path}" if cell in self._lines else str(cell.folder(self._output_dir))

    def lacks(self, cell: Cell) -> bool:
        """Return True if there is a file and the cell is not in it."""
        return self.path is not None and cell not in self._lines

    def add(self, cell: Cell) -> None:
        """Append a finished cell to the file, with its command and origin.

        Raises:
            ValueError: the cell's folder is incomplete, the cell was made from another dense model than the recorded
                one, or the file cannot be written.
        """
        if not self.lacks(cell):
            return
        folder = cell.folder(self._output_dir)
        entry = read_cell(folder, cell.method)
        if cell.method != "dense":
            dense = self.find(cell.dense())["results"]["eval_loss"]
            if entry.get("dense_eval_loss") != dense:
                raise ValueError(
                    f"{folder} was made from a dense model with an eval_loss of {entry.get('dense_eval_loss')}, which "
                    f"now has {dense}: delete that folder to make the cell again"
                )
        try:
            command = (folder / COMMAND).read_text().strip()
            made_with = json.loads((folder / MADE_WITH).read_text())
        except FileNotFoundError as error:
            remedy = "the folder of its seed" if cell.method == "dense" else "its folder"
            raise ValueError(f"{error.filename} is missing: delete {remedy} to make the cell again") from error
        line = dataclasses.asdict(cell) | entry | {"command": command, "made_with": made_with}
        try:
            with self.path.open("a+b") as file:
                torn = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n"
                file.write(b"\n" * torn + json.dumps(line, sort_keys=True).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ValueError(
                f"--records {self.path} cannot be written ({error.strerror}): the cell is finished in {folder}, and "
                "the next call records it"
            ) from error
        self._lines[cell] = line
