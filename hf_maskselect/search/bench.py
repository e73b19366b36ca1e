"""Trials of masks on the trainer's own model: gradient samples, refits, short trainings and scores."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_scheduler, set_seed
from transformers.trainer_pt_utils import find_batch_size

from ..masking.maskset import MaskSet
from ..masking.scores import GradientStats, passes
from ..methods.base import Method
from ..surgery.dense_outputs import DenseOutputs, dense_outputs
from ..surgery.passes import positions_of_row, refittable
from ..surgery.refit import Refit, refit_to
from ..utils.seeds import key_seed
from ..utils.swapped import swapped
from ..utils.wrappers import eager
from .batches import Batches
from .borrowed import BorrowedTrainer, Inputs
from .identity import Identity
from .sandbox import Sandbox, deterministic
from .scorer import Scorer

EARLY_EVALUATIONS = 20  # of one "early" trial; its score is the mean of the last ten (arXiv 2310.13183)
EARLY_MEAN = 10
TRIAL_WARMUP = 0.1
DENSE_COST = 1 / 3  # a row of the uncut model's pass, which all refits of a level share, in training rows
REFIT_COST = 1  # a row of a candidate's refit, in training rows
MOST_POSITIONS = 1 << 14  # tokens, patches or frames of a refit, padding included: all pass at once


@dataclass(frozen=True)
class Trial:
    """The length of one trial."""

    steps: int  # 0 scores a mask right after its refit
    learning_rate: float  # peak
    evaluations: int = 1  # how often the model is scored on the way
    before: int = 0  # steps that the weights have been trained already

    @property
    def marks(self) -> set[int]:
        """The steps after which the model is scored: evenly spread, and the last step."""
        return {round(self.steps * (i + 1) / self.evaluations) for i in range(self.evaluations)}


class TrialBench:
    """Tries masks on the trainer's own model.

    Trials are paired: every candidate sees the same batches and the same dropout. They run on the unwrapped model,
    whose DDP hooks stay idle because no DDP forward armed them, with a plain optimizer of the trainer's own class.

    Args:
        trainer: lends its model, losses, data and optimizer class.
        method: holds the masks in force.
        held_out: the rows that candidates are scored on; None when nothing is chosen.
    """

    def __init__(self, trainer: BorrowedTrainer, method: Method, held_out: Any) -> None:
        self.trainer, self.method, self.settings = trainer, method, trainer.args.resolved()
        settings = self.settings
        loads = settings.needs_selection_split or settings.criterion != "magnitude" or settings.refit_rows > 0
        self.sandbox = Sandbox(trainer, method)
        self.batches = Batches(trainer, held_out, copies=loads)
        self.identity = Identity(trainer, self.sandbox, self.batches)
        self.scorer = Scorer(trainer, self.sandbox, self.batches)
        self.last_refit: Refit | None = None  # of the last trial, if it began with one
        self._shares_dense = False
        self._dense: tuple[Mapping[str, Tensor], int, DenseOutputs] | None = None  # weights before the cut, level

    def score(self) -> float:
        """Return `Scorer.score` of the model as it is."""
        return self.scorer.score()

    def trial(
        self,
        load_masks: Callable[[], MaskSet],
        trial: Trial,
        level: int,
        progress: tqdm,
        load_start: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> float:
        """Train under some masks and return the score, lower is better. Call it inside `sandbox.untouched()`.

        The learning rate warms up over a tenth of the steps and decays linearly to 0. With several evaluations the
        score is the mean over the last ten (or fewer).

        Args:
            load_masks: loads the masks, so that nobody holds them during the trial.
            trial: how long to train.
            level: decides the order of the batches.
            progress: a bar that each step moves by one, and a trial of no steps by one.
            load_start: loads the weights to start from; by default those of the run, refitted under the masks.
        """
        self.sandbox.restore()
        self.last_refit = None
        if load_start is not None:
            self.sandbox.put(load_start())
        self.method.set_masks(load_masks())
        if self.settings.refits_cuts and load_start is None:
            self.last_refit = self.refit(self.sandbox.saved, level)
            if trial.steps:
                self._dense = None  # its memory goes to the training, which takes much longer than making it again
        if not trial.steps:
            progress.update()
            return self.score()
        scores = self._train(trial, level, progress)[-EARLY_MEAN:]
        return sum(scores) / len(scores)

    def _train(self, trial: Trial, level: int, progress: tqdm) -> list[float]:
        """Train from the weights in the model; return the score at each mark."""
        trainer, args, scores = self.trainer, self.trainer.args, []
        order = (level, trial.before) if trial.before else (level,)  # a shuffled training goes on with other rows
        set_seed(key_seed(args.seed, "trial", *order) % 2**32)
        optimizer = trainer.new_optimizer(trial.learning_rate)
        schedule = get_scheduler("linear", optimizer, round(TRIAL_WARMUP * trial.steps), trial.steps)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for done, micro_batches in enumerate(self.batches.of_training(trial.steps), start=1):
            trainer.model.train()
            count = len(micro_batches)
            with self.sandbox.alone(), swapped(trainer, current_gradient_accumulation_steps=count):
                micro_batches, items = trainer.get_batch_samples(iter(micro_batches), count, args.device)
                for inputs in micro_batches:
                    with trainer.compute_loss_context_manager():
                        loss = self._loss(inputs, items)
                    (loss if self._is_scaled else loss / count).backward()
            trainer.check_distilled()
            self.method.before_clipping()
            if args.max_grad_norm > 0:
                torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            self.method.on_optimizer_step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            progress.update()
            if done in trial.marks:
                scores.append(self.score())
        return scores

    @property
    def _is_scaled(self) -> bool:
        """Whether the losses of micro-batches are shares of a step's loss already, as in `Trainer.training_step`."""
        scaled = self.trainer.loss_is_scaled_for_ga
        return self.trainer.compute_loss_func is not None if scaled is None else scaled

    def _items(self, micro_batches: list[Inputs]) -> Tensor | int | None:
        """Count the labels of one step as `Trainer` does; None where the loss does not ask for their number."""
        return self.trainer._get_num_items_in_batch(micro_batches, self.trainer.args.device)

    def _loss(self, inputs: Inputs, items: Tensor | int | None) -> Tensor:
        trainer = self.trainer
        return trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs), num_items_in_batch=items)

    def gradient_stats(self, needs: set[str], level: int) -> GradientStats:
        """Return statistics of the label loss over `criterion_batches` small train batches, dropout off.

        Not of the training loss: a teacher equal to the dense student gives no gradient at the first level.
        """
        trainer, args = self.trainer, self.trainer.args
        rows = args.criterion_batches * args.criterion_batch_size
        order = torch.Generator().manual_seed(key_seed(args.seed, "gradients", level))
        available = len(trainer.train_dataset)
        indices = torch.cat([torch.randperm(available, generator=order) for _ in range(-(-rows // available))])[:rows]
        damping, memory = args.obert_damping, args.obert_memory * 2**30
        stats = GradientStats(trainer.model, self.method.weights, needs, damping, memory)
        device = self.trainer.args.device
        with self.sandbox.random_state(), self.sandbox.alone(), deterministic(device), eager(), stats:
            trainer.model.eval()
            for _ in stats.passes(args.criterion_batches):
                set_seed(key_seed(args.seed, "gradients", level) % 2**32)  # for a collator that draws
                for inputs in self.batches.load(trainer.train_dataset, args.criterion_batch_size, indices.tolist()):
                    with trainer.compute_loss_context_manager():
                        stats.sample(self._loss(inputs, self._items([inputs])))
        return stats

    def sampled_rows(self, needs: set[str]) -> int:
        """Return how many rows `gradient_stats` sends through the model, in all its passes."""
        args, sizes = self.trainer.args, [weight.numel() for weight in self.method.weights.values()]
        return (
            args.criterion_batches
            * args.criterion_batch_size
            * passes(needs, sizes, args.criterion_batches, args.obert_memory * 2**30)
        )

    def refit(self, before: Mapping[str, Tensor], level: int) -> Refit:
        """Refit the weights that are not zero; `before` are all weights before the cut, by name.

        They are the targets, unless the method has its own. Inside `shared_dense` the uncut model's outputs serve for
        every call with the same mapping `before`.
        """
        model, weights = self.trainer.model, self.method.weights
        with self.sandbox.random_state(), deterministic(self.trainer.args.device):
            model.eval()
            if self._dense is None or self._dense[0] is not before or self._dense[1] != level:
                self._dense = None  # before others are made: they need memory
                inputs, targets = self._refit_inputs(level), {**before, **self.method.targets()}
                self._dense = before, level, dense_outputs(model, weights, targets, inputs, self._forward())
            dense = self._dense[2]
            if not self._shares_dense:
                self._dense = None
            return refit_to(dense, model, weights)

    @contextlib.contextmanager
    def shared_dense(self) -> Iterator[None]:
        """Let refits inside share the uncut model's outputs, unless their trials train; they are freed on leaving."""
        self._shares_dense = True
        try:
            yield
        finally:
            self._shares_dense, self._dense = False, None

    def steps_of_refit(self, level: int) -> float:
        """Return the cost of one candidate's refit in training steps; 0 where no matrix can be refitted.

        Without the uncut model's pass, which takes `DENSE_COST / REFIT_COST` of it.
        """
        with self.sandbox.random_state():
            inputs = self._refit_inputs(level)
            any_matrix = refittable(self.trainer.model, self.method.weights, inputs, self._forward())
        return REFIT_COST * find_batch_size(inputs) / self.batches.rows_of_training() if any_matrix else 0.0

    def _forward(self) -> Callable[[Inputs], Any] | None:
        """Return how a batch goes through the model, where a subclass has its own way; None for a plain call."""
        return self._own_forward if self.trainer.own_loss else None

    def _own_forward(self, inputs: Inputs) -> None:
        trainer = self.trainer
        with self.sandbox.alone():
            trainer.compute_loss(trainer.model, inputs, True, num_items_in_batch=self._items([inputs]))

    def _refit_inputs(self, level: int) -> Inputs:
        """Return one batch of `refit_rows` train rows, without labels; call it inside `random_state`.

        There are fewer rows where these have more than `MOST_POSITIONS` positions. The model is in eval mode then.
        """
        seed, count = self.trainer.args.seed, self.settings.refit_rows
        order = torch.Generator().manual_seed(key_seed(seed, "refit", level))
        rows = torch.randperm(len(self.trainer.train_dataset), generator=order)[:count].tolist()
        set_seed(key_seed(seed, "refit", level) % 2**32)  # for a collator that draws
        inputs = self._without_labels(rows)
        self.trainer.model.eval()
        with self.sandbox.random_state():
            positions = positions_of_row(self.trainer.model, inputs, self._forward()) * find_batch_size(inputs)
        if positions <= MOST_POSITIONS:
            return inputs
        return self._without_labels(rows[: max(1, MOST_POSITIONS * len(rows) // positions)])

    def _without_labels(self, rows: list[int]) -> Inputs:
        """Return some train rows as one batch for the model, with labels only where its forward pass needs them."""
        trainer = self.trainer
        (inputs,) = self.batches.load(trainer.train_dataset, len(rows), rows)
        inputs = trainer.own_inputs(trainer._prepare_inputs(inputs))
        if trainer.own_loss or self._wants_labels():
            return inputs
        return {name: value for name, value in inputs.items() if name not in trainer.label_names}

    def _wants_labels(self) -> bool:
        """Return whether the forward pass may need labels.

        It does where labels are a required argument, where a decoder's inputs are made from them, and in a model that
        takes them and is not of transformers (those do without).
        """
        trainer, model, labels = self.trainer, self.trainer.model, self.trainer.label_names
        takes = inspect.signature(model.forward).parameters
        if not type(model).forward.__module__.startswith("transformers."):
            takes_any = any(name in takes for name in labels)
            return takes_any and trainer.compute_loss_func is None and trainer.label_smoother is None
        if any(takes[name].default is inspect.Parameter.empty for name in labels if name in takes):
            return True
        return isinstance(model, PreTrainedModel) and model.config.is_encoder_decoder
