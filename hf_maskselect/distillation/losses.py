"""Teacher and losses: the distillation of the randomized-mask paper.

Paper: "Randomized Pruning Mask Generation and Selection" (EMNLP Findings 2023, https://arxiv.org/abs/2310.13183), its
loss: hidden states + attention maps + predictions. The paper weighs the three terms with 1 and uses temperature 1.

Every term is a mean over the examples of a batch of a mean over the *real* tokens of each example. A batch of 16
therefore gives the mean of its two halves of 8, whatever their padding: gradient accumulation changes nothing.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import find_labels

from .teacher import _argument_names, _check_fit, _check_weights, _problem_type, load_teacher

if TYPE_CHECKING:
    from ..config import PruningConfig


class Distiller:
    """A frozen teacher and the loss that pulls a student towards it.

    `hidden * sum_l MSE(h_l) + attention * sum_l MSE(a_l) + logits * prediction + hard_label * label_loss`, with `h_l`
    the embedding output and every layer's output, and `a_l` the post-softmax attention probabilities that the model
    returns (for a student in training mode these have gone through attention dropout, as in the paper's own code).

    The prediction term is the soft cross-entropy `-sum softmax(t / T) log_softmax(s / T)`, averaged over batch *and*
    classes and multiplied by `T ** 2`; with `problem_type="multi_label_classification"`, the binary cross-entropy of
    each label in its place; for regression, the MSE to the *labels*, as the paper does on STS-B. Logits of every token
    (token classification) count the real tokens only.

    Building a `Distiller` freezes `teacher` in place (`eval`, `requires_grad=False`). With `attention > 0` both models
    are switched to `eager` attention, since SDPA returns no attention maps.

    Args:
        teacher: the dense model, of any architecture with the student's vocabulary and task. It may be deeper: with
            `k` times the student's layers, student layer `i` learns from teacher layer `k * i`. It gets the student's
            batch: inputs that only the teacher knows (`token_type_ids` next to a DistilBERT student) must be kept in
            that batch.
        student: the model to be trained; only its config and attention implementation are used.
        logits: weight of the prediction term, >= 0, default 1.0 (`distill_logits`).
        hidden: weight of the hidden states, >= 0, default 1.0 (`distill_hidden`).
        attention: weight of the attention maps, >= 0, default 0.0 (`distill_attention`; 1.0 in the paper).
        temperature: `T` of the prediction term, > 0, default 1.0 (`distill_temperature`).
        hard_label: weight of the student's own loss, >= 0, default 0.0 (`hard_label_weight`).

    Attributes:
        teacher: the frozen teacher.
        student_kwargs: forward arguments the student must be called with so that `loss` finds what it compares.
        teacher_arguments: names of the batch entries that are passed on to the teacher when present (never labels).

    Raises:
        ValueError: for a weight or temperature out of range, no weight above 0, a teacher that shares parameters with
            the student, or one that does not fit it (task, label order, vocabulary, width, heads, depth).
    """

    student_kwargs: dict[str, bool]
    teacher_arguments: frozenset[str]

    def __init__(
        self,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        *,
        logits: float = 1.0,
        hidden: float = 1.0,
        attention: float = 0.0,
        temperature: float = 1.0,
        hard_label: float = 0.0,
    ) -> None:
        _check_weights(logits, hidden, attention, temperature, hard_label)
        self.logits, self.hidden, self.attention = logits, hidden, attention
        self.temperature, self.hard_label = temperature, hard_label
        self.teacher = teacher
        self.layer_ratio = _check_fit(teacher, student, logits=logits, hidden=hidden, attention=attention)
        # The config, not its problem type: the student's first forward with labels may still fill that in.
        self._config = student.config
        self._attention_of_teacher = teacher.config._attn_implementation
        if attention > 0:
            for model in (student, teacher):
                model.set_attn_implementation("eager")
        teacher.eval().requires_grad_(False)
        self.teacher_arguments = _argument_names(teacher) - set(find_labels(type(teacher)))
        self.student_kwargs = {}
        if hidden > 0:
            self.student_kwargs["output_hidden_states"] = True
        if attention > 0:
            self.student_kwargs["output_attentions"] = True

    def release(self) -> None:
        """The teacher as it was given, but frozen: another student may want no attention maps of it."""
        if self.attention > 0:
            self.teacher.set_attn_implementation(self._attention_of_teacher)

    def to(self, device: torch.device | str) -> None:
        """Moves the teacher to `device`."""
        self.teacher.to(device)

    def loss(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any], label_loss: Tensor | None) -> Tensor:
        """The weighted sum of the terms, a float32 scalar, also under autocast. Terms of weight 0 are not computed.

        Args:
            inputs: the batch the student got. `attention_mask` (batch, tokens) says which tokens are real (without it,
                all are); `labels` are read for regression only.
            outputs: the student's `ModelOutput`, from a forward with `student_kwargs`.
            label_loss: the student's own loss, a scalar mean over the batch; needed when `hard_label > 0`.

        Raises:
            ValueError: if something needed is missing, or if the two models return states of unequal number or shape.
        """
        mask = inputs.get("attention_mask")
        regression = self.is_regression
        taught: Mapping[str, Any] = {}
        if self.hidden > 0 or self.attention > 0 or (self.logits > 0 and not regression):
            taught = self._teach(inputs)

        terms = []
        if self.hidden > 0:
            states = self._layers("hidden_states", outputs, taught)
            weights = _token_weights(mask, states[0][0])
            terms += [self.hidden * _weighted_mse(s, t, weights, dim=-1) for s, t in states]
        if self.attention > 0:
            maps = self._layers("attentions", outputs, taught)
            weights = _token_weights(mask, maps[0][0][:, 0])
            # Pairs of a real query and a real key: 1 / (batch * real ** 2) each.
            pairs = weights[:, :, None] * weights[:, None, :] * len(weights)
            terms += [self.attention * _weighted_mse(s, t, pairs, dim=1) for s, t in maps]
        if self.logits > 0:
            if regression:
                terms.append(self.logits * _label_mse(outputs["logits"], inputs.get("labels")))
            else:
                terms.append(self.logits * self._prediction(outputs["logits"], taught["logits"], mask))
        if self.hard_label > 0:
            if label_loss is None:
                raise ValueError(
                    "The batch gave no label loss but hard_label_weight is above 0: keep the labels in the dataset or "
                    "set hard_label_weight=0."
                )
            terms.append(self.hard_label * label_loss.float())
        return torch.stack(terms).sum()

    @property
    def is_regression(self) -> bool:
        """Whether the student predicts numbers, so that there are no soft labels."""
        return _problem_type(self._config) == "regression"

    def soft_labels(self, inputs: Mapping[str, Any]) -> Tensor:
        """The teacher's logits on the batch."""
        return self._teach(inputs)["logits"]

    def disagreement(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any], soft_labels: Tensor) -> Tensor:
        """Soft cross-entropy of the student's predictions against the teacher's, a float32 scalar: the prediction term
        alone and unweighted, for scoring. Classification only."""
        return self._prediction(outputs["logits"], soft_labels, inputs.get("attention_mask"))

    def _teach(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The teacher's outputs on the batch, without labels and without what its forward does not take."""
        known = {name: value for name, value in inputs.items() if name in self.teacher_arguments}
        # Not inference_mode: the losses save the teacher's tensors for their backward.
        with torch.no_grad():
            return self.teacher(**known, **self.student_kwargs, return_dict=True)

    def _layers(self, key: str, outputs: Mapping[str, Any], taught: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Pairs (student, teacher) of the hidden states or attention maps that belong together, checked."""
        is_hidden = key == "hidden_states"
        field = "distill_hidden" if is_hidden else "distill_attention"
        for who, config, out in (("student", self._config, outputs), ("teacher", self.teacher.config, taught)):
            found, expected = len(out.get(key) or ()), config.num_hidden_layers + is_hidden
            if found != expected:
                raise ValueError(
                    f"The {who} returned {found} {key} where its {config.num_hidden_layers} layers should give "
                    f"{expected}: call the student with student_kwargs, or set {field}=0 for this architecture."
                )
        first = 0 if is_hidden else self.layer_ratio - 1  # hidden states begin with the embeddings: 0 belongs to 0
        pairs = list(zip(outputs[key], taught[key][first :: self.layer_ratio], strict=True))
        for s, t in pairs:
            if s.shape != t.shape:
                raise ValueError(
                    f"The student's {key} have shape {tuple(s.shape)} and the teacher's {tuple(t.shape)}: set "
                    f"{field}=0 or use a teacher of the same shape."
                )
        return pairs

    def _prediction(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Soft cross-entropy of logits (batch, classes) or (batch, tokens, classes), mean over classes too."""
        if student.shape != teacher.shape:
            raise ValueError(
                f"The student's logits have shape {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}: "
                "use a teacher with the student's head, or set distill_logits=0."
            )
        s, t = student.float() / self.temperature, teacher.float() / self.temperature
        if _problem_type(self._config) == "multi_label_classification":
            entropy = F.binary_cross_entropy_with_logits(s, t.sigmoid(), reduction="none").mean(-1)
        else:
            entropy = -(t.softmax(-1) * s.log_softmax(-1)).mean(-1)
        mean = entropy.mean() if entropy.dim() == 1 else (entropy * _token_weights(mask, student)).sum()
        return mean * self.temperature**2


def make_distiller(
    teacher: PreTrainedModel | str | os.PathLike, student: nn.Module, args: "PruningConfig"
) -> Distiller:
    """The distiller of a run, on its device.

    Raises:
        ValueError: the student is no model of transformers; and as `load_teacher` and `Distiller` do.
    """
    if not isinstance(student, PreTrainedModel):
        raise ValueError(
            f"a teacher needs a model of transformers, which returns its hidden states, and {type(student).__name__} "
            "is none: leave the teacher out"
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


def _token_weights(mask: Tensor | None, like: Tensor) -> Tensor:
    """Weights (batch, tokens) in float32 that turn a sum into a mean over real tokens, then over examples.

    `like` is any tensor (batch, tokens, ...) of the states to be weighed.
    """
    if mask is None:
        mask = like.new_ones(like.shape[:2])
    elif mask.shape != like.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)} but the model returns states of {tuple(like.shape[:2])} "
            "(batch, tokens): pass a 0/1 mask of that shape so that padding can be left out of the distillation, or "
            "set distill_hidden=0 and distill_attention=0."
        )
    mask = mask.ne(0).float()
    return mask / (mask.sum(1, keepdim=True).clamp(min=1) * len(mask))


def _weighted_mse(student: Tensor, teacher: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Sum of `weights` times the squared difference averaged over `dim`.

    `mse_loss` squares the difference in one pass and keeps only its two inputs, which exist anyway, for the backward.
    """
    return (F.mse_loss(student.float(), teacher.float(), reduction="none").mean(dim) * weights).sum()


def _label_mse(logits: Tensor, labels: Tensor | None) -> Tensor:
    """MSE of regression logits (batch, outputs) to the labels (batch,) or (batch, outputs)."""
    if labels is None:
        raise ValueError(
            "Distilling a regression compares the student with the labels and this batch has none: keep the labels in "
            "the dataset or set distill_logits=0."
        )
    if labels.numel() != logits.numel():
        raise ValueError(
            f"The regression labels have shape {tuple(labels.shape)} and the logits {tuple(logits.shape)}: give one "
            "number for each output."
        )
    return F.mse_loss(logits.float(), labels.float().reshape(logits.shape))
