"""What is known of finished cells: in their own folders, and in one small file that goes where their models do not."""

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
from hf_maskselect.utils.files import read_object

CELL, COMMAND, MADE_WITH = "cell.json", "command.txt", "made_with.json"
KEYS = ("task", "seed", "target", "method")


def read_cell(folder: Path, method: str) -> dict | None:
    """`told` and `results` of a cell that was finished in its folder; None of one that was not. A pruned one has also
    the `dense_eval_loss` of the model it was made from and its `searches`: of each level the last score by proposal,
    lower is better.

    Raises:
        ValueError: a file of it cannot be read.
    """
    if method == "dense":
        return read_dense(folder)
    return read_object(folder / CELL, f"delete {folder}") if (folder / CELL).is_file() else None


def origin(device: torch.device) -> dict:
    """What results depend on beside flags: versions, the kind of device, and the number of threads, as sums do."""
    kind = device.type
    if kind == "cuda":
        kind = torch.cuda.get_device_name(device)
    elif kind == "cpu":
        kind = torch.backends.cpu.get_cpu_capability()
    versions = {module.__name__: module.__version__ for module in (hf_maskselect, torch, transformers)}
    return versions | {"device": kind, "threads": torch.get_num_threads()}


def write_origin(folder: Path, script: str, flags: Sequence[str], device: torch.device) -> None:
    """Write down, as its run begins, how to make a cell again."""
    folder.mkdir(parents=True, exist_ok=True)
    threads = f"OMP_NUM_THREADS={torch.get_num_threads()}"
    (folder / COMMAND).write_text(f"{threads} python glue_scripts/{script} {shlex.join(flags)}\n")
    (folder / MADE_WITH).write_text(json.dumps(origin(device)))


def check_origin(made_with: Mapping, device: torch.device, where: str) -> None:
    """Refuse to make a cell again where it cannot become the same.

    Raises:
        ValueError: it was made on another kind of device, or with another number of threads.
    """
    here = origin(device)
    for name in ("device", "threads"):
        if made_with.get(name) != here[name]:
            raise ValueError(
                f"{where} was made with {name} {made_with.get(name)}, this is {here[name]}: it becomes the same only "
                "on the same kind of machine with the same OMP_NUM_THREADS; go there, or choose other --records"
            )


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
                known = made | {"told": dict(made["told"]), "results": dict(made["results"])}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"line {number} of {path} is no finished cell ({error}): delete that line") from error
            if self._lines.setdefault(key, known) != known:
                name = " ".join(str(part) for part in key if part is not None)
                raise ValueError(
                    f"lines {first[key]} and {number} of {path} tell of {name} otherwise: delete the wrong one"
                )
            first.setdefault(key, number)

    def find(self, cell: Cell) -> dict | None:
        """What `read_cell` gives, first of all as the file has it, there with `made_with`."""
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
            ValueError: the folder does not tell it, the cell was made from another dense model than the one that is
                known, or the file cannot be written.
        """
        if not self.lacks(cell):
            return
        folder, key = cell.folder(self._output_dir), self._key(cell)
        made = read_cell(folder, cell.method)
        if cell.method != "dense":
            dense = self.find(dataclasses.replace(cell, target=None, method="dense"))["results"]["eval_loss"]
            if made.get("dense_eval_loss") != dense:
                raise ValueError(
                    f"{folder} was made from a dense model with an eval_loss of {made.get('dense_eval_loss')}, which "
                    f"now has {dense}: delete that folder, and the cell is made again"
                )
        try:
            command = (folder / COMMAND).read_text().strip()
            made_with = json.loads((folder / MADE_WITH).read_text())
        except FileNotFoundError as error:
            remedy = "the folder of its seed" if cell.method == "dense" else "its folder"
            raise ValueError(f"{error.filename} is missing: delete {remedy}, and the cell is made again") from error
        line = dict(zip(KEYS, key, strict=True)) | made | {"command": command, "made_with": made_with}
        try:
            with self.path.open("a+b") as file:
                torn = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n"
                file.write(b"\n" * torn + json.dumps(line, sort_keys=True).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ValueError(
                f"--records {self.path} cannot be written ({error.strerror}): the cell is finished in {folder}, from "
                "where the next start records it"
            ) from error
        self._lines[key] = line

    @staticmethod
    def _key(cell: Cell) -> tuple:
        return tuple(getattr(cell, name) for name in KEYS)
