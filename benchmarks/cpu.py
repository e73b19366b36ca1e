"""How fast is a pruned model on a CPU, against torch and ONNX Runtime?

Models: the shape of BERT-base with random weights, and the real 6-layer MiniLM. `1x4 S`: blocks of four pruned to the
sparsity S and exported with int8; `csr S`: single weights pruned, exported without it. All models take turns in every
round. One thread is timed by its processor time, two by the wall clock. What is done is kept in the folder of --work,
and is not repeated by the next call.

    taskset -c 0 python benchmarks/cpu.py --threads 1
    python benchmarks/cpu.py --threads 2
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from common import encoder, machine
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel
from transformers.utils import logging

from hf_maskselect import export_cpu, load_cpu, prunable_weights
from hf_maskselect.runtime.files import cpu_name
from hf_maskselect.runtime.timing import ONNX, ONNX_INT8, Job, bf16_job, onnx_jobs, time_jobs
from hf_maskselect.utils.tables import text_table

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert-base": lambda: BertForSequenceClassification(BertConfig()),
    "minilm": encoder,
}
SHAPES = ("1x32", "1x128", "8x128", "32x128")
PRUNED = {"1x4 0.8": (4, 0.8), "1x4 0.9375": (4, 0.9375), "csr 0.9375": (1, 0.9375), "csr 0.99": (1, 0.99)}
JOBS = ("torch fp32", "torch bf16", "onnxruntime fp32", "onnxruntime int8", *PRUNED)


def make(name: str, block: int = 1, sparsity: float = 0.0) -> PreTrainedModel:
    """Make a model of which the smallest blocks of each matrix are zero."""
    torch.manual_seed(0)
    model = MODELS[name]().eval().requires_grad_(False)
    for weight in prunable_weights(model).values() if sparsity else ():
        sums = weight.abs().view(len(weight), -1, block).sum(-1)
        limit = sums.flatten().kthvalue(round(sparsity * sums.numel())).values
        weight.mul_((sums > limit).repeat_interleave(block, 1))
    return model


def make_jobs(name: str, work: Path, threads: int) -> dict[str, Job]:
    """Return a function from token ids to outputs for each way to run a model."""
    model = make(name)
    onnx = onnx_jobs(model, work / f"{name} onnx")
    pruned = {}
    for kind, (block, sparsity) in PRUNED.items():
        folder = work / f"{name} {kind} {threads}"
        if not (folder / "cpu_model.json").is_file():
            sparse = make(name, block, sparsity)
            ids = torch.randint(1000, sparse.config.vocab_size, (16, 1, 64))
            rows = [{"input_ids": each} for each in ids]
            print(export_cpu(sparse, folder, rows, int8=block == 4, threads=threads), flush=True)
        pruned[kind] = load_cpu(folder)
    assert not any(each.training for each in (model, *pruned.values()))
    return dict(zip(JOBS, (model, bf16_job(model), onnx[ONNX], onnx[ONNX_INT8], *pruned.values()), strict=True))


def table(records: list[dict]) -> str:
    """Format medians and 95th percentiles, one row a model, shape and number of threads."""
    rows = []
    for record in records:
        cells = [f"{p50:.1f} ({p95:.1f})" for p50, p95 in (record["ms"][kind] for kind in JOBS)]
        rows.append([record["model"], str(record["threads"]), record["shape"], *cells])
    return text_table(["model", "threads", "shape", *JOBS], rows)


def ratios(records: list[dict]) -> str:
    """Format how many times faster the exported models are than their rivals."""
    rows = []
    for record in records:
        ms = {kind: p50 for kind, (p50, _) in record["ms"].items()}
        cells = []
        for kind in PRUNED:
            rival = "onnxruntime int8" if kind.startswith("1x4") else "onnxruntime fp32"
            cells.append(f"{ms['torch fp32'] / ms[kind]:.2f} / {ms[rival] / ms[kind]:.2f}")
        rows.append([record["model"], str(record["threads"]), record["shape"], *cells])
    return text_table(["times torch fp32 / ORT", "threads", "shape", *PRUNED], rows)


def main() -> None:
    """Measure what is missing, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="time spent on each model at each shape")
    parser.add_argument("--work", type=Path, default=Path("cpu_benchmark"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "times.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    print(f"{cpu_name()}; {machine()}\n", flush=True)
    for name in args.models:
        known = {(record["model"], record["threads"], record["shape"]) for record in done}
        missing = [shape for shape in args.shapes if (name, args.threads, shape) not in known]
        jobs = make_jobs(name, args.work, args.threads) if missing else {}
        for shape in missing:
            batch, length = map(int, shape.split("x"))
            (ms,) = time_jobs(jobs, [(batch, length)], 30_000, args.seconds).values()
            done.append({"model": name, "threads": args.threads, "shape": shape, "ms": ms})
            with open(file, "a") as handle:
                handle.write(json.dumps(done[-1]) + "\n")
            print(ratios(done[-1:]), flush=True)
    print(f"\n{table(done)}\n\n{ratios(done)}")


if __name__ == "__main__":
    main()
