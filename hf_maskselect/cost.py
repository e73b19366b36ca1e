"""What a search costs on so many ranks, told beforehand: compute, time, memory, bytes exchanged."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from .config import PruningConfig
from .masking.scores import CRITERIA
from .masking.targets import prunable_weights
from .report import text_table
from .selection import Candidate, search_rungs, statistics_needed
from .trials import EARLY_EVALUATIONS

_DIGEST = "0" * 64


@dataclass(frozen=True)
class Workload:
    """One pruning run, in rows and steps.

    parameters, prunable: weights of the model, and those that masks cover. rows: of one device in a training step,
    accumulation included. rungs: of each level, (candidates, steps). sample_rows: of a level's statistics.
    selection_rows: what a trial is scored on. evaluations: scores per trial, at most one a step. trial_rows: of one
    trial step; None where it follows the training step.
    """

    parameters: int
    prunable: int
    rows: int
    training_steps: int
    rungs: Sequence[Sequence[tuple[int, int]]]
    sample_rows: int
    selection_rows: int
    evaluations: int = 1
    trial_rows: int | None = None


@dataclass(frozen=True)
class Cost:
    """What the model says of one number of ranks.

    compute: of all searches, in training steps (a forward pass is a third of one), summed over ranks; the statistics,
    which every rank computes for itself, count once. seconds_ratio: time of all searches in times of the training.
    busy: share of the ranks' time in trials that is spent on trials. training_bytes, search_bytes: largest memory of a
    rank for weights, gradients, optimizer and masks in fp32 with two moments (activations come on top; searching, the
    statistics wait on disk). sent, received: bytes of a rank in one search. trained: bytes that a rank sends in one
    training step (a ring all-reduce of the gradients).
    """

    ranks: int
    compute: float
    seconds_ratio: float
    busy: float
    training_bytes: int
    search_bytes: int
    sent: int
    received: int
    trained: int


def workload(config: PruningConfig, folder: str, train_rows: int) -> Workload:
    """A run of `config.max_steps` training steps of the model in `folder`, of which only config.json is read.

    train_rows: of the train split, of which the selection split is held out.

    Raises:
        ValueError: max_steps is not given, or the target cannot be reached within them.
    """
    if config.max_steps <= 0:
        raise ValueError(f"max_steps={config.max_steps} says nothing of the run's length: give --max_steps")
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder))
    weights = prunable_weights(model, config.target_modules, config.exclude_modules)
    plan, rows = config.plan(config.max_steps), config.train_batch_size * config.gradient_accumulation_steps
    held_out = round(train_rows * config.selection_fraction)
    epoch = max(1, (train_rows - held_out) // rows)
    return Workload(
        parameters=model.num_parameters(),
        prunable=sum(weight.numel() for weight in weights.values()),
        rows=rows,
        training_steps=plan.max_steps,
        rungs=[search_rungs(config, plan, level, epoch) for level in range(len(plan.levels))],
        sample_rows=config.criterion_batches * config.criterion_batch_size * bool(statistics_needed(config, CRITERIA)),
        selection_rows=held_out,
        evaluations=EARLY_EVALUATIONS if config.selection == "early" else 1,
        trial_rows=config.trial_batch_size,
    )


def search_cost(work: Workload, ranks: int) -> Cost:
    """The cost on `ranks` devices of equal speed."""
    rows = work.rows * ranks
    trial_rows = rows if work.trial_rows is None else work.trial_rows
    compute = alone = clock = shared = 0.0  # in rows, a forward and backward pass each
    for rungs in work.rungs:
        samples = work.sample_rows if rungs else 0
        alone += samples
        clock += samples
        for count, steps in rungs:
            trial = steps * trial_rows + min(work.evaluations, steps) * work.selection_rows / 3
            compute += count * trial
            shared += math.ceil(count / ranks) * trial
    clock += shared
    sent = max((exchanged(rungs, ranks) for rungs in work.rungs), default=0) if ranks > 1 else 0
    weights = 4 * work.parameters
    training = 4 * weights + 4 * work.prunable + (weights if ranks > 1 else 0)  # the buckets of the all-reduce
    return Cost(
        ranks,
        (compute + alone) / rows,
        clock / (work.training_steps * work.rows),
        compute / (shared * ranks) if shared else 1.0,
        training,
        training + 3 * weights,
        sent,
        sent * ranks,
        round(2 * weights * (ranks - 1) / ranks),
    )


def exchanged(rungs: Sequence[tuple[int, int]], ranks: int) -> int:
    """Bytes that a rank sends in one search: every exchange is a length of eight bytes and a pickled object, padded to
    the longest."""
    if not rungs:
        return 0
    first = rungs[0][0]
    share = 1 + math.ceil(first / ranks)  # candidate 0 is drawn by all
    longest = "magnitude:balanced:votes@0.0001"
    drawn = [Candidate(i, longest, 0.1, 1 / 3, f"{i:064}") for i in range(share)]
    objects: list[object] = [_DIGEST, (drawn, None), _DIGEST]
    for count, _ in rungs:
        turns = math.ceil(count / ranks)
        objects += [{}, ([None], None), *[((count, 1 / 3), None)] * turns]
    return sum(8 + len(pickle.dumps(value)) for value in objects)


def cost_text(work: Workload, ranks: Sequence[int]) -> str:
    """The model's answers as a table, with what to change where the search would rule."""
    costs = [search_cost(work, count) for count in ranks]
    rows = [
        [
            cost.ranks,
            work.rows * cost.ranks,
            f"{cost.compute:.0f}",
            f"{cost.seconds_ratio:.2f}",
            f"{cost.busy:.0%}",
            _size(cost.training_bytes),
            _size(cost.search_bytes),
            _size(cost.sent),
            _size(cost.received),
            _size(cost.trained),
        ]
        for cost in costs
    ]
    header = ["ranks", "rows a step", "search, in steps", "search / training time", "busy", "training", "search"]
    header += ["sent a search", "received", "sent a training step"]
    trials = [" + ".join(f"{count} x {steps}" for count, steps in rungs) or "none" for rungs in work.rungs]
    lines = [
        f"{work.parameters:,} parameters, {work.prunable:,} prunable; {work.training_steps} training steps; trials "
        f"(count x steps) by level: {', '.join(trials)}",
        text_table(header, rows),
        "memory a rank, without activations; fp32, AdamW",
    ]
    for cost in costs:
        widest = max((count for rungs in work.rungs for count, _ in rungs), default=0)
        if 0 < widest < cost.ranks:
            lines.append(
                f"{cost.ranks} ranks: {1 - cost.busy:.0%} of their time in trials is waiting; up to {cost.ranks} "
                "candidates take no longer"
            )
        if cost.seconds_ratio > 10 and work.trial_rows is None and cost.ranks > 1:
            lines.append(
                f"{cost.ranks} ranks: one device runs a trial of {work.rows * cost.ranks} rows a step alone: with "
                f"trial_batch_size={work.rows} the searches take "
                f"{search_cost(replace(work, trial_rows=work.rows), cost.ranks).seconds_ratio:.2f} times the "
                "training's time"
            )
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
