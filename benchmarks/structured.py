"""Smaller models by `shrink_model` and by three simpler methods, at one measured speed-up, with one fine-tuning.

The dense models are cells of `glue_scripts/compare.py`. Every method makes a plain BERT shape from 2,000 rows of
train. Its width is found with the package's own table of times, and then measured and changed until it meets the
speed-up. Layer drop and the methods below it share the table of all tasks, whose dense models must have one shape.

* ours: `shrink_model`. With `--keep_shape free` heads go too, and each layer has its own width.
* layers: whole layers go, the last ones or every second one, whichever diverges less on held-out rows. As many go as
  leave the others three quarters of their width or more.
* magnitude: all layers stay. The neurons with the least |weights x gradients| go, summed over batches, as in
  TextPruner (arXiv 2203.15996).
* kwon: all layers stay. Neurons go by the Fisher information of a mask on them, alone or with exchanges among them,
  whichever diverges less on held-out rows. Then each neuron and head gets one scale, by least squares to the dense
  sublayer's output with its residual (Kwon et al., arXiv 2204.09656).

The published forms of the last two also remove heads, and not as many neurons from each layer. A plain BERT
configuration cannot say that. Each model is scored on dev as made, and after the same fine-tuning on labels. At the
end all models of a task are timed in turns, by the processor time of one thread. Finished cells are kept in --work.

    OMP_NUM_THREADS=1 python benchmarks/structured.py --runs runs --data_dir DATA --tasks mrpc sst2 stsb
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "glue_scripts"))

from common import QUIET, machine
from structured_methods import METHODS, TIMED, Start

from arguments import parse_arguments, read_recipe
from cells import Cell
from cpu_model import logits_of, score
from dense import read_dense
from hf_maskselect.runtime.files import cpu_name
from hf_maskselect.utils.clock import least_seconds
from hf_maskselect.utils.tables import text_table
from job import prepare

SECONDS = 20.0  # spent on timing each model


class Task:
    """A task with its rows and its dense model, which are read when they are needed."""

    def __init__(self, name: str, seed: int, args: argparse.Namespace) -> None:
        folder = Cell(name, seed, None, "dense").folder(args.runs)
        made = read_dense(folder)
        if made is None:
            raise ValueError(f"{folder} has no finished dense model: run compare.py --methods dense first")
        flags = ["--task_name", name, "--seed", str(seed), "--always_hold_out", "--bf16", "False", "--use_cpu"]
        flags += ["--model_name_or_path", str(folder), "--output_dir", str(args.work)]
        flags += ["--data_dir", args.data_dir] if args.data_dir else []
        data, model, self.config = parse_arguments(flags, read_recipe(args.recipe))
        job = self.job = prepare(data, model, self.config)
        if len(job.train) != made["told"]["train_rows"]:
            raise ValueError(
                f"{folder} was trained on {made['told']['train_rows']} rows, and these are {len(job.train)}: give the "
                "recipe that made it with --recipe"
            )
        self.dense_score = 100 * made["results"][f"eval_{job.task.main_metric}"]
        rows = job.train.shuffle(seed=seed).select(range(min(args.rows, len(job.train))))
        dense = load(folder)
        self.times = args.work / "times.json"
        times = json.loads(self.times.read_text()) if self.times.is_file() else {}
        self.start = Start(dense, rows, job.selection, job.collator, args.speedup, args.keep_shape, seed, times)

    def score(self, model: PreTrainedModel) -> float:
        """Return the main metric on dev, in points."""
        rows, size = next(iter(self.job.evaluation.values())), self.config.per_device_eval_batch_size
        return 100 * score(logits_of(model), self.job, rows, size)[self.job.task.main_metric]

    def train(self, model: PreTrainedModel, args: argparse.Namespace) -> None:
        """Fine-tune a model on the labels, with plain `Trainer`."""
        arguments = TrainingArguments(
            output_dir=str(args.work / "trainer"),
            max_steps=args.steps,
            per_device_train_batch_size=16,
            learning_rate=5e-5,
            warmup_steps=0.1,
            train_sampling_strategy="group_by_length",
            use_cpu=True,
            seed=self.config.seed,
            **QUIET,
        )
        Trainer(model, arguments, train_dataset=self.job.train, **self.job.trainer_arguments).train()
        model.eval()


def load(folder: Path) -> PreTrainedModel:
    """Load a model in float32 to use it."""
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


def measure(task: Task, method: str, folder: Path, args: argparse.Namespace) -> dict:
    """Make, score, fine-tune and score one model, save it, and return its cell."""
    start, cell = task.start, {"dense": task.dense_score, "shape": "not reached"}
    shared = 0.0 if method == "ours" else start.preparation
    begin = time.process_time()
    made = METHODS[method](start)
    task.times.parent.mkdir(parents=True, exist_ok=True)
    task.times.write_text(json.dumps(start.times))
    if made is None:
        return cell
    small, shape = made
    cell |= {"shape": str(shape), "seconds": shared + time.process_time() - begin}
    small.eval()
    cell |= {"made": task.score(small), "made_divergence": start.divergence(small)}
    begin = time.process_time()
    task.train(small, args)
    cell["train_seconds"] = time.process_time() - begin
    small.save_pretrained(folder)
    return cell | {"trained": task.score(small), "trained_divergence": start.divergence(small)}


def time_models(task: Task, folders: dict[str, Path]) -> dict[str, float]:
    """Return the milliseconds of the dense model and of each method's, timed in turns."""
    models = {"dense": task.start.dense} | {name: load(folder) for name, folder in folders.items()}
    jobs = {name: partial(model, **task.start.timed) for name, model in models.items()}
    with torch.inference_mode():
        return {name: 1000 * seconds for name, seconds in least_seconds(jobs, SECONDS).items()}


def finish(name: str, seed: int, folder: Path, args: argparse.Namespace) -> dict[str, dict]:
    """Return the cells of a task and seed by method, each with its milliseconds, and make those that are missing."""
    task, cells = None, {}
    for method in args.methods:
        file = folder / method / "cell.json"
        if not file.is_file():
            task = task or Task(name, seed, args)
            cell = measure(task, method, file.parent, args)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(cell))
        cells[method] = json.loads(file.read_text())
        print(name, seed, method, cells[method], flush=True)
    folders = {method: folder / method for method, cell in cells.items() if "made" in cell}
    file = folder / "milliseconds.json"
    times = json.loads(file.read_text()) if file.is_file() else {}
    if not {"dense", *folders} <= times.keys():
        times = time_models(task or Task(name, seed, args), folders)
        file.write_text(json.dumps(times))
    return {
        method: cell | {"speedup": times["dense"] / times.get(method, times["dense"])}
        for method, cell in cells.items()
    }


def table(cells: dict[tuple[str, int, str], dict], methods: list[str]) -> str:
    """Format scores on dev in points, and for each method the mean of its shares of dense."""
    lines, shares = [], {method: [] for method in methods}
    for (name, seed, method), cell in cells.items():
        if "made" not in cell:
            lines.append([name, seed, method, cell["shape"], *["-"] * 9])
            continue
        share = [100 * cell[which] / cell["dense"] for which in ("made", "trained")]
        shares[method].append(share)
        numbers = [cell["made_divergence"], cell["trained_divergence"]]
        lines.append(
            [
                *(name, seed, method, cell["shape"], f"{cell['speedup']:.2f}", f"{cell['dense']:.1f}"),
                *(f"{cell[which]:.1f}" for which in ("made", "trained")),
                *(f"{number:.1f}" for number in share),
                *(f"{number:.3f}" for number in numbers),
                f"{cell['seconds']:.0f} + {cell['train_seconds']:.0f}",
            ]
        )
    for method, values in shares.items():
        means = [f"{statistics.fmean(column):.1f}" for column in zip(*values, strict=True)] or ["-", "-"]
        lines.append(["mean", f"{len(values)} cells", method, *["-"] * 5, *means, *["-"] * 3])
    header = ["task", "seed", "method", "shape", "times faster", "dense", "as made", "trained"]
    header += ["made, % of dense", "trained, %", "divergence", "trained", "seconds"]
    return text_table(header, lines)


def main() -> None:
    """Make what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="output_dir of compare.py")
    parser.add_argument("--data_dir", help="folder of the tasks; default: the Hub")
    parser.add_argument("--tasks", nargs="+", default=["mrpc", "sst2", "stsb"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--keep_shape", default="uniform", choices=["uniform", "free"], help="of ours")
    recipe = Path(__file__).resolve().parents[1] / "glue_scripts" / "recipes" / "compare_cpu.json"
    parser.add_argument("--recipe", type=Path, default=recipe, help="that made the dense models")
    parser.add_argument("--rows", type=int, default=2000, help="rows of train that the methods see")
    parser.add_argument("--steps", type=int, default=120, help="of the fine-tuning")
    parser.add_argument("--work", type=Path, default=Path("structured"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    batch, length = TIMED
    print(f"{cpu_name()}; {machine()}; {args.speedup} times faster at {batch} x {length}, float32\n", flush=True)
    cells = {}
    for name in args.tasks:
        for seed in args.seeds:
            folder = args.work / f"{args.speedup}x {args.keep_shape}" / name / str(seed)
            finished = finish(name, seed, folder, args)
            cells |= {(name, seed, method): cell for method, cell in finished.items()}
            print(f"\n{table(cells, args.methods)}\n", flush=True)


if __name__ == "__main__":
    main()
