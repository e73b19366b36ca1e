"""The names of the trainer that trials, refits and scores use, as one type."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import PruningConfig


class BorrowedTrainer(Protocol):
    """`PruningTrainer` as the search sees it (its class is in a room above, which this one does not import)."""

    # Of `transformers.Trainer`.
    args: PruningConfig
    model: PreTrainedModel
    train_dataset: Any
    data_collator: Any
    label_names: list[str]
    label_smoother: Any
    optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None
    compute_loss: Callable[..., Any]  # the label loss in eval mode, the training loss in train mode
    compute_loss_func: Callable[..., Any] | None
    compute_loss_context_manager: Callable[[], AbstractContextManager]
    loss_is_scaled_for_ga: bool | None
    prediction_step: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]
    preprocess_logits_for_metrics: Any
    compute_metrics: Any

    # Of `PruningTrainer`.
    given_optimizer: torch.optim.Optimizer | None
    selection_metric: str
    own_inputs: Callable[..., dict[str, Any]]
    new_optimizer: Callable[[float], torch.optim.Optimizer]
    soft_labels: Callable[[dict[str, Any]], Tensor]
    selection_loss: Callable[[dict[str, Any], Tensor | None], Tensor]

    # Private names of `transformers.Trainer`, all that this room uses: look here first if a new version breaks it.
    _train_batch_size: int
    _prepare_inputs: Callable[..., dict[str, Any]]
    _get_num_items_in_batch: Callable[..., Tensor | int | None]
    _get_train_sampler: Callable[..., Any]
    _remove_unused_columns: Callable[..., Any]
    _get_collator_with_removed_columns: Callable[..., Any]

    @property
    def teacher(self) -> PreTrainedModel | None:
        """The frozen model that is distilled from."""

    @property
    def peak_rate(self) -> float:
        """Learning rate of the run before its schedule."""
