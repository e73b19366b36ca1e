"""Trial fine-tunes and gradient samples on the trainer's own model, leaving the outer run untouched to the bit."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, Trainer, get_scheduler, set_seed
from transformers.trainer_pt_utils import find_batch_size, nested_concat, nested_numpify
from transformers.utils import is_datasets_available

from ..fields.rules import SELECTION_LOSSES
from ..masking.maskset import MaskSet
from ..masking.scores import GradientStats
from ..methods.base import Method
from ..surgery.refit import Refit, fittable, refit
from ..utils.seeds import key_seed
from .fingerprint import digest_of, plain_batch, relevant

EARLY_EVALUATIONS = 20  # of one "early" trial; its score is the mean of the last ten (arXiv 2310.13183)
EARLY_MEAN = 10
TRIAL_WARMUP = 0.1
REFIT_COST = 2  # rows of training that one row of a refit takes as long as
MOST_POSITIONS = 1 << 14  # tokens of a refit, padding too, all of which pass the model at once, twice
MOST_SOFT_LABELS = 1 << 24  # numbers of the teacher that are kept to score with


@dataclass(frozen=True)
class Trial:
    """steps: optimizer steps, 0 to score a mask as it is fitted; learning_rate: peak; evaluations: how often the model
    is scored on the way; before: how many steps its weights have been trained already."""

    steps: int
    learning_rate: float
    evaluations: int = 1
    before: int = 0

    @property
    def marks(self) -> set[int]:
        """After which steps the model is scored: evenly spread, the last step among them."""
        return {round(self.steps * (i + 1) / self.evaluations) for i in range(self.evaluations)}

    @property
    def ticks(self) -> int:
        """How far it takes a progress bar."""
        return max(self.steps, 1)


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On a GPU, kernels that add in a fixed order: every rank must find the same statistics, to the bit."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _copy_of(collator: Callable, model: nn.Module) -> Callable:
    """A deep copy, but for the trained model, which a collator may hold to make a decoder's inputs with, and any other
    that a dataclass, as transformers' collators are, has in a field."""
    held = [getattr(collator, f.name) for f in fields(collator)] if is_dataclass(collator) else []
    shared = [model, *(value for value in held if isinstance(value, nn.Module))]
    try:
        return copy.deepcopy(collator, {id(module): module for module in shared})
    except Exception as error:  # of whatever kind what cannot be copied raises
        raise ValueError(
            f"the data collator, a {type(collator).__name__}, cannot be copied ({error}), but trials, gradient "
            "samples, refits and scores must leave that of the training as it is: give it a __deepcopy__, or use "
            "method='magnitude' with refit_rows=0 and level_eval_steps=0"
        ) from error


class TrialBench:
    """What a search borrows from the trainer: its model, losses, data and optimizer class.

    Trials are paired: every candidate sees the same batches and the same dropout. They run on the unwrapped model,
    whose DDP hooks stay idle because no DDP forward armed them, with a plain optimizer of the trainer's own class.

    Args:
        trainer: a `Trainer` whose `compute_loss` is the label loss in eval mode and the training loss in train mode.
        method: holds the masks in force.
        selection_dataset: what candidates are scored on; None when nothing is chosen.
    """

    def __init__(self, trainer: Trainer, method: Method, selection_dataset) -> None:
        self._trainer, self._method, self._selection = trainer, method, selection_dataset
        self.settings = settings = trainer.args.resolved()
        borrows = settings.needs_selection_split or settings.criterion != "magnitude" or settings.refit_rows
        # The selection split must look the same whenever it is scored: a collator may draw.
        self._collator = _copy_of(trainer.data_collator, trainer.model) if borrows else None
        self._soft_labels: list[torch.Tensor] = []  # of the batches of the selection split
        self._taught_rows = 0  # of each of these
        self.fit: Refit | None = None  # of the last trial, if it began with one
        self._keeps_soft_labels = True

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Inside, weights, masks and random states may change freely; on leaving they are back to the bit.

        Costs one copy of the trained weights.
        """
        model = self._trainer.model
        masked = self._method.weights.keys()  # frozen ones too
        changed = {n: p for n, p in self._parameters() if p.requires_grad or n in masked}
        self._saved = {n: t.detach().clone() for n, t in (*changed.items(), *model.named_buffers())}
        with self.random_state(), tempfile.TemporaryDirectory() as folder:
            masks = Path(folder) / "masks.safetensors"  # on disk, where they cost no memory
            self._method.masks.save(masks)
            try:
                yield
            finally:
                self.restore()
                self._method.set_masks(MaskSet.load(masks)[0])
                del self._saved

    def _parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The model's, each once; tied matrices have the name that their mask has."""
        names = {id(weight): name for name, weight in self._method.weights.items()}
        return ((names.get(id(p), n), p) for n, p in self._trainer.model.named_parameters())

    def restore(self) -> None:
        """Weights and buffers as they were when `untouched` was entered."""
        self.put(self._saved)

    @torch.no_grad()
    def put(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy weights and buffers into the model, by name."""
        for name, tensor in (*self._parameters(), *self._trainer.model.named_buffers()):
            if name in weights:
                tensor.copy_(weights[name])

    def trained(self) -> dict[str, torch.Tensor]:
        """Inside `untouched`: what a trial changes, as it is now."""
        tensors = (*self._parameters(), *self._trainer.model.named_buffers())
        return {n: t.detach() for n, t in tensors if n in self._saved}

    def fingerprint(self, level: int) -> str:
        """SHA-256 of all that the scores of a search depend on: weights, teacher, arguments, sizes of the data."""
        trainer = self._trainer
        told = relevant({**trainer.args.to_dict(), **self.settings.record()})
        told |= {"level": level, "metric": trainer.selection_metric}
        told |= {"rows": [len(trainer.train_dataset), len(self._selection)]}
        told |= {"step": [trainer._train_batch_size, self.rows_per_step()]}
        if trainer.given_optimizer is not None:
            told["optimizer"] = str(trainer.given_optimizer)
        elif trainer.optimizer_cls_and_kwargs is not None:
            made, given = trainer.optimizer_cls_and_kwargs
            plain = {k: v for k, v in given.items() if isinstance(v, int | float | str | tuple)}  # an address changes
            told["optimizer"] = [made.__qualname__, plain]
        if isinstance(trainer.model, PreTrainedModel):
            told["model"] = relevant(trainer.model.config.to_dict())
        with self.random_state():  # what the data look like when the model gets them
            for dataset in (trainer.train_dataset, self._selection):
                spread = range(0, len(dataset), max(1, len(dataset) // 32))
                some = self._loader(dataset, 4, spread)
                told[f"batch of {len(told)}"] = [plain_batch(batch) for batch in some]
        return digest_of(told, [model for model in (trainer.model, trainer.teacher) if model is not None])

    @contextlib.contextmanager
    def random_state(self) -> Iterator[None]:
        """Torch, Python and NumPy random states and the model's train/eval mode, restored on leaving."""
        python_state, numpy_state, training = random.getstate(), np.random.get_state(), self._trainer.model.training
        devices = [self._trainer.args.device] if self._trainer.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            try:
                yield
            finally:
                random.setstate(python_state)
                np.random.set_state(numpy_state)
                self._trainer.model.train(training)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, labels are counted on this device only: others do not join in what it runs alone."""
        args, before = self._trainer.args, self._trainer.args.average_tokens_across_devices
        args.average_tokens_across_devices = False
        try:
            yield
        finally:
            args.average_tokens_across_devices = before

    @property
    def _scaled(self) -> bool:
        """Whether losses of micro-batches are shares of a step's loss already, as `Trainer.training_step` tells."""
        told = self._trainer.loss_is_scaled_for_ga
        return self._trainer.compute_loss_func is not None if told is None else told

    def gradient_stats(self, needs: set[str], level: int) -> GradientStats:
        """Statistics of the label loss over `criterion_batches` small train batches, dropout off.

        The label loss, because a teacher equal to the dense student has no gradient at the first level.
        """
        trainer, args = self._trainer, self._trainer.args
        rows = args.criterion_batches * args.criterion_batch_size
        order = torch.Generator().manual_seed(key_seed(args.seed, "gradients", level))
        available = len(trainer.train_dataset)
        indices = torch.cat([torch.randperm(available, generator=order) for _ in range(-(-rows // available))])[:rows]
        stats = GradientStats(trainer.model, self._method.weights, needs)
        with self.random_state(), self._alone(), _deterministic(trainer.args.device), stats:
            set_seed(key_seed(args.seed, "gradients", level) % 2**32)  # for a collator that draws
            trainer.model.eval()
            for inputs in self._loader(trainer.train_dataset, args.criterion_batch_size, indices.tolist()):
                with trainer.compute_loss_context_manager():
                    stats.sample(self._loss(inputs, self._items([inputs])))
        return stats

    def _items(self, micro_batches: Sequence[dict]) -> torch.Tensor | int | None:
        """Labels of one step; None where the loss does not ask for their number, as `Trainer` counts them."""
        return self._trainer._get_num_items_in_batch(micro_batches, self.device)

    def _loss(self, inputs: dict, items: torch.Tensor | int | None) -> torch.Tensor:
        trainer = self._trainer
        return trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs), num_items_in_batch=items)

    def refit(self, before: Mapping[str, torch.Tensor], level: int) -> Refit:
        """Fit what the masks in force have left to what it computed with the weights `before`, by name."""
        with self.random_state(), _deterministic(self.device):
            inputs = self._refit_inputs(level)
            self._trainer.model.eval()
            return refit(self._trainer.model, self._method.weights, before, inputs)

    def _refit_inputs(self, level: int) -> dict[str, object]:
        """One batch of `refit_rows` train rows, without labels; fewer where these have more than `MOST_POSITIONS`
        tokens. To be called inside `random_state`."""
        trainer, args = self._trainer, self._trainer.args
        order = torch.Generator().manual_seed(key_seed(args.seed, "refit", level))
        rows = torch.randperm(len(trainer.train_dataset), generator=order)[: self.settings.refit_rows].tolist()
        set_seed(key_seed(args.seed, "refit", level) % 2**32)  # for a collator that draws
        (inputs,) = self._loader(trainer.train_dataset, len(rows), rows)
        if "input_ids" in inputs and inputs["input_ids"].numel() > MOST_POSITIONS:
            fewer = max(1, MOST_POSITIONS * len(rows) // inputs["input_ids"].numel())
            (inputs,) = self._loader(trainer.train_dataset, fewer, rows[:fewer])
        inputs = trainer.own_inputs(trainer._prepare_inputs(inputs))
        return inputs if self._wants_labels() else {n: v for n, v in inputs.items() if n not in trainer.label_names}

    def _wants_labels(self) -> bool:
        """Whether the model's forward pass may need labels: as an argument, to make a decoder's inputs from them, or
        because it takes them and is none of transformers, which do without."""
        trainer, model, labels = self._trainer, self._trainer.model, self._trainer.label_names
        takes = inspect.signature(model.forward).parameters
        if not type(model).forward.__module__.startswith("transformers."):
            takes_any = any(name in takes for name in labels)
            return takes_any and trainer.compute_loss_func is None and trainer.label_smoother is None
        if any(takes[name].default is inspect.Parameter.empty for name in labels if name in takes):
            return True
        return isinstance(model, PreTrainedModel) and model.config.is_encoder_decoder

    def refitted(self, done: Refit) -> dict[str, torch.Tensor]:
        """The parameters that a refit has changed, as they are now."""
        layers = {name.removesuffix("weight") for name in done.fitted}
        return {
            name: tensor.detach() for name, tensor in self._parameters() if name.rpartition(".")[0] + "." in layers
        }

    def steps_of_refit(self, level: int) -> float:
        """Cost of one `refit` in training steps; 0 where nothing can be fitted."""
        with self.random_state():
            inputs = self._refit_inputs(level)
            self._trainer.model.eval()
            fits = fittable(self._trainer.model, self._method.weights, inputs)
        return REFIT_COST * find_batch_size(inputs) / self.rows_of_training() if fits else 0.0

    def trial(
        self,
        load_masks: Callable[[], MaskSet],
        trial: Trial,
        level: int,
        progress,
        load_start: Callable[[], Mapping[str, torch.Tensor]] | None = None,
    ) -> float:
        """Train under the loaded masks from the saved weights, or from others; returns the score, lower is better.

        The learning rate warms up over a tenth of the steps and decays linearly to 0. With several evaluations the
        score is the mean over the last ten (or fewer), spread evenly.
        """
        trainer, args, method, steps = self._trainer, self._trainer.args, self._method, trial.steps
        self.restore()
        self.fit = None
        if load_start is not None:
            self.put(load_start())
        method.set_masks(load_masks())  # a loader, so that nobody keeps the boolean masks while the trial runs
        if self.settings.refit_rows and load_start is None:
            self.fit = self.refit(self._saved, level)
        if not steps:
            progress.update()
            return self.score()
        order = (level, trial.before) if trial.before else (level,)  # a shuffled training goes on with other rows
        set_seed(key_seed(args.seed, "trial", *order) % 2**32)
        optimizer = trainer.new_optimizer(trial.learning_rate)
        schedule = get_scheduler("linear", optimizer, round(TRIAL_WARMUP * steps), steps)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        marks, scores = trial.marks, []
        for done, micro_batches in enumerate(self._train_batches(steps), start=1):
            trainer.model.train()
            with self._alone():
                items = self._items(micro_batches)
                for inputs in micro_batches:
                    with trainer.compute_loss_context_manager():
                        loss = self._loss(inputs, items)
                    (loss if self._scaled else loss / len(micro_batches)).backward()
            method.before_clipping()
            if args.max_grad_norm > 0:
                torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            method.on_optimizer_step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            progress.update()
            if done in marks:
                scores.append(self.score())
        last = scores[-EARLY_MEAN:]
        return sum(last) / len(last)

    @torch.no_grad()
    def score(self) -> float:
        """The model as it is on the selection split: a loss (mean over rows) or minus the metric; lower is better."""
        trainer, args = self._trainer, self._trainer.args
        by_loss = trainer.selection_metric in SELECTION_LOSSES
        total, rows, logits, labels = 0.0, 0, None, None
        if self._taught_rows != args.per_device_eval_batch_size:
            self._soft_labels.clear()
            self._taught_rows = args.per_device_eval_batch_size
        with self.random_state(), self._alone():
            set_seed(key_seed(args.seed, "score") % 2**32)
            trainer.model.eval()
            loader = self._loader(self._selection, args.per_device_eval_batch_size, collator=self._collator)
            for batch, inputs in enumerate(loader):
                count = find_batch_size(inputs)
                rows += count
                if by_loss:
                    with trainer.compute_loss_context_manager():
                        inputs = trainer._prepare_inputs(inputs)
                        taught = self._taught(batch, inputs, count) if trainer.selection_metric == "teacher" else None
                        total += float(trainer.selection_loss(inputs, taught)) * count
                else:
                    _, logit, label = trainer.prediction_step(trainer.model, inputs, prediction_loss_only=False)
                    if trainer.preprocess_logits_for_metrics is not None:
                        logit = trainer.preprocess_logits_for_metrics(logit, label)
                    logits = logit if logits is None else nested_concat(logits, logit)
                    labels = label if labels is None else nested_concat(labels, label)
        if by_loss:
            return total / rows
        metrics = trainer.compute_metrics(EvalPrediction(nested_numpify(logits), nested_numpify(labels)))
        metrics = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        if trainer.selection_metric not in metrics:
            raise ValueError(
                f"selection_metric={trainer.selection_metric!r} is not returned by compute_metrics: choose 'loss' or "
                "one of "
                f"{', '.join(metrics)}"
            )
        return -metrics[trainer.selection_metric]

    def _taught(self, batch: int, inputs: dict[str, torch.Tensor], rows: int) -> torch.Tensor:
        """The teacher's logits on a batch of the selection split; kept, unless they are large (a language model's)."""
        if batch < len(self._soft_labels):
            return self._soft_labels[batch].to(self.device)
        logits = self._trainer.soft_labels(inputs)
        self._keeps_soft_labels &= logits.numel() // rows * len(self._selection) <= MOST_SOFT_LABELS
        if self._keeps_soft_labels:
            self._soft_labels.append(logits.cpu())
        else:
            self._soft_labels.clear()
        return logits

    def steps_of_score(self) -> float:
        """Cost of one `score` in training steps (a forward pass is a third of forward and backward)."""
        passes = 1 if self._keeps_soft_labels else 2
        return passes * self._steps_of_pass()

    def steps_of_teaching(self) -> float:
        """Cost of the soft labels that are kept, once a run."""
        kept = self._trainer.selection_metric == "teacher" and self._keeps_soft_labels
        return self._steps_of_pass() if kept else 0.0

    def _steps_of_pass(self) -> float:
        return len(self._selection) / (3 * self.rows_of_training())

    @property
    def peak_rate(self) -> float:
        """Learning rate of the run before its schedule."""
        return self._trainer.peak_rate

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._trainer.args.device

    def rows_per_step(self) -> int:
        """Rows of one trial step: by default those of a training step, so that what is chosen does not depend on the
        number of devices."""
        return self._trainer.args.trial_batch_size or self.rows_of_training()

    def rows_of_training(self) -> int:
        """Rows of one optimizer step of the training, over all devices."""
        trainer, args = self._trainer, self._trainer.args
        devices = 1 if args.accelerator_config.split_batches else args.world_size
        return trainer._train_batch_size * args.gradient_accumulation_steps * devices

    def steps_per_epoch(self) -> int:
        """Trial steps of one pass over the train split."""
        return max(1, len(self._trainer.train_dataset) // self.rows_per_step())

    def _train_batches(self, steps: int) -> Iterator[list[dict]]:
        """`steps` groups of micro-batches of `rows_per_step` together, in the order of the trainer's own sampler."""
        trainer, rows = self._trainer, self.rows_per_step()
        micro = min(trainer._train_batch_size, rows)
        while True:
            sampler = trainer._get_train_sampler(trainer.train_dataset)
            group: list[dict] = []
            for inputs in self._loader(trainer.train_dataset, micro, sampler):
                group.append(inputs)
                if len(group) * micro >= rows:
                    yield group
                    group, steps = [], steps - 1
                    if steps == 0:
                        return
            if group:
                yield group
                steps -= 1
                if steps == 0:
                    return

    def _loader(self, dataset, batch_size: int, sampler: Sequence[int] | None = None, collator=None) -> DataLoader:
        """Not prepared by accelerate, which would shard it; its own generator keeps the global one still, and its own
        copy of the collator that of a collator which draws (masked language modelling with a seed)."""
        trainer = self._trainer
        collate = _copy_of(trainer.data_collator if collator is None else collator, trainer.model)
        if is_datasets_available():
            import datasets

            if isinstance(dataset, datasets.Dataset):
                dataset = trainer._remove_unused_columns(dataset, description="search")
            else:
                collate = trainer._get_collator_with_removed_columns(collate, description="search")
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(0),
        )
