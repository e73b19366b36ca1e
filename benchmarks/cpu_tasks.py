"""From end to end: scores, sizes and times of CPU models of real tasks, beside dense float32 and ONNX Runtime int8.

The models are cells of `glue_scripts/compare.py`. Each pruned model is exported with 128 calibration rows of train for
one thread. All models of a row take turns, and are timed by the processor time of their thread. A finished row is kept
in the folder of --work, and is not repeated by the next call. `--only_scores` leaves out the times, so that it may run
on a busy machine; `--held_out` scores on rows that were held out of train, to choose a sparsity without the reported
rows.

    taskset -c 0 python benchmarks/cpu_tasks.py --runs runs --data_dir DATA --tasks sst2 stsb mrpc cola
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "glue_scripts"))

from common import machine

from arguments import parse_arguments
from cells import Cell
from cpu_model import Logits, calibration_rows, logits_of, score
from hf_maskselect import LatencyPoint, export_cpu, load_cpu, plot_latency
from hf_maskselect.runtime.files import cpu_name
from hf_maskselect.runtime.timing import DENSE, ONNX_INT8, OURS, onnx_jobs, time_jobs
from hf_maskselect.utils.tables import text_table
from job import Job, prepare
from records import read_cell

SHAPES = ((1, 32), (1, 128), (8, 128))
SPARSE = "sparse fp32"
MODELS = (DENSE, SPARSE, OURS, ONNX_INT8)
MEAN = ("sst2", "stsb", "mrpc")  # the tasks of the aim for what int8 costs
AIM = -0.5  # points


class Task:
    """The rows of a task, and its dense model in float32 and in ONNX Runtime int8, made when they are needed."""

    def __init__(self, cell: Cell, told: dict, args: argparse.Namespace) -> None:
        self.dense_folder, self._graphs = cell.dense().folder(args.runs), args.work / f"{cell.task} onnx"
        flags = ["--task_name", cell.task, "--seed", str(cell.seed), "--always_hold_out"]
        flags += ["--model_name_or_path", str(self.dense_folder), "--output_dir", str(args.work)]
        flags += ["--data_dir", args.data_dir] if args.data_dir else []
        data, model, self._config = parse_arguments([*told["flags"], *flags], told["recipe"])
        self.job: Job = prepare(data, model, self._config)
        self.seed = cell.seed
        self.rows = self.job.selection if args.held_out else next(iter(self.job.evaluation.values()))
        self.dense = load(self.dense_folder)
        self.onnx_int8 = onnx_jobs(self.dense, self._graphs)[ONNX_INT8]
        self.onnx_file = self._graphs / "int8.onnx"
        self.scores = {DENSE: self.score(logits_of(self.dense)), ONNX_INT8: self.score(onnx_logits(self.onnx_file))}

    def score(self, logits: Logits) -> float:
        """Return the main metric, in points."""
        size = self._config.per_device_eval_batch_size
        return 100 * score(logits, self.job, self.rows, size)[self.job.task.main_metric]


def load(folder: Path) -> PreTrainedModel:
    """Load a model in float32 to use it."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def onnx_logits(path: Path) -> Logits:
    """Return the function from a batch to the logits that ONNX Runtime computes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return lambda batch: torch.from_numpy(session.run(["logits"], {name: batch[name].numpy() for name in names})[0])


def measure(cell: Cell, task: Task, args: argparse.Namespace) -> dict:
    """Export, score and time one pruned model, and return its row."""
    folder, output = cell.folder(args.runs), args.work / str(cell)
    batches, lengths = sorted({batch for batch, _ in SHAPES}), sorted({length for _, length in SHAPES})
    rows = calibration_rows(task.job, 128, task.seed)
    report = export_cpu(folder, output, rows, batch_sizes=batches, seq_lens=lengths, threads=1)
    print(report, flush=True)
    fast = load_cpu(output)
    scores = task.scores | {SPARSE: task.score(logits_of(load(folder))), OURS: task.score(logits_of(fast))}
    files = {DENSE: task.dense_folder / "model.safetensors", OURS: report.path, ONNX_INT8: task.onnx_file}
    row = {"scores": scores, "mb": {name: path.stat().st_size / 1e6 for name, path in files.items()}}
    if not args.only_scores:
        jobs = {DENSE: task.dense, ONNX_INT8: task.onnx_int8, OURS: fast}
        times = time_jobs(jobs, SHAPES, task.dense.config.vocab_size, args.seconds)
        row["ms"] = {f"{batch}x{length}": ms for (batch, length), ms in times.items()}
    return row


def score_table(rows: dict[Cell, dict]) -> str:
    """Format scores, in points, and the sizes of the files, in MB."""
    header = ["task", "sparsity", *MODELS, f"MB {DENSE}", f"MB {OURS}", f"MB {ONNX_INT8}"]
    return text_table(
        header,
        [
            [
                *(cell.task, cell.target),
                *(f"{row['scores'][name]:.1f}" for name in MODELS),
                *(f"{row['mb'][name]:.1f}" for name in (DENSE, OURS, ONNX_INT8)),
            ]
            for cell, row in rows.items()
        ],
    )


def time_table(rows: dict[Cell, dict]) -> str:
    """Format milliseconds, median (95th percentile), and how many times faster the CPU model is."""
    lines = []
    for cell, row in rows.items():
        for shape, ms in row.get("ms", {}).items():
            cells = [f"{ms[name][0]:.2f} ({ms[name][1]:.2f})" for name in (DENSE, ONNX_INT8, OURS)]
            ratios = [f"{ms[name][0] / ms[OURS][0]:.2f}" for name in (DENSE, ONNX_INT8)]
            lines.append([cell.task, cell.target, shape, *cells, *ratios])
    header = ["task", "sparsity", "shape", DENSE, ONNX_INT8, OURS, f"times {DENSE}", f"times {ONNX_INT8}"]
    return text_table(header, lines)


def cost_of_int8(rows: dict[Cell, dict]) -> str:
    """Say what 8 bits cost on the mean of three tasks, by sparsity, beside the aim."""
    lines = []
    for target in dict.fromkeys(cell.target for cell in rows):
        costs = [
            row["scores"][OURS] - row["scores"][SPARSE]
            for cell, row in rows.items()
            if cell.target == target and cell.task in MEAN
        ]
        if len(costs) == len(MEAN):
            mean = statistics.fmean(costs)
            lines.append(f"{target}: {mean:+.2f} points, aim at least {AIM}: {'reached' if mean >= AIM else 'missed'}")
    return "\n".join([f"{OURS} minus {SPARSE}, mean of {', '.join(MEAN)}:", *(lines or ["not all are finished"])])


def draw(rows: dict[Cell, dict], folder: Path) -> None:
    """Draw score against milliseconds at each shape, one picture a task and shape."""
    for task in dict.fromkeys(cell.task for cell in rows):
        for batch, length in SHAPES:
            shape = f"{batch}x{length}"
            timed = {cell.target: row for cell, row in rows.items() if cell.task == task and "ms" in row}
            points = [
                LatencyPoint(target, OURS, row["ms"][shape][OURS][0], row["scores"][OURS])
                for target, row in timed.items()
            ]
            for row in list(timed.values())[:1]:
                points += [
                    LatencyPoint("dense", name, row["ms"][shape][name][0], row["scores"][name])
                    for name in (DENSE, ONNX_INT8)
                ]
            if points:
                title = f"{task}, {shape} tokens, one thread of {cpu_name()}"
                print(plot_latency(points, folder / f"cpu_{task}_{shape}.png", title=title))


def main() -> None:
    """Measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="output_dir of compare.py")
    parser.add_argument("--data_dir", help="folder of the tasks, if it is not where the cells found it")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "stsb", "mrpc", "cola"])
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--targets", nargs="+", default=["0.8", "0.9", "0.9375"])
    parser.add_argument("--method", default="blocks", help="method or variant of the cells")
    parser.add_argument("--held_out", action="store_true", help="score on rows that were held out of train")
    parser.add_argument("--only_scores", action="store_true", help="do not time")
    parser.add_argument("--seconds", type=float, default=3.0, help="time spent on each model at each shape")
    parser.add_argument("--figures", type=Path, help="folder for pictures of score against milliseconds")
    parser.add_argument("--work", type=Path, default=Path("cpu_tasks"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / ("held_out.jsonl" if args.held_out else "rows.jsonl")
    rows: dict[Cell, dict] = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        row = json.loads(line)
        rows[Cell(*row.pop("cell"))] = row
    print(f"{cpu_name()}; {machine()}\n", flush=True)
    for name in args.tasks:
        task: Task | None = None
        for target in args.targets:
            cell = Cell(name, args.seed, target, args.method)
            if cell in rows and (args.only_scores or "ms" in rows[cell]):
                continue
            made = read_cell(cell.folder(args.runs), args.method)
            if made is None:
                print(f"{cell} is not finished", flush=True)
                continue
            task = task or Task(cell, made["told"], args)
            rows[cell] = measure(cell, task, args)
            with open(file, "a") as handle:
                handle.write(json.dumps({"cell": [name, args.seed, target, args.method], **rows[cell]}) + "\n")
    wanted = [Cell(name, args.seed, target, args.method) for name in args.tasks for target in args.targets]
    shown = {cell: rows[cell] for cell in wanted if cell in rows}
    print(f"\n{score_table(shown)}\n\n{cost_of_int8(shown)}\n\n{time_table(shown)}")
    if args.figures:
        draw(shown, args.figures)


if __name__ == "__main__":
    main()
