"""The names of the trainer that trials, refits and scores use, as one type."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from ..config import PruningConfig

Inputs = dict[str, Any]


class BorrowedTrainer(Protocol):
    """`PruningTrainer` as the search sees it (its class is in a room above, which this one does not import)."""

    args: PruningConfig
    model: PreTrainedModel
    train_dataset: Any
    data_collator: Any
    label_names: Any
    label_smoother: Any
    optimizer_cls_and_kwargs: Any
    given_optimizer: Any  # None where the trainer makes its own
    compute_loss_func: Callable[..., Any] | None
    compute_metrics: Callable[..., Any] | None
    preprocess_logits_for_metrics: Callable[..., Any] | None
    eval_dataset: Any
    loss_is_scaled_for_ga: bool | None
    ignored_keys: list[str] | None  # outputs that metrics do not get
    state: Any
    selection_metric: str
    distiller: Any  # None without a teacher
    accelerator: Any

    @property
    def teacher(self) -> PreTrainedModel | None:
        """The frozen model that is distilled from."""

    @property
    def own_loss(self) -> bool:
        """Whether a subclass has its own `compute_loss`."""

    @property
    def peak_rate(self) -> float | None:
        """Learning rate of the run before its schedule."""

    def new_optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        """Return a fresh optimizer of the run's own class."""

    def own_inputs(self, inputs: Inputs) -> Inputs:
        """Return the inputs of the model, without those of the teacher alone."""

    def compared(self, inputs: Inputs) -> tuple[Any, Mapping[str, Any]]:
        """Return the model's outputs for a batch, and the batch as the teacher takes it."""

    def check_distilled(self) -> None:
        """Raise a ValueError if losses were computed without the teacher."""

    def evaluate(self, *, ignore_keys: list[str] | None = None) -> dict[str, float]:
        """Return the metrics of the evaluation rows."""

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Inputs], Any]:
        """Return micro-batches and the number of their labels."""

    def compute_loss(self, model: Any, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: Any = None):
        """Return the label loss in eval mode, the training loss in train mode."""

    def compute_loss_context_manager(self) -> AbstractContextManager:
        """Return the autocast context of the run."""

    def prediction_step(self, model: Any, inputs: Inputs, prediction_loss_only: bool) -> tuple[Any, Any, Any]:
        """Return loss, logits and labels of one batch."""

    # Private names of `transformers.Trainer`, all that this room uses: look here first if a new version breaks it.
    _train_batch_size: int

    def _prepare_inputs(self, inputs: Any) -> Any: ...
    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any: ...
    def _get_train_sampler(self, train_dataset: Any = None) -> Any: ...
    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any: ...
    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any: ...
