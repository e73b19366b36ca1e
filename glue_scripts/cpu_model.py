"""The fast CPU model of a job: exported with calibration rows of train, scored on the job's rows, and timed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import EvalPrediction, PreTrainedModel

from arguments import ModelArguments
from hf_maskselect import PruningConfig, export_cpu, load_cpu
from hf_maskselect.runtime.timing import DENSE, OURS
from job import Job
from metrics import make_compute_metrics

# From a batch as the job's collator makes it, without labels, to logits (rows, outputs).
Logits = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def calibration_rows(job: Job, count: int, seed: int) -> list[dict]:
    """Draw tokenized rows of train, none of which is held out."""
    return list(job.train.shuffle(seed=seed).select(range(min(count, len(job.train)))).remove_columns("label"))


def logits_of(model: PreTrainedModel) -> Logits:
    """Return the function from a batch to the logits of a model."""
    return lambda batch: model(**batch).logits


@torch.inference_mode()
def score(logits: Logits, job: Job, rows: Dataset, batch_size: int) -> dict[str, float]:
    """Return the metrics of the task on some rows. Rows of similar length share a batch, which saves padding."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    outputs, labels = [], []
    for start in range(0, len(order), batch_size):
        batch = job.collator([rows[row] for row in order[start : start + batch_size]])
        labels.append(batch.pop("labels").numpy())
        outputs.append(logits(batch).float().numpy())
    prediction = EvalPrediction(predictions=np.concatenate(outputs), label_ids=np.concatenate(labels))
    return make_compute_metrics(job.task)(prediction)


def export_and_score(job: Job, folder: str, model: ModelArguments, config: PruningConfig) -> dict[str, float]:
    """Export the model in `folder` for the CPU, load it again, and return its scores, its size and its times.

    Args:
        job: the task and its rows.
        folder: a saved model; a folder or a Hub repository.
        model: `export_cpu` and the flags that begin with `cpu_`.
        config: seed of the calibration rows, batch size of the evaluation, and the output folder.

    Raises:
        ValueError: the model cannot be exported.
    """
    where = model.export_cpu
    output = Path(config.output_dir) / "cpu" if where in (True, "True", "true") else Path(where)
    size = config.per_device_eval_batch_size
    # A bound must hold on rows that are not reported.
    judged = next(iter(job.evaluation.values())) if model.cpu_max_drop is None else job.selection
    report = export_cpu(
        folder,
        output,
        calibration_rows(job, model.cpu_calibration_rows, config.seed),
        max_drop=model.cpu_max_drop,
        evaluate=lambda candidate: score(logits_of(candidate), job, judged, size)[job.task.main_metric],
        batch_sizes=model.cpu_batch_sizes,
        seq_lens=model.cpu_seq_lens,
        threads=model.cpu_threads,
    )
    print(report)
    fast = logits_of(load_cpu(output))
    results: dict[str, float] = {}
    for split, rows in job.evaluation.items():
        suffix = "_mm" if split.endswith("mismatched") else ""
        metrics = score(fast, job, rows, size)
        results |= {f"cpu_eval_{name}{suffix}": value for name, value in metrics.items()}
    results |= {"cpu_mb": report.bytes / 1e6, "dense_mb": report.dense_bytes / 1e6}
    for time in report.runtime.times:
        shape, dense, ours = f"{time.batch}x{time.length}", time.ms[DENSE][0], time.ms[OURS][0]
        results |= {f"dense_ms_{shape}": dense, f"cpu_ms_{shape}": ours, f"cpu_times_faster_{shape}": dense / ours}
    return results
