"""The cost of a search, computed before a run: training steps, time, memory and bytes sent."""

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..config import PruningConfig
from ..fields.resolved import ResolvedConfig
from ..masking.fisher_blocks import bytes_of
from ..masking.scores import CRITERIA, passes
from ..masking.targets import prunable_weights, transposed_weights
from ..search.bench import DENSE_COST, EARLY_EVALUATIONS, MOST_POSITIONS, REFIT_COST
from ..search.pool import statistics_needed
from ..search.schedule import rungs_text, search_rungs
from ..storage.configs import find_config
from ..storage.models import named_class
from ..surgery.dense_outputs import most_sampled
from ..surgery.structured.job import HELD_OUT, POSITIONS, TRIAL_POSITIONS
from ..utils.tables import text_table
from .checks import check_batches, check_proposals, check_shapes
from .plan import rewound_rate

Rungs = list[tuple[int, int]]


@dataclass(frozen=True)
class Workload:
    """One pruning run of `config.max_steps` training steps.

    Attributes:
        config: the arguments of the run.
        parameters: weights of the model without its head.
        prunable: weights that masks cover.
        train_rows: rows of the train split, the held-out rows included.
        teaches: whether trials are scored against the teacher's soft labels, which are computed once. Those of a
            language model are too large to keep. They cost a pass for every score, which is not counted here.
        sizes: weights of every matrix that masks cover; not given, they are taken to be one matrix.
        dense_outputs: numbers of the uncut model's outputs that a search with refits keeps, at most.
    """

    config: PruningConfig
    parameters: int
    prunable: int
    train_rows: int
    teaches: bool = False
    sizes: tuple[int, ...] = ()
    dense_outputs: int = 0

    def __post_init__(self) -> None:
        check_run(self.config)

    @property
    def settings(self) -> ResolvedConfig:
        """The configuration with its defaults filled in."""
        return self.config.resolved()

    @property
    def rows(self) -> int:
        """Rows of one device in a training step, with gradient accumulation."""
        return self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps

    def trial_rows(self, ranks: int) -> int:
        """Rows of a trial step, which one device runs alone."""
        return self.config.trial_batch_size or self.rows * ranks

    @property
    def held_out(self) -> int:
        """Held-out rows, on which a trial is scored."""
        return min(round(self.train_rows * self.config.selection_fraction), self.config.max_selection_samples)

    @property
    def samples(self) -> int:
        """Rows of the gradient statistics of a level."""
        config, needs = self.config, self.statistics
        rounds = passes(needs, self.sizes or (self.prunable,), config.criterion_batches, config.obert_memory * 2**30)
        return config.criterion_batches * config.criterion_batch_size * rounds if needs else 0

    @property
    def statistics(self) -> set[str]:
        """The gradient statistics of a level."""
        return set() if self.settings.structure else statistics_needed(self.config, CRITERIA)

    @property
    def held_gradients(self) -> float:
        """The most bytes of gradients that are held while samples pass."""
        if "inverse" not in self.statistics:
            return 0
        sizes, samples = self.sizes or (self.prunable,), self.config.criterion_batches
        return min(bytes_of(sizes, samples), max(self.config.obert_memory * 2**30, bytes_of([max(sizes)], samples)))

    @property
    def refit_rows(self) -> int:
        """Rows of a refit. It is a maximum: a refit takes fewer rows if they are long."""
        rows = self.train_rows - self.held_out * self.settings.needs_selection_split
        return min(self.settings.refit_rows, rows)

    @property
    def refit(self) -> float:
        """Training rows that take as long as one refit, without the uncut model's pass."""
        return REFIT_COST * self.refit_rows

    @property
    def dense(self) -> float:
        """Training rows that take as long as the uncut model's pass, which refits share if no candidate trains."""
        return DENSE_COST * self.refit_rows

    @property
    def shapes(self) -> float:
        """Training rows that take as long as the search for a smaller shape and its fit, at one level.

        Rows are taken to have the length that is timed. A fit runs each layer one and a half times, where a training
        step takes three passes.
        """
        structure = self.settings.structure
        if structure is None:
            return 0.0
        length = structure.latency_shape[1]
        scored = min(self.held_out, HELD_OUT)
        tried = structure.num_candidates * (TRIAL_POSITIONS / length / 2 + min(scored, TRIAL_POSITIONS / length) / 3)
        return tried + min(structure.rows, POSITIONS / length) / 2 + scored / 3

    def rungs(self, ranks: int) -> list[Rungs]:
        """The rungs of every level, if matrices can be refitted, which only a run sees (ALBERT's cannot)."""
        epoch = max(1, (self.train_rows - self.held_out) // self.trial_rows(ranks))
        plan = self.settings.plan(self.config.max_steps)
        return [search_rungs(self.config, plan, level, epoch) for level in range(len(plan.levels))]


@dataclass(frozen=True)
class Cost:
    """The cost of the searches of a run on some number of ranks.

    Attributes:
        ranks: number of ranks.
        compute: all searches, in training steps, summed over ranks (a forward pass is a third of a step). What every
            rank computes for itself counts once: statistics, the uncut model's pass for refits, and the refit of a
            mask that was not scored after refit.
        time: all searches, as a multiple of the training's time.
        busy: share of the ranks' time in trials that is not waiting.
        training_bytes, search_bytes: largest memory of a rank for weights, gradients, AdamW's moments and hard masks
            in fp32, without activations.
        shared: bytes of the weights that one rank sends to the others in a search. Scores and digests are small.
        trained: bytes that a rank sends in one training step (a ring all-reduce of the gradients).
    """

    ranks: int
    compute: float
    time: float
    busy: float
    training_bytes: int
    search_bytes: int
    shared: int
    trained: int


def check_run(config: PruningConfig) -> None:
    """Refuse what every run with these arguments would refuse.

    Raises:
        ValueError: `max_steps` is missing or too small, or arguments do not go together.
    """
    if config.max_steps <= 0:
        raise ValueError(f"max_steps={config.max_steps} does not give the length of the run: give --max_steps")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    check_batches(config)
    check_proposals(config, CRITERIA)
    settings = config.resolved()
    plan = settings.plan(config.max_steps)
    if settings.lr_rewind:
        rewound_rate(config, plan)


def workload(config: PruningConfig, path: str | Path, train_rows: int) -> Workload:
    """Return the workload of a run on the model in `path`, a folder or a name on the Hub. Only config.json is read.

    Raises:
        ValueError: there is no such model, or a run with these arguments would refuse it.
    """
    try:
        model_config = find_config(path)
    except OSError as error:
        raise ValueError(
            f"{path} is no folder with the config.json of a transformers model, and no such name was found on the "
            f"Hub: give one of these ({str(error).splitlines()[0]})"
        ) from error
    model: Any = _without_weights(model_config)
    settings = config.resolved()
    weights = prunable_weights(model, settings.target_modules, settings.exclude_modules)
    check_shapes(config, weights, transposed_weights(model))
    teaches, sizes = settings.selection_metric == "teacher", tuple(weight.numel() for weight in weights.values())
    kept = _dense_outputs(weights, transposed_weights(model))
    return Workload(config, model.base_model.num_parameters(), sum(sizes), train_rows, teaches, sizes, kept)


def _dense_outputs(weights: Mapping[str, nn.Parameter], transposed: Collection[str]) -> int:
    """Count the outputs that a search keeps of all linear layers, if its rows have as many positions as allowed."""
    shapes = [
        weight.T.shape if name in transposed else weight.shape for name, weight in weights.items() if weight.dim() == 2
    ]
    return sum(outputs * min(most_sampled(inputs), MOST_POSITIONS) for outputs, inputs in shapes)


def _without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """The model that a run would train, on the meta device.

    Its class is the one that the configuration names. A bare encoder gets a head, under which its modules have other
    names.
    """
    cls: Any = named_class(config)
    if cls is None or cls is MODEL_MAPPING.get(type(config), None):
        heads = (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING)
        cls = next((head[type(config)] for head in heads if type(config) in head), cls)
    with torch.device("meta"):
        return AutoModel.from_config(config, trust_remote_code=False) if cls is None else cls._from_config(config)


def search_cost(work: Workload, ranks: int) -> Cost:
    """Return the cost on `ranks` devices of equal speed."""
    config, settings, levels = work.config, work.settings, work.rungs(ranks)
    marks = EARLY_EVALUATIONS if config.selection == "early" else 1
    survive = config.selection == "survivors"
    once: float = (work.samples + work.shapes) * len(levels)  # what every rank does for itself, or waits for
    # The chosen mask is refitted once more, unless its candidate was scored after refit or its trained weights stay.
    # A soft method whose weights train is refitted once, when it begins.
    kept = [bool(rungs) and (survive or not any(steps for _, steps in rungs)) for rungs in levels]
    once += (work.dense + work.refit) * (1 if settings.fits_start else kept.count(False))
    dense, refit = (work.dense, work.refit) if settings.refits_cuts else (0.0, 0.0)  # of a trial
    trials = longest = 0.0  # in rows, forward and backward
    for rungs in levels:
        for rung, (count, steps) in enumerate(rungs):
            trial = steps * work.trial_rows(ranks) + min(marks, max(steps, 1)) * work.held_out / 3
            if rung == 0 or not survive:
                trial += refit + (dense if steps else 0)
                once += 0 if steps else dense
            trials += count * trial
            longest += math.ceil(count / ranks) * trial
    if longest and work.teaches:
        trials += work.held_out / 3
        longest += work.held_out / 3
    weights, refitted = 4 * work.parameters, 4 * work.prunable * bool(settings.refit_rows)
    needs = len(work.statistics) if work.samples else 0
    # While candidates are drawn there are statistics, one score and its ranking, but no gradients.
    drawing = 4 * work.prunable * (needs + 2) - weights if needs else 0
    sampling = 4 * work.prunable * needs + round(work.held_gradients) - weights
    # A copy of the weights, and the moments of a trial that trains; or the matrices before the cut, and what refits
    # aim at, which is not there while a trial trains.
    trained = 3 * weights * any(steps for rungs in levels for _, steps in rungs)
    copied = weights if any(levels) else refitted
    aims = 4 * work.dense_outputs * bool(settings.refit_rows)
    training = 4 * weights + 4 * work.prunable + (weights if ranks > 1 else 0)  # the buckets of the all-reduce
    return Cost(
        ranks=ranks,
        compute=(trials + once) / (work.rows * ranks),
        time=(longest + once) / (config.max_steps * work.rows),
        busy=trials / (longest * ranks) if longest else 1.0,
        training_bytes=training,
        search_bytes=training + max(drawing, sampling, trained, copied + aims),
        shared=0 if ranks == 1 else weights if longest and survive else refitted,
        trained=round(2 * weights * (ranks - 1) / ranks),
    )


def cost_text(work: Workload, ranks: Sequence[int]) -> str:
    """Return the costs as a table, with advice where ranks would wait or the search would take most of the time."""
    costs = [search_cost(work, count) for count in ranks]
    rows = [
        [
            cost.ranks,
            work.rows * cost.ranks,
            work.trial_rows(cost.ranks),
            f"{cost.compute:.0f}",
            f"{cost.time:.2f}",
            f"{cost.busy:.0%}",
            *map(_size, (cost.training_bytes, cost.search_bytes, cost.shared, cost.trained)),
        ]
        for cost in costs
    ]
    header = ["ranks", "rows a step", "rows a trial step", "search, in steps", "search / training time", "busy"]
    header += ["training memory", "search memory", "sent a search", "sent a training step"]
    lines = [f"{work.parameters:,} parameters, {work.prunable:,} prunable; {work.config.max_steps} training steps"]
    lines += [
        f"trials (count x steps) on {count} rank(s): "
        + ", ".join(rungs_text(rungs) or "none" for rungs in work.rungs(count))
        for count in (ranks if work.config.selection == "early" else ranks[:1])
        if work.settings.structure is None
    ]
    if work.settings.structure is not None:
        lines.append(f"shapes tried at each level: {work.settings.structure.num_candidates}")
    lines += [text_table(header, rows), "memory of a rank with hard masks, without activations; fp32, AdamW"]
    for cost in costs:
        lines += _advice(work, cost)
    return "\n".join(lines)


def _advice(work: Workload, cost: Cost) -> list[str]:
    """Changes that would make ranks wait less, or trials shorter."""
    config, settings, advice = work.config, work.settings, []
    # Without votes there are only so many different masks.
    any_number = settings.proposals in (("mixed",), ("paper",)) or any(
        text.endswith(":votes") for text in settings.proposals
    )
    if 1 < settings.num_candidates < cost.ranks and any_number:
        more = search_cost(_changed(work, num_candidates=cost.ranks), cost.ranks)
        advice.append(
            f"{cost.ranks} ranks: {1 - cost.busy:.0%} of their time in trials is waiting; with "
            f"num_candidates={cost.ranks} the searches take {more.time:.2f} times the training's time"
        )
    if cost.time > 10 and config.trial_batch_size is None and not settings.scores_after_refit and cost.ranks > 1:
        less = search_cost(_changed(work, trial_batch_size=work.rows), cost.ranks)
        advice.append(
            f"{cost.ranks} ranks: one device alone runs trials of {work.trial_rows(cost.ranks)} rows a step; with "
            f"trial_batch_size={work.rows} the searches take {less.time:.2f} times the training's time"
        )
    return advice


def _changed(work: Workload, **fields: int) -> Workload:
    config = copy.copy(work.config)
    for name, value in fields.items():
        setattr(config, name, value)
    return replace(work, config=config)


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
