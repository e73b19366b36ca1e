"""`Distiller`: a frozen teacher and the loss that pulls a student towards it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import PruningConfig
from ..utils.wrappers import plain_model
from .losses import DistillWeights, Outputs, distill_loss, soft_cross_entropy
from .teacher import (
    Teacher,
    argument_names,
    check_fit,
    check_separate,
    check_states,
    load_teacher,
    logits_of,
    problem_type,
)


class Distiller:
    """A frozen teacher and the weights of `distill_loss`, applied batch by batch.

    Building a `Distiller` freezes `teacher` in place (`eval`, `requires_grad=False`). With `attention > 0` both models
    are switched to `eager` attention, since SDPA returns no attention maps.

    Args:
        teacher: the dense model, of any architecture with the student's vocabulary and task. It may be deeper: with
            `k` times the student's layers, layer `i` of the student learns from layer `k * i` of the teacher; a
            student that was made smaller learns from the layers that it kept. Inputs that only the teacher
            takes (`token_type_ids` beside a DistilBERT student) must be in the student's batch.
        student: the model to be trained; only its config and attention implementation are used.
        weights: `logits` (1.0), `hidden` (1.0), `attention` (0.0), `temperature` (1.0) and `hard_label` (0.0), as in
            `DistillWeights`.

    Attributes:
        teacher: the frozen teacher.
        student_kwargs: arguments that the student's forward needs so that `loss` gets the outputs it compares.
        teacher_arguments: names of the batch entries that the teacher gets if they are there (never labels).

    Raises:
        ValueError: a weight is out of range, the teacher shares parameters with the student, or it does not fit the
            student (task, label order, vocabulary, width, heads, depth).
    """

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, **weights: float) -> None:
        teacher, student = plain_model(teacher), plain_model(student)
        self.weights = DistillWeights(**weights)
        self._layers = check_fit(teacher, student, self.weights)
        # The config, not its problem type: the student's first forward with labels may still fill that in.
        self._config = student.config
        if self.weights.attention > 0:
            student.set_attn_implementation("eager")
        self._teacher = Teacher(teacher, self.weights)
        self.teacher, self.teacher_arguments = teacher, self._teacher.arguments
        self.student_kwargs = self._teacher.outputs

    def follow(self, student: PreTrainedModel) -> None:
        """Compare other layers from now on: the student has become smaller.

        Raises:
            ValueError: the teacher does not fit its new shape.
        """
        self._layers, self._config = check_fit(self.teacher, student, self.weights), student.config

    def release(self) -> None:
        """Give the teacher its own attention implementation back; it stays frozen."""
        self._teacher.release()

    def to(self, device: torch.device | str) -> None:
        """Move the teacher to `device`."""
        nn.Module.to(self.teacher, device)

    def loss(self, inputs: Mapping[str, Any], outputs: Outputs, label_loss: Tensor | None) -> Tensor:
        """Return `distill_loss` of one batch; the teacher runs only if a term needs it.

        Args:
            inputs: the student's batch, with `attention_mask` if there is padding, and `labels` for a regression.
            outputs: the student's `ModelOutput`, from a forward with `student_kwargs`.
            label_loss: the student's own loss, a scalar mean over the batch. Needed if `hard_label > 0`.
        """
        weights, problem = self.weights, self._problem(inputs, outputs)
        from_teacher = weights.hidden > 0 or weights.attention > 0 or (weights.logits > 0 and not self.is_regression)
        taught = self._teacher(inputs) if from_teacher else {}
        if weights.logits > 0:
            logits_of("student", outputs)
            if not self.is_regression:
                logits_of("teacher", taught)
        check_states("student", outputs, self._config, self.student_kwargs)
        check_states("teacher", taught, self.teacher.config, self.student_kwargs)
        mask, labels = inputs.get("attention_mask"), inputs.get("labels")
        return distill_loss(weights, outputs, taught, mask, labels, label_loss, problem, self._layers)

    @property
    def is_regression(self) -> bool:
        """Whether the student predicts numbers, so that there are no soft labels."""
        return problem_type(self._config) == "regression"

    def soft_labels(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the teacher's logits on the batch."""
        return logits_of("teacher", self._teacher(inputs))

    def disagreement(self, inputs: Mapping[str, Any], outputs: Outputs, soft_labels: Tensor) -> Tensor:
        """Return the prediction term alone, unweighted: a float32 scalar that scores a student (no regression)."""
        mask, problem = inputs.get("attention_mask"), self._problem(inputs, outputs)
        return soft_cross_entropy(logits_of("student", outputs), soft_labels, mask, self.weights.temperature, problem)

    def _problem(self, inputs: Mapping[str, Any], outputs: Any) -> str | None:
        """Return the problem type. Where the config names none, a label for every logit means several decisions."""
        problem, labels = problem_type(self._config), inputs.get("labels")
        if problem is None and self.weights.logits > 0 and isinstance(labels, Tensor):
            return "multi_label_classification" if labels.shape == logits_of("student", outputs).shape else None
        return problem


class FrozenTeacher:
    """A teacher of any class, frozen in place, for a trainer that overrides `distilled`.

    Attributes:
        teacher: the module.
        student_kwargs: empty: what the student returns is between it and the user.
        teacher_arguments: empty likewise.
    """

    def __init__(self, teacher: nn.Module, device: torch.device) -> None:
        self.teacher = plain_model(teacher).eval().requires_grad_(False).to(device)
        self.student_kwargs: dict[str, bool] = {}
        self.teacher_arguments: frozenset[str] = frozenset()

    def follow(self, student: PreTrainedModel) -> None:
        """Do nothing: what is compared is between the subclass and the user."""

    def release(self) -> None:
        """Do nothing: there is nothing to give back."""


def teacher_only(distiller: Distiller | FrozenTeacher | None, student: nn.Module) -> set[str]:
    """Return the inputs that the teacher takes and the student does not.

    These are the segment ids of a pair, for a BERT teacher of a DistilBERT student.
    """
    wanted = set() if distiller is None else set(distiller.teacher_arguments)
    return {"token_type_ids"} & (wanted - argument_names(student))


def make_distiller(
    teacher: Any, student: nn.Module, args: PruningConfig, own: bool = False
) -> Distiller | FrozenTeacher:
    """Load the teacher of a run if it is a name, and return the distiller on the device of the run.

    Args:
        teacher: a model or the name of one.
        student: the model to train.
        args: the weights of the terms.
        own: whether a subclass distils in its own way, so that the teacher only has to be frozen.

    Raises:
        ValueError: the student is no model of transformers, or for the reasons of `load_teacher` and `Distiller`.
    """
    if own:
        teacher = teacher if isinstance(teacher, nn.Module) else load_teacher(teacher, student)
        check_separate(teacher, student)
        return FrozenTeacher(teacher, args.device)
    if not isinstance(student, PreTrainedModel):
        raise ValueError(
            f"a teacher needs a model of transformers, which returns its hidden states, and {type(student).__name__} "
            "is none: leave the teacher out, or override distilled"
        )
    distiller = Distiller(
        load_teacher(teacher, student),
        student,
        logits=args.distill_logits,
        hidden=args.distill_hidden,
        attention=args.distill_attention,
        temperature=args.distill_temperature,
        hard_label=args.hard_label_weight,
    )
    distiller.to(args.device)
    return distiller
