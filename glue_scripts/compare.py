"""Methods x tasks x targets x seeds, side by side, from one dense model for each task and seed.

    python glue_scripts/compare.py --tasks sst2 mrpc --seeds 42 --methods magnitude taylor random --output_dir runs \\
        --targets 0.9375 0.99 2:4 --recipe glue_scripts/recipes/compare_cpu.json --model_name_or_path MODEL \\
        --data_dir DATA

Every flag it does not know goes to `run_glue.py`; `--own_flags mrpc:max_steps=200,dense_epochs=8 0.99:num_levels=8`
gives one task, target or method its own, and `--variants hot:method=taylor,num_candidates=1,learning_rate=4e-4` makes
methods of your own (add `--evaluate_held_out` to choose between them). All methods of a task and seed start from the
same dense model, distil from it, train on the same rows for the same number of steps (a method named `...-total` for
so many less that its search is paid from the same steps), and choose only on rows held out of train; the validation
split is read once, when a cell is finished.

Every cell is a folder with `all_results.json` and `command.txt`, which makes it again. Finished cells are not run
again, so the table grows over several sittings; one made with other flags is refused.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from arguments import parse_arguments
from hf_maskselect.cost import Workload, search_cost
from panel import RESULT, write_panel
from run_glue import fine_tune_dense, prepare, run
from tasks import get_task

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
FLAGS = "flags.json"  # what made a cell: one table never mixes recipes
COMMAND = "command.txt"


@dataclass(frozen=True)
class Cell:
    """One run. target: a sparsity or an N:M pattern; None for the dense model."""

    task: str
    seed: int
    target: str | None
    method: str

    def folder(self, output_dir: Path) -> Path:
        """Where it lies."""
        target = [] if self.target is None else [self.target.replace(":", "of")]
        return output_dir.joinpath(self.task, str(self.seed), *target, self.method)

    def flags(self, common: Sequence[str], own: dict[str, list[str]]) -> list[str]:
        """Those of `run_glue.py`: for all, of its target, then what is its own."""
        target = [] if self.target is None else ["--pattern" if ":" in self.target else "--sparsity", self.target]
        keys = [key for key in (self.task, self.target, self.method.removesuffix(TOTAL)) if key in own]
        return [*common, *target, *(flag for key in keys for flag in own[key])]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then print the tables and write them to `output_dir`, with a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--targets", nargs="+", default=["0.9375"], help="sparsities and N:M patterns")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--recipe", help="recipe file that the flags override")
    parser.add_argument(
        "--own_flags", nargs="*", default=[], help="key:flag=value,... for a task, target or method that needs others"
    )
    parser.add_argument(
        "--variants", nargs="*", default=[], help="name:flag=value,... methods of your own, beside --methods"
    )
    options, flags = parser.parse_known_args(arguments)
    flags = [options.recipe, *flags] if options.recipe else flags
    methods = {method: METHODS[method] for method in options.methods if method != "dense"}
    try:
        methods |= dict(parse_own_flags(text, [text.partition(":")[0]]) for text in options.variants)
        keys = [*options.tasks, *options.targets, *methods]
        own = dict(parse_own_flags(text, keys) for text in options.own_flags)
    except ValueError as error:
        parser.error(str(error))
    for task in options.tasks:
        get_task(task)
    cells = [Cell(task, seed, None, "dense") for task in options.tasks for seed in options.seeds]
    cells += [
        Cell(task, seed, target, method)
        for task in options.tasks
        for seed in options.seeds
        for target in options.targets
        for method in methods
    ]
    missing = []
    for cell in cells:
        folder, given = cell.folder(options.output_dir), cell.flags(flags, own)
        expected = [*given, *methods.get(cell.method, [])]
        if not (folder / RESULT).is_file():
            missing.append((cell, given))
        elif cell.method != "dense" and (made := json.loads((folder / FLAGS).read_text())) != expected:
            parser.error(
                f"{folder} was made with other flags ({' '.join(made)}): delete it, or choose another output_dir"
            )
    bar = tqdm(missing, desc="cells", unit="cell", initial=len(cells) - len(missing), total=len(cells))
    for cell, given in bar:
        bar.set_postfix_str(" ".join(map(str, (cell.task, cell.seed, cell.target or "", cell.method))))
        run_cell(options.output_dir, cell, given, methods.get(cell.method, []))
        gc.collect()
    write_panel(options.output_dir, cells)


def parse_own_flags(text: str, keys: Sequence[str]) -> tuple[str, list[str]]:
    """`"mrpc:max_steps=200,dense_epochs=8"` -> its key, one of `keys`, and its flags for `run_glue.py`.

    Raises:
        ValueError: it does not look like that.
    """
    key = next((key for key in keys if text.startswith(f"{key}:")), None)
    if key is None:
        raise ValueError(f"--own_flags {text!r} must begin with one of {', '.join(keys)} and a colon")
    split = [pair.partition("=") for pair in text[len(key) + 1 :].split(",")]
    if not all(name and value for name, _, value in split):
        raise ValueError(f"--own_flags {text!r} must look like {key}:max_steps=200,dense_epochs=8")
    return key, [part for name, _, value in split for part in (f"--{name}", value)]


def run_cell(output_dir: Path, cell: Cell, flags: list[str], method: list[str]) -> None:
    """Train one cell from the flags of `run_glue.py`, those of its method last."""
    folder, dense = cell.folder(output_dir), Cell(cell.task, cell.seed, None, "dense").folder(output_dir)
    common = [*flags, "--task_name", cell.task, "--seed", str(cell.seed), "--always_hold_out", "--save_strategy", "no"]
    if cell.method == "dense":
        data, model, config = parse_arguments([*common, "--output_dir", str(folder.parent)])
        fine_tune_dense(prepare(data, model, config), model, config)
        return
    start = ["--model_name_or_path", str(dense), "--teacher_name_or_path", str(dense), "--output_dir", str(folder)]
    given = [*common, *method, *start]
    if cell.method.endswith(TOTAL):
        given += ["--max_steps", str(affordable_steps(given))]
    threads = f"OMP_NUM_THREADS={torch.get_num_threads()} "  # sums depend on it
    folder.mkdir(parents=True, exist_ok=True)
    (folder / COMMAND).write_text(f"{threads}python glue_scripts/run_glue.py {shlex.join(given)}\n")
    began = time.monotonic()
    results = run(*parse_arguments(given))
    results["cell_seconds"] = round(time.monotonic() - began, 1)
    (folder / FLAGS).write_text(json.dumps([*flags, *method]))
    (folder / RESULT).write_text(json.dumps(results, indent=4, sort_keys=True))


def affordable_steps(flags: Sequence[str]) -> int:
    """The most training steps that together with their search are no more than `max_steps`.

    Raises:
        ValueError: even the shortest run costs more.
    """
    data, model, config = parse_arguments(flags)
    job, total = prepare(data, model, config), config.max_steps
    teaches = not job.task.is_regression and config.selection_metric in (None, "teacher")
    work = Workload(config, 1, 1, len(job.train) + len(job.selection), teaches)
    for steps in range(total, len(config.levels) - 1, -1):
        config.max_steps = steps
        if steps + search_cost(work, 1).compute <= total:
            return steps
    raise ValueError(
        f"no run is so short that it and its search take {total} steps: raise max_steps, or lower num_candidates or "
        "criterion_batches"
    )


if __name__ == "__main__":
    main()
