"""The score of the model on the held-out rows."""

import torch
from torch import Tensor
from transformers import EvalPrediction, set_seed
from transformers.trainer_pt_utils import find_batch_size, nested_concat, nested_numpify

from ..fields.rules import SELECTION_LOSSES
from ..utils.seeds import key_seed
from .batches import Batches
from .borrowed import BorrowedTrainer, Inputs
from .sandbox import Sandbox

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
        """Return the loss on the held-out rows (mean over rows) or minus the metric: lower is better.

        Raises:
            ValueError: `compute_metrics` does not return the metric.
        """
        with self._sandbox.random_state(), self._sandbox.alone():
            set_seed(key_seed(self._trainer.args.seed, "score") % 2**32)  # for a collator that draws
            self._trainer.model.eval()
            if self._trainer.selection_metric in SELECTION_LOSSES:
                return self._mean_loss()
            prediction = self._predictions()
        metrics = self._trainer.compute_metrics(prediction)
        metrics, metric = {k.removeprefix("eval_"): v for k, v in metrics.items()}, self._trainer.selection_metric
        if metric not in metrics:
            raise ValueError(
                f"selection_metric={metric!r} is not returned by compute_metrics: choose 'loss' or one of "
                f"{', '.join(metrics)}"
            )
        return -metrics[metric]

    def _mean_loss(self) -> float:
        trainer, total, rows = self._trainer, 0.0, 0
        if self._rows_per_batch != trainer.args.per_device_eval_batch_size:
            self._soft_labels.clear()
            self._rows_per_batch = trainer.args.per_device_eval_batch_size
        for batch, inputs in enumerate(self._batches.of_held_out()):
            count = find_batch_size(inputs)
            rows += count
            with trainer.compute_loss_context_manager():
                inputs = trainer._prepare_inputs(inputs)
                by_teacher = trainer.selection_metric == "teacher"
                soft_labels = self._soft_labels_of(batch, inputs, count) if by_teacher else None
                total += float(self._loss(inputs, soft_labels)) * count
        return total / rows

    def _loss(self, inputs: Inputs, soft_labels: Tensor | None) -> Tensor:
        """Return the label loss of a batch, or with soft labels the cross-entropy against them: a mean over rows."""
        trainer = self._trainer
        if soft_labels is None:
            items = trainer._get_num_items_in_batch([inputs], trainer.args.device)
            return trainer.compute_loss(trainer.model, inputs, num_items_in_batch=items)
        with trainer.accelerator.autocast():
            outputs = trainer.model(**trainer.own_inputs(inputs))
            return trainer.distiller.disagreement(inputs, outputs, soft_labels)

    def _predictions(self) -> EvalPrediction:
        """Return the logits and labels of all held-out rows, as `Trainer.evaluate` gathers them."""
        trainer, logits, labels = self._trainer, None, None
        for inputs in self._batches.of_held_out():
            _, logit, label = trainer.prediction_step(trainer.model, inputs, prediction_loss_only=False)
            if trainer.preprocess_logits_for_metrics is not None:
                logit = trainer.preprocess_logits_for_metrics(logit, label)
            logits = logit if logits is None else nested_concat(logits, logit)
            labels = label if labels is None else nested_concat(labels, label)
        return EvalPrediction(nested_numpify(logits), nested_numpify(labels))

    def _soft_labels_of(self, batch: int, inputs: Inputs, rows: int) -> Tensor:
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
