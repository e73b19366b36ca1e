r"""Compare methods over tasks, targets and seeds, from one dense model for each task and seed.

    python glue_scripts/compare.py --tasks sst2 mrpc --seeds 42 --methods magnitude taylor random --output_dir runs \
        --targets 0.9375 0.99 2:4 --recipe glue_scripts/recipes/compare_cpu.json --model_name_or_path MODEL \
        --data_dir DATA

Flags that this script does not know go to `run_glue.py`. `--own_flags mrpc:max_steps=200,dense_epochs=8
0.99:num_levels=8` adds flags for one task, target or method (`dense` counts as a method). `--variants
hot:method=taylor,num_candidates=1,learning_rate=4e-4` defines a method of your own. Add `--evaluate_held_out` to
compare variants without reading the validation split.

All methods of a task and seed start from the same dense model, distil from it, and train on the same rows for the same
number of steps. A method named `...-total` trains for fewer steps, so that its training and its search together cost
that number. Masks are chosen on rows held out of train. The validation split is read once, at the end of a cell.

A cell is one run with a folder of its own. `cell.json` holds its flags and results, `command.txt` holds the command
that repeats it. Finished cells are not run again, so the table can grow over several calls. A finished cell that was
made with other flags is refused. Several processes may share an output folder if no two run the same task and seed.
`--only_table` runs nothing and shows the finished cells.

`--records FILE` also writes every finished cell to one small file. With this file the table can grow on a machine that
does not have the folders: the dense model is trained again there and must give the same loss. Cells are compared by
their flags, so the paths of model and data must be the same everywhere (links in the working folder make them so).

The cost of a search is counted in training steps in fp32. Under `--bf16 True` training is faster and the refit is not
(see `benchmarks/refit.py`), so the table also shows the minutes of each cell.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tqdm.auto import tqdm
from transformers import set_seed

from arguments import parse_arguments, read_recipe
from cells import METHODS, TOTAL, Cell, names_of
from dense import check_recipe, dense_recipe, fine_tune_dense
from hf_maskselect.search.results import SEARCH_FILE, read_searches
from hf_maskselect.training.search_cost import Workload, search_cost
from hf_maskselect.utils.files import replacing
from job import prepare
from panel import write_panel
from records import CELL, Records, check_origin, read_cell, write_origin
from run_glue import run
from tasks import get_task


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the missing cells, print the tables, and write them with a picture to `output_dir`."""
    parser = make_parser()
    options, flags = parser.parse_known_args(arguments)
    recipe = read_recipe(Path(options.recipe)) if options.recipe else {}
    flags = [options.recipe, *flags] if options.recipe else flags
    try:
        methods = read_methods(options)
        keys = [*options.tasks, *options.targets, "dense", *(name for method in methods for name in names_of(method))]
        own = merged(parse_own_flags(text, keys) for text in options.own_flags)
    except ValueError as error:
        parser.error(str(error))
    cells = all_cells(options, methods)
    records = Records(options.output_dir, options.records, writes=not options.only_table)
    missing = []
    for cell in [] if options.only_table else cells:
        finished = records.find(cell)
        cell_flags = [*cell.flags(flags, own), *methods.get(cell.method, [])]
        made_by = {"recipe": recipe, "flags": cell_flags[1:] if options.recipe else cell_flags}
        if finished is not None and cell.method != "dense" and finished["told"] != made_by:
            parser.error(
                f"{records.where(cell)} was made with other flags ({finished['told']}): delete it, or choose another "
                "output_dir and other --records"
            )
        if finished is None or records.lacks(cell):
            missing.append((cell, cell_flags, made_by))
    bar = tqdm(
        missing,
        desc="cells",
        unit="cell",
        initial=len(cells) - len(missing),
        total=len(cells),
        disable=options.only_table,
    )
    dense_flags = {cell: cell.flags(flags, own) for cell in cells if cell.method == "dense"}
    failed = run_missing(bar, dense_flags, options.output_dir, records)
    shown = [cell for cell in cells if cell.method == "dense" or cell not in failed]
    results = {cell: finished["results"] for cell in shown if (finished := records.find(cell)) is not None}
    write_panel(options.output_dir, cells, results)
    if failed:
        sys.exit("\n".join(["", *failed.values()]))


def make_parser() -> argparse.ArgumentParser:
    """Parser of this script's own flags; all others belong to `run_glue.py`."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--targets", nargs="+", default=["0.9375"], help="sparsities and N:M patterns")
    default = [method for method in METHODS if not method.endswith(TOTAL)]
    parser.add_argument("--methods", nargs="+", default=default, choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--recipe", help="recipe file; flags override it")
    parser.add_argument(
        "--own_flags", nargs="*", default=[], help="key:flag=value,... for one task, target or method (or dense)"
    )
    parser.add_argument(
        "--variants", nargs="*", default=[], help="name:flag=value,... further methods, in addition to --methods"
    )
    parser.add_argument("--records", type=Path, help="file of finished cells, in addition to those in output_dir")
    parser.add_argument("--only_table", action="store_true", help="run nothing, show the finished cells")
    return parser


def read_methods(options: argparse.Namespace) -> dict[str, list[str]]:
    """Map each pruned method and variant to its flags.

    Raises:
        ValueError: a variant cannot be read, or has the name of a method.
    """
    variants = merged(parse_own_flags(text, [text.partition(":")[0]]) for text in options.variants)
    if taken := variants.keys() & METHODS.keys():
        raise ValueError(f"--variants {taken.pop()} is the name of a method: choose another")
    return {method: METHODS[method] for method in options.methods if method != "dense"} | variants


def all_cells(options: argparse.Namespace, methods: Iterable[str]) -> list[Cell]:
    """List the cells of the comparison, the dense ones first.

    Raises:
        ValueError: a task is unknown.
    """
    runs = [(get_task(task).name, seed) for task in options.tasks for seed in options.seeds]
    cells = [Cell(task, seed, None, "dense") for task, seed in runs]
    return cells + [
        Cell(task, seed, target, method) for task, seed in runs for target in options.targets for method in methods
    ]


def merged(pairs: Iterable[tuple[str, list[str]]]) -> dict[str, list[str]]:
    """Collect (key, flags) pairs in a dict; flags of a repeated key are appended."""
    flags_of: dict[str, list[str]] = {}
    for key, flags in pairs:
        flags_of.setdefault(key, []).extend(flags)
    return flags_of


def parse_own_flags(text: str, keys: Sequence[str]) -> tuple[str, list[str]]:
    """Split `"mrpc:max_steps=200,dense_epochs=8"` into its key, one of `keys`, and its flags for `run_glue.py`.

    Raises:
        ValueError: the text does not have this form.
    """
    key = next((key for key in sorted(keys, key=len, reverse=True) if text.startswith(f"{key}:")), None)
    if not key:
        raise ValueError(f"{text!r} must begin with one of {', '.join(filter(None, keys))} and a colon")
    split = [pair.partition("=") for pair in text[len(key) + 1 :].split(",")]
    if not all(name and value for name, _, value in split):
        raise ValueError(f"{text!r} must look like {key}:max_steps=200,dense_epochs=8")
    return key, [part for name, _, value in split for part in (f"--{name}", value)]


def run_missing(
    bar: tqdm, dense_flags: Mapping[Cell, list[str]], output_dir: Path, records: Records
) -> dict[Cell, str]:
    """Run cells one after the other, each after its dense model, and record them.

    Args:
        bar: progress bar over (cell, flags of `run_glue.py`, the entry `told` of its `cell.json`).
        dense_flags: flags of each dense cell.
        output_dir: root of the cells' folders.
        records: store of the finished cells.

    Returns:
        A message for each cell that failed. If a dense model fails, all cells that start from it are skipped.
    """
    dense_is_good: dict[Cell, bool] = {}
    failed: dict[Cell, str] = {}
    for cell, flags, made_by in bar:
        dense = cell.dense()
        bar.set_postfix_str(str(cell))
        if not dense_is_good.get(dense, True):
            continue
        try:
            if dense not in dense_is_good:  # also checks that a finished one was made with these flags
                dense_is_good[dense] = False
                run_dense(output_dir, dense, dense_flags[dense], records)
                dense_is_good[dense] = True
            if records.find(cell) is None:
                run_cell(output_dir, cell, flags, made_by)
            records.add(cell)
        except ValueError as error:
            skipped = cell if dense_is_good[dense] else f"{dense}, with all cells that start from it,"
            failed[cell] = f"{skipped} is left out: {error}"
            tqdm.write(failed[cell])
        gc.collect()
    return failed


def common_flags(cell: Cell) -> list[str]:
    """Flags of `run_glue.py` that every cell gets."""
    return ["--task_name", cell.task, "--seed", str(cell.seed), "--always_hold_out", "--save_strategy", "no"]


def run_dense(output_dir: Path, cell: Cell, flags: list[str], records: Records) -> None:
    """Fine-tune the dense model of a task and seed, or check that a finished one was made by the same recipe.

    Raises:
        ValueError: it was made by another recipe, or its loss differs from the one in the records.
    """
    folder = cell.folder(output_dir)
    set_seed(cell.seed)  # the new head is drawn at random, and earlier cells of this process have used the generator
    data, model, config = parse_arguments([*flags, *common_flags(cell), "--output_dir", str(folder.parent)])
    job, recorded = prepare(data, model, config), records.find(cell)
    if recorded is not None:
        check_recipe(recorded["told"], dense_recipe(job, model, config), records.where(cell))
    if read_cell(folder, cell.method) is None:  # a finished model keeps the command that made it
        if recorded is not None:
            check_origin(recorded["made_with"], config.device, records.where(cell))
        recipe = ["--recipe", flags[0], *flags[1:]] if flags and not flags[0].startswith("--") else flags
        choice = ["--methods", "dense", "--tasks", cell.task, "--seeds", str(cell.seed)]
        write_origin(folder, "compare.py", [*choice, "--output_dir", str(output_dir), *recipe], config.device)
    fine_tune_dense(job, model, config)
    loss = read_cell(folder, cell.method)["results"]["eval_loss"]
    if recorded is not None and loss != recorded["results"]["eval_loss"]:
        raise ValueError(
            f"{folder} has an eval_loss of {loss}, {records.where(cell)} of {recorded['results']['eval_loss']}: "
            f"delete {folder.parent} and start again on the kind of machine and with the versions that its line "
            "names, or choose other --records"
        )
    records.add(cell)


def run_cell(output_dir: Path, cell: Cell, flags: list[str], made_by: dict) -> None:
    """Train and evaluate one cell with the flags of `run_glue.py`; `made_by` becomes the entry `told` of its file."""
    folder, dense = cell.folder(output_dir), cell.dense().folder(output_dir)
    start = ["--model_name_or_path", str(dense), "--teacher_name_or_path", str(dense), "--output_dir", str(folder)]
    all_flags = [*flags, *common_flags(cell), *start]
    if cell.method.endswith(TOTAL):
        all_flags += ["--max_steps", str(affordable_steps(all_flags))]
    data, model, config = parse_arguments(all_flags)
    write_origin(folder, "run_glue.py", all_flags, config.device)
    began = time.monotonic()
    results = run(data, model, config)
    results["cell_seconds"] = round(time.monotonic() - began, 1)
    dense_loss = read_cell(dense, "dense")["results"]["eval_loss"]
    content = {"told": made_by, "results": results, "dense_eval_loss": dense_loss}
    if searches := [search for search in read_searches(folder / SEARCH_FILE) if len(search.candidates) > 1]:
        content["searches"] = [{c.proposal: c.scores[-1] for c in search.candidates} for search in searches]
    with replacing(folder / CELL) as temporary:  # written last, because this file marks the cell as finished
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True))


def affordable_steps(flags: Sequence[str]) -> int:
    """Largest number of training steps that costs at most `max_steps` together with its search.

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
        except ValueError:  # the plan does not fit into so few steps, nor into fewer
            break
    raise ValueError(
        f"the shortest run and its search cost more than {total} steps: raise max_steps, or lower num_candidates, "
        "criterion_batches, refit_rows or max_selection_samples"
    )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
