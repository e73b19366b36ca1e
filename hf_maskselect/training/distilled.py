"""The losses of a run: those of `Trainer` or of a subclass, and in training what the teacher adds."""

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from ..config import PruningConfig
from ..utils.swapped import overrides, swapped


class Distilled(Trainer):
    """A `Trainer` that may have a teacher.

    Attributes:
        distiller: a `Distiller`; a `FrozenTeacher` where a subclass overrides `distilled`; None without a teacher.
        teacher: the frozen model that is distilled from, or None.
    """

    args: PruningConfig
    model: PreTrainedModel
    distiller: Any = None
    loss_is_scaled_for_ga: bool | None = None  # `Trainer` of the oldest supported transformers has no such attribute
    _teacher_only: Set[str] = frozenset()  # inputs of the teacher that the student does not take
    # Entries of the batch that a loss of the user's does not pass on to `distilled`.
    _set_aside: Mapping[str, Any] = {}
    _was_distilled = False  # whether `distilled` was called in this run

    @property
    def teacher(self) -> PreTrainedModel | None:
        """The frozen model that is distilled from."""
        return None if self.distiller is None else self.distiller.teacher

    @property
    def _signature_columns(self) -> Any:
        """The columns that reach the collator, with those for the teacher, whoever found out the others."""
        columns = self._student_columns
        return columns if columns is None else columns + sorted(self._teacher_only - set(columns))

    @_signature_columns.setter
    def _signature_columns(self, columns: Any) -> None:
        self._student_columns = columns

    @property
    def own_loss(self) -> bool:
        """Whether a subclass has its own `compute_loss`."""
        return overrides(self, "compute_loss", Distilled)

    def own_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of the model: the batch without what is only for the teacher."""
        return {name: value for name, value in inputs.items() if name not in self._teacher_only}

    def _with_set_aside(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with what a loss of the user's did not get, or took out."""
        return {**self._set_aside, **inputs}

    def _prepare_inputs(self, inputs: Any) -> Any:
        inputs = super()._prepare_inputs(inputs)
        if self.distiller is None or not self.own_loss:
            return inputs
        self._set_aside = {n: v for n, v in inputs.items() if n in self._teacher_only or n in self.label_names}
        return self.own_inputs(inputs)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Return the distillation loss in training with a teacher, else the loss of `Trainer`.

        A subclass that overrides it without `super()` and has a teacher calls `distilled`.
        """
        own = self.own_inputs(inputs)
        if self.distiller is None or not model.training:
            return super().compute_loss(model, own, return_outputs, num_items_in_batch)
        asked = {**own, **self.distiller.student_kwargs}
        label_loss, outputs = super().compute_loss(model, asked, True, num_items_in_batch)
        loss = self.distilled(label_loss, outputs, inputs)
        self._was_distilled = True  # also where `distilled` is overridden
        return (loss, outputs) if return_outputs else loss

    def distilled(self, loss: Tensor | None, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return the loss to train with. In training with a teacher it is `hard_label_weight * loss` and its terms.

        Call it at the end of a `compute_loss` of your own, and call the model with `**self.distiller.student_kwargs`
        if hidden states or attention maps count. Override it to distil in another way, from `self.teacher`, which may
        then be any module.

        Args:
            loss: the label loss of the batch, a scalar.
            outputs: of the student, a `ModelOutput`.
            inputs: the batch, as the student gets it.
        """
        if self.distiller is None or not self.model.training:
            assert loss is not None
            return loss
        self._was_distilled, inputs = True, self._with_set_aside(inputs)
        # The terms are means over a batch. A loss that is scaled already is a share of the mean over a whole step.
        scaled = self.loss_is_scaled_for_ga
        scaled = self.compute_loss_func is not None if scaled is None else scaled
        steps = self.current_gradient_accumulation_steps if scaled else 1
        with self.accelerator.autocast():
            if steps == 1:
                return self.distiller.loss(inputs, outputs, loss)
            return self.distiller.loss(inputs, outputs, None if loss is None else loss * steps) / steps

    def check_distilled(self) -> None:
        """Raise a ValueError if losses of this run were computed without its teacher; called before a step."""
        if self.distiller is None or self._was_distilled or overrides(self, "distilled", Distilled):
            return
        name = "compute_loss" if self.own_loss else "training_step"
        raise ValueError(
            f"{name} of {type(self).__name__} leaves out the teacher: return self.distilled(loss, outputs, inputs) as "
            "the loss in compute_loss, or drop the teacher"
        )

    @torch.no_grad()
    def compared(self, inputs: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
        """Return the student's outputs for a batch, and the batch as the teacher takes it.

        A subclass with its own loss may have its own names in a batch, and only its loss knows what they mean.
        """
        passed: list[tuple[Any, Mapping[str, Any]]] = []

        def note(loss: Tensor, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
            passed.append((outputs, self._with_set_aside(inputs)))
            return loss

        with self.accelerator.autocast(), swapped(self, distilled=note):
            if not self.own_loss:
                return self.model(**self.own_inputs(inputs)), inputs
            items = self._get_num_items_in_batch([inputs], self.args.device)
            _, outputs = self.compute_loss(self.model, dict(inputs), return_outputs=True, num_items_in_batch=items)
        return passed[0] if passed else (outputs, self._with_set_aside(inputs))
