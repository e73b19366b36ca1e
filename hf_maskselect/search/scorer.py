"""The score of the model on the held-out rows."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DefaultFlowCallback, Trainer, TrainerControl, set_seed
from transformers.trainer_callback import CallbackHandler

from ..fields.rules import SELECTION_LOSSES
from ..utils.seeds import key_seed
from ..utils.swapped import overrides, swapped
from .batches import Batches
from .borrowed import BorrowedTrainer, Inputs
from .sandbox import Sandbox

# Of an evaluation, what is no metric of `compute_metrics`.
_NO_METRICS = {"loss", "sparsity", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time"}
MOST_SOFT_LABELS = 1 << 24  # soft labels of the teacher are kept if they are at most so many numbers


class Scorer:
    """Scores the model with the trainer's own loss, its teacher or its `compute_metrics`."""

    def __init__(self, trainer: BorrowedTrainer, sandbox: Sandbox, batches: Batches) -> None:
        self._trainer, self._sandbox, self._batches = trainer, sandbox, batches
        self._soft_labels: list[Tensor] = []  # of the batches of held-out rows
        self._rows_per_batch = 0  # of the batches that the soft labels belong to
        self._keeps_soft_labels = True

    @torch.no_grad()
    def score(self) -> float:
        """Return the loss on the held-out rows (mean over rows) or the metric, of which lower is better.

        A metric of which greater is better gets a minus.

        Raises:
            ValueError: the evaluation does not return the metric, or it is no number.
        """
        by_loss = self._trainer.selection_metric in SELECTION_LOSSES
        with self._sandbox.random_state(), self._sandbox.alone():
            rows = self._batches.held_out_by_length() if by_loss else []
            set_seed(key_seed(self._trainer.args.seed, "score") % 2**32)  # for a collator that draws
            self._trainer.model.eval()
            if by_loss:
                return self._mean_loss(rows)
            metric = self._metric()
        return -metric if self._trainer.args.resolved().selection_greater_is_better else metric

    def _metric(self) -> float:
        """Return the selection metric of the held-out rows, as `evaluate` computes it, without a trace of it."""
        trainer, metric, loader = self._trainer, self._trainer.selection_metric, self._batches.of_held_out()
        quiet = {
            "eval_dataset": self._batches.held_out,
            "get_eval_dataloader": lambda *args, **kwargs: loader,
            "gather_function": trainer.accelerator.gather_for_metrics,
            "log": lambda *args, **kwargs: None,
            "callback_handler": CallbackHandler([DefaultFlowCallback()], trainer.model, None, None, None),
            "control": TrainerControl(),
            "state": copy.copy(trainer.state),
            "optimizer": None,  # one without a schedule would change its weights
        }
        with swapped(trainer, **quiet):
            results = trainer.evaluate(ignore_keys=trainer.ignored_keys)
        metrics = {name.removeprefix("eval_"): value for name, value in results.items()}
        known = ", ".join(name for name in metrics if name not in _NO_METRICS) or "nothing"
        if metric not in metrics:
            raise ValueError(
                f"selection_metric={metric!r} is not returned by compute_metrics: choose 'loss' or one of {known}"
            )
        try:
            return float(metrics[metric])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"selection_metric={metric!r} is {metrics[metric]!r}, which is no number: choose 'loss' or one of "
                f"{known}"
            ) from error

    def _mean_loss(self, order: list[int]) -> float:
        trainer, total, rows = self._trainer, 0.0, 0
        if self._rows_per_batch != trainer.args.per_device_eval_batch_size:
            self._soft_labels.clear()
            self._rows_per_batch = trainer.args.per_device_eval_batch_size
        size, held_out = self._rows_per_batch, len(self._batches.held_out)
        for batch, inputs in enumerate(self._batches.of_held_out(order)):
            count = min(size, held_out - batch * size)
            rows += count
            if trainer.selection_metric != "teacher":
                total += float(self._label_loss(inputs)) * count
                continue
            with trainer.compute_loss_context_manager():
                outputs, taught = trainer.compared(trainer._prepare_inputs(inputs))
                soft_labels = self._soft_labels_of(batch, taught, count)
            with trainer.accelerator.autocast():
                total += float(trainer.distiller.disagreement(taught, outputs, soft_labels)) * count
        return total / rows

    def _label_loss(self, inputs: Inputs) -> Tensor:
        """Return the label loss of a batch, a mean over rows, from `prediction_step` of a subclass if it has one."""
        trainer = self._trainer
        if overrides(trainer, "prediction_step", Trainer):
            loss, _, _ = trainer.prediction_step(trainer.model, inputs, prediction_loss_only=True)
            if loss is not None:
                return loss.mean()
        with trainer.compute_loss_context_manager():
            inputs = trainer._prepare_inputs(inputs)
            items = trainer._get_num_items_in_batch([inputs], trainer.args.device)
            return trainer.compute_loss(trainer.model, inputs, num_items_in_batch=items)

    def _soft_labels_of(self, batch: int, inputs: Mapping[str, Any], rows: int) -> Tensor:
        """Return the teacher's logits on a batch; keep them, unless they are large (those of a language model)."""
        if batch < len(self._soft_labels):
            return self._soft_labels[batch].to(self._trainer.args.device)
        with self._trainer.accelerator.autocast():
            logits = self._trainer.distiller.soft_labels(inputs)
        self._keeps_soft_labels &= logits.numel() // rows * len(self._batches.held_out) <= MOST_SOFT_LABELS
        if self._keeps_soft_labels:
            self._soft_labels.append(logits.cpu())
        else:
            self._soft_labels.clear()
        return logits

    def steps_of_score(self) -> float:
        """Return the cost of one `score` in training steps (a forward pass is a third of forward and backward)."""
        return self._steps_of_pass() * (1 if self._keeps_soft_labels else 2)

    def steps_of_teaching(self) -> float:
        """Return the cost of the soft labels that are kept, which are computed once a run."""
        keeps = self._trainer.selection_metric == "teacher" and self._keeps_soft_labels
        return self._steps_of_pass() if keeps else 0.0

    def _steps_of_pass(self) -> float:
        return len(self._batches.held_out) / (3 * self._batches.rows_of_training())
