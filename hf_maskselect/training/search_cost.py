"""What a search costs on so many ranks, told beforehand: compute, time, memory, bytes exchanged."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
)

from ..config import PruningConfig
from ..fields.resolved import ResolvedConfig
from ..masking.scores import CRITERIA
from ..masking.targets import prunable_weights, transposed_weights
from ..search.bench import EARLY_EVALUATIONS, REFIT_COST
from ..search.best_fit import FitErrors
from ..search.pool import statistics_needed
from ..search.results import Candidate
from ..search.schedule import rungs_text, search_rungs
from ..storage.models import named_class
from ..surgery.permute_channels import couplings_of
from ..utils.tables import text_table
from .checks import check_batches, check_proposals, check_shapes
from .plan import rewound_rate

Rungs = list[tuple[int, int]]


@dataclass(frozen=True)
class Workload:
    """One pruning run of `config.max_steps` training steps.

    parameters, prunable: weights of the model without its head, and those that masks cover. train_rows: of the train
    split, out of which the selection split is held. teaches: whether trials are scored against the teacher's soft
    labels, which are computed once (those of a language model are too large to be kept, and cost a pass each time,
    which is not counted here).
    """

    config: PruningConfig
    parameters: int
    prunable: int
    train_rows: int
    teaches: bool = False

    def __post_init__(self) -> None:
        check_run(self.config)

    @cached_property
    def settings(self) -> ResolvedConfig:
        """What follows from the fields of the configuration."""
        return self.config.resolved()

    @property
    def rows(self) -> int:
        """Of one device in a training step, accumulation included."""
        return self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps

    def trial_rows(self, ranks: int) -> int:
        """Of a trial step, which one device runs alone."""
        return self.config.trial_batch_size or self.rows * ranks

    @property
    def held_out(self) -> int:
        """Rows that a trial is scored on."""
        return min(round(self.train_rows * self.config.selection_fraction), self.config.max_selection_samples)

    @property
    def samples(self) -> int:
        """Rows of the gradient statistics of a level."""
        needed = bool(statistics_needed(self.config, CRITERIA))
        return self.config.criterion_batches * self.config.criterion_batch_size * needed

    @property
    def refitted(self) -> float:
        """Rows of training that one refit takes as long as, at most: of long rows fewer are taken."""
        return REFIT_COST * min(
            self.settings.refit_rows, self.train_rows - self.held_out * self.settings.needs_selection_split
        )

    def rungs(self, ranks: int) -> list[Rungs]:
        """Of every level, where matrices can be fitted: only a run sees whether (not ALBERT's)."""
        epoch = max(1, (self.train_rows - self.held_out) // self.trial_rows(ranks))
        plan = self.settings.plan(self.config.max_steps)
        return [search_rungs(self.config, plan, level, epoch) for level in range(len(plan.levels))]


@dataclass(frozen=True)
class Cost:
    """What the model says of one number of ranks.

    compute: of all searches, in training steps (a forward pass is a third of one), summed over ranks; statistics, and
    the refit of a chosen mask that was not left as fitted or as trained, which every rank computes for itself, count
    once. time: of all searches, in times of the training. busy: share of the ranks' time in trials that is spent on
    trials. training_bytes, search_bytes: largest memory of a rank for weights, gradients, AdamW's moments and hard
    masks in fp32 (activations come on top). sent: by a rank in one search, with the weights that one of them shares
    (their names and shapes not counted); gathered: of all ranks' messages.
    trained: bytes that a rank sends in one training step (a ring all-reduce of the gradients).
    """

    ranks: int
    compute: float
    time: float
    busy: float
    training_bytes: int
    search_bytes: int
    sent: int
    gathered: int
    trained: int


def check_run(config: PruningConfig) -> None:
    """Refuse what a run would, whatever its model and data.

    Raises:
        ValueError: max_steps is not given or too few, or arguments do not go together.
    """
    if config.max_steps <= 0:
        raise ValueError(f"max_steps={config.max_steps} says nothing of the run's length: give --max_steps")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    check_batches(config)
    check_proposals(config, CRITERIA)
    plan = config.resolved().plan(config.max_steps)
    if config.lr_rewind:
        rewound_rate(config, plan)


def workload(config: PruningConfig, path: str | Path, train_rows: int) -> Workload:
    """Of the model in `path` (a folder, or a name on the Hub), of which only config.json is read.

    Raises:
        ValueError: no such model, or one that a run of these arguments would refuse.
    """
    try:
        told = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is no folder with the config.json of a model of transformers, and no such name could be found on "
            f"the Hub: give one of these ({str(error).splitlines()[0]})"
        ) from error
    model, settings = _trained(told), config.resolved()
    weights = prunable_weights(model, settings.target_modules, settings.exclude_modules)
    check_shapes(config, weights, transposed_weights(model))
    if config.permute_channels:
        couplings_of(model, settings.pattern, weights)
    parameters, prunable = model.base_model.num_parameters(), sum(weight.numel() for weight in weights.values())
    return Workload(config, parameters, prunable, train_rows, teaches=settings.selection_metric == "teacher")


def _trained(told: PretrainedConfig) -> PreTrainedModel:
    """What a run would train, without weights: the class that the configuration names; of a bare encoder the one with
    a head on it, under which its modules have other names."""
    cls = named_class(told)
    if cls is None or cls is MODEL_MAPPING.get(type(told), None):
        heads = (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING)
        cls = next((of[type(told)] for of in heads if type(told) in of), cls)
    with torch.device("meta"):
        return AutoModel.from_config(told) if cls is None else cls._from_config(told)


def search_cost(work: Workload, ranks: int) -> Cost:
    """The cost on `ranks` devices of equal speed."""
    levels, trial_rows = work.rungs(ranks), work.trial_rows(ranks)
    marks = EARLY_EVALUATIONS if work.config.selection == "early" else 1
    survive = work.config.selection == "survivors"
    once = work.samples * len(levels)  # what every rank does for itself
    # The chosen mask is fitted where its candidate was not left as fitted, or as trained.
    kept = [bool(rungs) and (survive or not any(steps for _, steps in rungs)) for rungs in levels]
    once += work.refitted * kept.count(False)
    trials = longest = 0.0  # in rows, forward and backward
    for rungs in levels:
        for rung, (count, steps) in enumerate(rungs):
            trial = steps * trial_rows + min(marks, max(steps, 1)) * work.held_out / 3
            trial += work.refitted if rung == 0 or not survive else 0
            trials += count * trial
            longest += math.ceil(count / ranks) * trial
    if longest and work.teaches:
        trials += work.held_out / 3
        longest += work.held_out / 3
    weights = 4 * work.parameters
    needs = len(statistics_needed(work.config, CRITERIA)) if work.samples else 0
    # While candidates are drawn there are no gradients, but statistics, one score and a matrix-wise ranking of it.
    drawing = 4 * work.prunable * (needs + 2) - weights if needs else 0
    # A copy of the weights, and the moments of a trial that trains; or what the matrices were before the cut.
    copied = 3 if any(steps for rungs in levels for _, steps in rungs) else int(any(levels))
    trying = copied * weights or 4 * work.prunable * bool(work.settings.refit_rows)
    messages = max(exchanged(rungs, ranks) for rungs in levels) if ranks > 1 else 0
    shared = 0  # by one rank, to all: what the winner has trained, or how the chosen matrices were fitted
    if ranks > 1:
        shared = weights if longest and survive else 4 * work.prunable * bool(work.settings.refit_rows)
    training = 4 * weights + 4 * work.prunable + (weights if ranks > 1 else 0)  # the buckets of the all-reduce
    return Cost(
        ranks,
        (trials + once) / (work.rows * ranks),
        (longest + once) / (work.config.max_steps * work.rows),
        trials / (longest * ranks) if longest else 1.0,
        training,
        training + max(drawing, trying),
        messages + shared,
        messages * ranks + shared,
        round(2 * weights * (ranks - 1) / ranks),
    )


def exchanged(rungs: Rungs, ranks: int) -> int:
    """Bytes that a rank sends in one search: every exchange is a length of eight bytes and a pickled object, padded to
    the longest."""
    digest, done = "0" * 64, (None, None)
    count = rungs[0][0] if rungs else 1
    share = math.ceil(count / ranks) + (count > 1)  # candidate 0 is drawn by all
    drawn = [Candidate(i, "magnitude:balanced:votes@0.0001", 0.1, 1 / 3, f"{i:064}") for i in range(share)]
    objects: list[object] = [done, digest, (drawn, None), done, digest]
    if rungs:
        objects.append(done)  # the journal is open
        if not any(steps for _, steps in rungs):
            objects += [(FitErrors(0.9, 1 / 3, 99), None), done]  # of the winner's fit, and it is read
    for count, _ in rungs:
        known = ({index: None for index in range(count)}, None)
        objects += [known, done, *[((count, 1 / 3), None), done] * math.ceil(count / ranks)]
    return sum(8 + len(pickle.dumps(value)) for value in objects)


def cost_text(work: Workload, ranks: Sequence[int]) -> str:
    """The model's answers as a table, with what to change where ranks wait or the search would rule."""
    costs = [search_cost(work, count) for count in ranks]
    rows = [
        [
            cost.ranks,
            work.rows * cost.ranks,
            work.trial_rows(cost.ranks),
            f"{cost.compute:.0f}",
            f"{cost.time:.2f}",
            f"{cost.busy:.0%}",
            *map(_size, (cost.training_bytes, cost.search_bytes, cost.sent, cost.gathered, cost.trained)),
        ]
        for cost in costs
    ]
    header = ["ranks", "rows a step", "of a trial", "search, in steps", "search / training time", "busy"]
    header += ["memory: training", "searching", "sent a search", "gathered", "sent a training step"]
    lines = [f"{work.parameters:,} parameters, {work.prunable:,} prunable; {work.config.max_steps} training steps"]
    lines += [
        f"trials (count x steps) on {count} rank(s): "
        + ", ".join(rungs_text(rungs) or "none" for rungs in work.rungs(count))
        for count in (ranks if work.config.selection == "early" else ranks[:1])
    ]
    lines += [text_table(header, rows), "memory of a rank with hard masks, without activations; fp32, AdamW"]
    for cost in costs:
        lines += _advice(work, cost)
    return "\n".join(lines)


def _advice(work: Workload, cost: Cost) -> list[str]:
    """What would make the ranks wait less, and the trials shorter."""
    config, settings, told = work.config, work.settings, []
    # Without votes there are only so many different masks.
    any_number = settings.proposals in (("mixed",), ("paper",)) or any(
        text.endswith(":votes") for text in settings.proposals
    )
    if 1 < settings.num_candidates < cost.ranks and any_number:
        more = search_cost(replace(work, config=_changed(config, num_candidates=cost.ranks)), cost.ranks)
        told.append(
            f"{cost.ranks} ranks: {1 - cost.busy:.0%} of their time in trials is waiting; with "
            f"num_candidates={cost.ranks} the searches take {more.time:.2f} times the training's time"
        )
    if cost.time > 10 and config.trial_batch_size is None and not settings.scores_after_refit and cost.ranks > 1:
        less = search_cost(replace(work, config=_changed(config, trial_batch_size=work.rows)), cost.ranks)
        told.append(
            f"{cost.ranks} ranks: one device runs trials of {work.trial_rows(cost.ranks)} rows a step alone; with "
            f"trial_batch_size={work.rows} the searches take {less.time:.2f} times the training's time"
        )
    return told


def _changed(config: PruningConfig, **changes) -> PruningConfig:
    other = copy.copy(config)  # checked before
    for name, value in changes.items():
        setattr(other, name, value)
    return other


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
