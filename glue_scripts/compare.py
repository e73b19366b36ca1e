"""Methods x tasks x seeds, side by side, from one dense model each.

    python glue_scripts/compare.py --tasks sst2 mrpc --seeds 42 --methods magnitude taylor random --output_dir runs \\
        --recipe glue_scripts/recipes/compare_cpu.json --model_name_or_path MODEL --data_dir DATA

Every flag it does not know goes to `run_glue.py`; `--task_flags mrpc:max_steps=200,dense_epochs=8` gives one task its
own. Every cell is a folder with `all_results.json`: finished cells are not run again, so the table grows over several
sittings; one made with other flags is refused. All methods of a task and seed start from the same dense model, distil
from it, train on the same rows for the same number of steps, and choose only on rows held out of train; the
validation split is read once, when a cell is finished.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from arguments import parse_arguments
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
RESULT = "all_results.json"
FLAGS = "flags.json"  # what made a cell: one table never mixes recipes


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then print the table and write it to `output_dir/table.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--recipe", help="recipe file that the flags override")
    parser.add_argument(
        "--task_flags", nargs="*", default=[], help="task:flag=value,..., for tasks that need other values"
    )
    options, flags = parser.parse_known_args(arguments)
    flags = [options.recipe, *flags] if options.recipe else flags
    own = dict(parse_task_flags(text) for text in options.task_flags)
    if unknown := own.keys() - set(options.tasks):
        parser.error(f"--task_flags names {', '.join(sorted(unknown))}, which --tasks does not")
    methods = ["dense", *(m for m in options.methods if m != "dense")]  # the others start from it
    cells = [(task, seed, method) for task in options.tasks for seed in options.seeds for method in methods]
    for task in options.tasks:
        get_task(task)
    missing = []
    for task, seed, method in cells:
        folder, given = folder_of(options.output_dir, task, seed, method), [*flags, *own.get(task, [])]
        if not (folder / RESULT).is_file():
            missing.append((task, seed, method, given))
        elif method != "dense" and (made := json.loads((folder / FLAGS).read_text())) != given:
            parser.error(
                f"{folder} was made with other flags ({' '.join(made)}): delete it, or choose another output_dir"
            )
    for *cell, given in tqdm(missing, desc="cells", unit="cell"):
        run_cell(options.output_dir, *cell, given)
        gc.collect()
    table = make_table(options.output_dir, options.tasks, methods, options.seeds)
    (options.output_dir / "table.md").write_text(table + "\n")
    print(table)


def parse_task_flags(text: str) -> tuple[str, list[str]]:
    """`"mrpc:max_steps=200,dense_epochs=8"` -> the task and its flags for `run_glue.py`."""
    task, found, pairs = text.partition(":")
    split = [pair.partition("=") for pair in pairs.split(",")]
    if not found or not all(name and value for name, _, value in split):
        raise SystemExit(f"error: --task_flags {text!r} must look like mrpc:max_steps=200,dense_epochs=8")
    return task, [part for name, _, value in split for part in (f"--{name}", value)]


def folder_of(output_dir: Path, task: str, seed: int, method: str) -> Path:
    """Where a cell lies."""
    return output_dir / task / str(seed) / method


def run_cell(output_dir: Path, task: str, seed: int, method: str, flags: list[str]) -> None:
    """Train one cell from the flags of `run_glue.py`."""
    folder, dense = folder_of(output_dir, task, seed, method), folder_of(output_dir, task, seed, "dense")
    common = [*flags, "--task_name", task, "--seed", str(seed), "--always_hold_out", "--save_strategy", "no"]
    if method == "dense":
        data, model, config = parse_arguments([*common, "--output_dir", str(folder.parent)])
        fine_tune_dense(prepare(data, model, config), model, config)
        return
    start = ["--model_name_or_path", str(dense), "--teacher_name_or_path", str(dense), "--output_dir", str(folder)]
    began = time.monotonic()
    results = run(*parse_arguments([*common, *METHODS[method], *start]))
    results["cell_seconds"] = round(time.monotonic() - began, 1)
    (folder / FLAGS).write_text(json.dumps(flags))
    (folder / RESULT).write_text(json.dumps(results, indent=4, sort_keys=True))


def make_table(output_dir: Path, tasks: list[str], methods: list[str], seeds: list[int]) -> str:
    """Markdown: main metric (mean, standard deviation over seeds), retention against dense, sparsity, cost."""
    lines = [
        "| task | method | sparsity | metric | score | sd | of dense | search / training steps | minutes | seeds |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for task in tasks:
        metric = get_task(task).main_metric
        dense_mean = None
        for method in methods:
            paths = [folder_of(output_dir, task, seed, method) / RESULT for seed in seeds]
            results = [json.loads(path.read_text()) for path in paths if path.is_file()]
            if not results:
                continue
            scores = [r[f"eval_{metric}"] for r in results]
            mean = statistics.mean(scores)
            dense_mean = mean if method == "dense" else dense_mean
            spread = f"{100 * statistics.stdev(scores):.1f}" if len(scores) > 1 else "-"
            sparsity, cost, minutes = "0", "-", "-"
            if method != "dense":
                sparsity = f"{results[0]['eval_sparsity']:.4f}"
                cost = f"{statistics.mean(r['search_cost_ratio'] for r in results):.2f}"
                minutes = f"{statistics.mean(r['cell_seconds'] for r in results) / 60:.1f}"
            cells = [task, method, sparsity, metric, f"{100 * mean:.1f}", spread, f"{100 * mean / dense_mean:.1f} %"]
            lines.append("| " + " | ".join([*cells, cost, minutes, str(len(results))]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
