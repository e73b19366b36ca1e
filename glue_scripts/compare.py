"""Methods x tasks x targets x seeds, side by side, from one dense model for each task and seed.

    python glue_scripts/compare.py --tasks sst2 mrpc --seeds 42 --methods magnitude taylor random --output_dir runs \\
        --targets 0.9375 0.99 2:4 --recipe glue_scripts/recipes/compare_cpu.json --model_name_or_path MODEL \\
        --data_dir DATA

Every flag it does not know goes to `run_glue.py`; `--own_flags mrpc:max_steps=200,dense_epochs=8 0.99:num_levels=8`
gives one task, target or method (also `dense`) its own, and `--variants hot:method=taylor,num_candidates=1,
learning_rate=4e-4` (in one word) makes methods of your own (add `--evaluate_held_out` to choose between them). All
methods of a task and seed start from the same dense model, distil from it, train on the same rows for the same number
of steps (a method named `...-total` for so many less that its search is paid from the same steps), and choose only on
rows held out of train; the validation split is read once, when a cell is finished.

Every cell is a folder with `cell.json` (what it was made by, and its results) and `command.txt`, which makes it again.
Finished cells are not run again, so the table grows over several sittings; one made with other flags is refused.
Several processes may share an output folder if no two run the same task and seed; `--only_table` shows what is there.
`--records FILE` keeps what is known of every cell in one small file as well, so that the table goes on growing on a
machine that does not have the folders: a dense model is then made again, and must be the same. (Cells are known by
their flags: the paths of model and data must be the same everywhere, for which links in the working folder are good.)

A search is counted in steps of fp32 training. Under `--bf16 True` these are shorter and its fits are not (see
`benchmarks/refit.py`): what a cell took by the clock, `cell_seconds`, is in the table beside its steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm
from transformers import set_seed

from arguments import parse_arguments, read_recipe
from dense import check_recipe, dense_recipe, fine_tune_dense
from hf_maskselect.search.results import SEARCH_FILE, read_searches
from hf_maskselect.training.search_cost import Workload, search_cost
from hf_maskselect.utils.files import replacing
from job import prepare
from panel import write_panel
from records import CELL, Records, check_origin, read_cell, write_origin
from run_glue import run
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then print the tables and write them to `output_dir`, with a picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--targets", nargs="+", default=["0.9375"], help="sparsities and N:M patterns")
    plain = [method for method in METHODS if not method.endswith(TOTAL)]
    parser.add_argument("--methods", nargs="+", default=plain, choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--recipe", help="recipe file that the flags override")
    parser.add_argument(
        "--own_flags",
        nargs="*",
        default=[],
        help="key:flag=value,... for a task, target or method (dense, too) that needs others",
    )
    parser.add_argument(
        "--variants", nargs="*", default=[], help="name:flag=value,... methods of your own, beside --methods"
    )
    parser.add_argument("--records", type=Path, help="file of finished cells, beside those in output_dir")
    parser.add_argument("--only_table", action="store_true", help="run nothing, show what is finished")
    options, flags = parser.parse_known_args(arguments)
    recipe = read_recipe(Path(options.recipe)) if options.recipe else {}
    flags = [options.recipe, *flags] if options.recipe else flags
    methods = {method: METHODS[method] for method in options.methods if method != "dense"}
    try:
        variants = merged(parse_own_flags(text, [text.partition(":")[0]]) for text in options.variants)
        if taken := variants.keys() & METHODS.keys():
            raise ValueError(f"--variants {taken.pop()} is the name of a method: choose another")
        methods |= variants
        keys = [*options.tasks, *options.targets, "dense", *(name for method in methods for name in names_of(method))]
        own = merged(parse_own_flags(text, keys) for text in options.own_flags)
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
    records = Records(options.output_dir, options.records, writes=not options.only_table)
    work = []
    for cell in [] if options.only_table else cells:
        made = records.find(cell)
        given = [*cell.flags(flags, own), *methods.get(cell.method, [])]
        told = {"recipe": recipe, "flags": given[1:] if options.recipe else given}
        if made is not None and cell.method != "dense" and made["told"] != told:
            parser.error(
                f"{records.where(cell)} was made with other flags ({made['told']}): delete it, or choose another "
                "output_dir and other --records"
            )
        if made is None or records.lacks(cell):
            work.append((cell, given, told))
    checked: dict[Cell, bool] = {}
    failed: dict[Cell, str] = {}
    done = len(cells) - len(work)
    bar = tqdm(work, desc="cells", unit="cell", initial=done, total=len(cells), disable=options.only_table)
    for cell, given, told in bar:
        dense = dataclasses.replace(cell, target=None, method="dense")
        bar.set_postfix_str(str(cell))
        if not checked.get(dense, True):
            continue
        try:
            if dense not in checked:  # what all others start from must have been made with these flags too
                checked[dense] = False
                run_dense(options.output_dir, dense, dense.flags(flags, own), records)
                checked[dense] = True
            if records.find(cell) is None:
                run_cell(options.output_dir, cell, given, told)
            records.add(cell)
        except ValueError as error:
            left = cell if checked[dense] else f"{dense}, with all that starts from it,"
            failed[cell] = f"{left} is left out: {error}"
            tqdm.write(failed[cell])
        gc.collect()
    whole = [cell for cell in cells if cell.method == "dense" or cell not in failed]
    found = {cell: made["results"] for cell in whole if (made := records.find(cell)) is not None}
    write_panel(options.output_dir, cells, found)
    if failed:
        sys.exit("\n".join(["", *failed.values()]))


def merged(pairs: Iterable[tuple[str, list[str]]]) -> dict[str, list[str]]:
    """As a dict; where a key comes again, its flags are added."""
    found: dict[str, list[str]] = {}
    for key, flags in pairs:
        found.setdefault(key, []).extend(flags)
    return found


def names_of(method: str) -> list[str]:
    """Whose own flags a method takes: those of `random` are also those of `random-total`."""
    return list(dict.fromkeys((method.removesuffix(TOTAL), method)))


def parse_own_flags(text: str, keys: Sequence[str]) -> tuple[str, list[str]]:
    """`"mrpc:max_steps=200,dense_epochs=8"` -> its key, one of `keys`, and its flags for `run_glue.py`.

    Raises:
        ValueError: it does not look like that.
    """
    key = next((key for key in sorted(keys, key=len, reverse=True) if text.startswith(f"{key}:")), None)
    if not key:
        raise ValueError(f"{text!r} must begin with one of {', '.join(filter(None, keys))} and a colon")
    split = [pair.partition("=") for pair in text[len(key) + 1 :].split(",")]
    if not all(name and value for name, _, value in split):
        raise ValueError(f"{text!r} must look like {key}:max_steps=200,dense_epochs=8")
    return key, [part for name, _, value in split for part in (f"--{name}", value)]


def common_flags(cell: Cell) -> list[str]:
    """Those of `run_glue.py` that every cell gets."""
    return ["--task_name", cell.task, "--seed", str(cell.seed), "--always_hold_out", "--save_strategy", "no"]


def run_dense(output_dir: Path, cell: Cell, flags: list[str], records: Records) -> None:
    """Fine-tune the dense model of a task and seed; of a finished one see that it was made by the same recipe.

    Raises:
        ValueError: it was not, or it is not the model that the cells in the records were made from.
    """
    folder = cell.folder(output_dir)
    set_seed(cell.seed)  # the head is drawn: whatever else this process has run
    data, model, config = parse_arguments([*flags, *common_flags(cell), "--output_dir", str(folder.parent)])
    job, known = prepare(data, model, config), records.find(cell)
    if known is not None:
        check_recipe(known["told"], dense_recipe(job, model, config), records.where(cell))
    if read_cell(folder, cell.method) is None:  # the command of a finished one is the one that made it
        if known is not None:
            check_origin(known["made_with"], config.device, records.where(cell))
        recipe = ["--recipe", flags[0], *flags[1:]] if flags and not flags[0].startswith("--") else flags
        which = ["--methods", "dense", "--tasks", cell.task, "--seeds", str(cell.seed)]
        write_origin(folder, "compare.py", [*which, "--output_dir", str(output_dir), *recipe], config.device)
    fine_tune_dense(job, model, config)
    found = read_cell(folder, cell.method)["results"]["eval_loss"]
    if known is not None and found != known["results"]["eval_loss"]:
        raise ValueError(
            f"{folder} has an eval_loss of {found}, {records.where(cell)} of {known['results']['eval_loss']}: delete "
            f"{folder.parent} and start again on the kind of machine and with the versions that its line names, or "
            "choose other --records"
        )
    records.add(cell)


def run_cell(output_dir: Path, cell: Cell, flags: list[str], told: dict) -> None:
    """Train one cell from the flags of `run_glue.py`. told: what is written down of how it was made."""
    folder, dense = cell.folder(output_dir), Cell(cell.task, cell.seed, None, "dense").folder(output_dir)
    start = ["--model_name_or_path", str(dense), "--teacher_name_or_path", str(dense), "--output_dir", str(folder)]
    given = [*flags, *common_flags(cell), *start]
    if cell.method.endswith(TOTAL):
        given += ["--max_steps", str(affordable_steps(given))]
    data, model, config = parse_arguments(given)
    write_origin(folder, "run_glue.py", given, config.device)
    began = time.monotonic()
    results = run(data, model, config)
    results["cell_seconds"] = round(time.monotonic() - began, 1)
    made = {"told": told, "results": results, "dense_eval_loss": read_cell(dense, "dense")["results"]["eval_loss"]}
    if searches := [search for search in read_searches(folder / SEARCH_FILE) if len(search.candidates) > 1]:
        made["searches"] = [{c.proposal: c.scores[-1] for c in search.candidates} for search in searches]
    with replacing(folder / CELL) as temporary:  # last: with it the cell is finished
        temporary.write_text(json.dumps(made, indent=1, sort_keys=True))


def affordable_steps(flags: Sequence[str]) -> int:
    """The most training steps that together with their search are no more than `max_steps`.

    Raises:
        ValueError: even the shortest run costs more.
    """
    data, model, config = parse_arguments(flags)
    job, total = prepare(data, model, config), config.max_steps
    soft_labels = not job.task.is_regression and config.distill_logits > 0
    settings = config.resolved()
    teaches = soft_labels and settings.selection_metric in (None, "teacher")
    work = Workload(config, 1, 1, len(job.train) + len(job.selection), teaches)
    for steps in range(total, len(settings.levels) - 1, -1):
        config.max_steps = steps
        try:
            if steps + search_cost(work, 1).compute <= total:
                return steps
        except ValueError:  # the plan does not fit into so few steps, and into fewer still less
            break
    raise ValueError(
        f"no run is so short that it and its search take {total} steps: raise max_steps, or lower num_candidates, "
        "criterion_batches, refit_rows or max_selection_samples"
    )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
