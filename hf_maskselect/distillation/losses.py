"""The distillation loss, as a pure function of the outputs of student and teacher.

It is the loss of "Randomized Pruning Mask Generation and Selection" (EMNLP Findings 2023,
https://arxiv.org/abs/2310.13183): hidden states + attention maps + predictions. The paper weighs the three terms with
1 and uses temperature 1.

Every term is the mean over the examples of a batch of a mean over the real tokens of each example. The loss of 16 rows
is therefore the mean of the losses of its two halves, however they are padded, and gradient accumulation is exact.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Outputs = Mapping[str, Any]
FIELDS = {"hidden_states": "distill_hidden", "attentions": "distill_attention"}  # output -> field of its weight


@dataclass(frozen=True)
class DistillWeights:
    """The weights of the terms, each at least 0 (0 leaves the term out), and the temperature of the predictions.

    They are the fields `distill_logits`, `distill_hidden`, `distill_attention` (1.0 in the paper),
    `distill_temperature` and `hard_label_weight` of [`PruningConfig`].

    Raises:
        ValueError: a value is out of range, or no weight is above 0.
    """

    logits: float = 1.0
    hidden: float = 1.0
    attention: float = 0.0
    temperature: float = 1.0
    hard_label: float = 0.0

    def __post_init__(self) -> None:
        weights = {"distill_logits": self.logits, "distill_hidden": self.hidden}
        weights |= {"distill_attention": self.attention, "hard_label_weight": self.hard_label}
        for name, value in weights.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value}: give a number of at least 0 (0 leaves the term out)")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"distill_temperature={self.temperature}: give a number above 0 (1.0 in the paper)")
        if not any(weights.values()):
            raise ValueError(f"{', '.join(weights)} are all 0, so there is nothing to learn from: set one above 0")


def distill_loss(
    weights: DistillWeights,
    student: Outputs,
    teacher: Outputs,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    label_loss: Tensor | None = None,
    problem: str | None = None,
    layers: Sequence[int] | None = None,
) -> Tensor:
    """Return the weighted sum of the terms, a float32 scalar, also under autocast.

    `hidden * sum_l MSE(h_l) + attention * sum_l MSE(a_l) + logits * prediction + hard_label * label_loss`, where `h_l`
    are the outputs of the embeddings and of every layer, and `a_l` the attention probabilities that the model returns
    (after attention dropout in training mode, as in the paper's code).

    Args:
        weights: weights of the terms.
        student: outputs of the student: `hidden_states`, each `(batch, tokens, width)`, `attentions`, each
            `(batch, heads, tokens, tokens)`, and `logits`, as far as their weights are above 0.
        teacher: the same outputs of the teacher.
        mask: `(batch, tokens)`, not 0 for real tokens. All tokens are real without it.
        labels: `(batch,)` or `(batch, outputs)`, needed for a regression only.
        label_loss: the student's own loss, a mean over the batch, needed if `weights.hard_label > 0`.
        problem: `"regression"` compares logits with the labels, `"multi_label_classification"` takes one binary
            decision a label; anything else is a choice between classes.
        layers: for each layer of the student the number of the teacher's layer it learns from; by default the same.

    Raises:
        ValueError: an output is missing, or two of them differ in number or shape.
    """
    terms = []
    if weights.hidden > 0:
        pairs = _layer_pairs("hidden_states", student, teacher, layers)
        tokens = _token_weights(mask, pairs[0][0])
        terms += [weights.hidden * _weighted_mse(s, t, tokens, dim=-1) for s, t in pairs]
    if weights.attention > 0:
        pairs = _layer_pairs("attentions", student, teacher, layers)
        tokens = _token_weights(mask, pairs[0][0][:, 0])
        # Pairs of a real query and a real key: 1 / (batch * real ** 2) each.
        squares = tokens[:, :, None] * tokens[:, None, :] * len(tokens)
        terms += [weights.attention * _weighted_mse(s, t, squares, dim=1) for s, t in pairs]
    if weights.logits > 0:
        if problem == "regression":
            terms.append(weights.logits * _label_mse(student["logits"], labels))
        else:
            entropy = soft_cross_entropy(student["logits"], teacher["logits"], mask, weights.temperature, problem)
            terms.append(weights.logits * entropy)
    if weights.hard_label > 0:
        if label_loss is None:
            raise ValueError(
                "no label loss for hard_label_weight: keep the labels in the dataset, or set hard_label_weight=0"
            )
        terms.append(weights.hard_label * label_loss.float())
    return torch.stack(terms).sum()


def soft_cross_entropy(
    student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float = 1.0, problem: str | None = None
) -> Tensor:
    """Return `-sum softmax(t / T) log_softmax(s / T)`, averaged over batch and classes, times `T ** 2`.

    With `problem="multi_label_classification"`, it is the binary cross-entropy of each label instead.

    Args:
        student: logits `(batch, classes)`, or `(batch, tokens, classes)`, of which real tokens count only.
        teacher: logits of the same shape.
        mask: `(batch, tokens)`, not 0 for real tokens.
        temperature: `T`, > 0.
        problem: as in `distill_loss`.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's logits have shape {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}: "
            "use a teacher with the student's head, or set distill_logits=0"
        )
    s, t = student.float() / temperature, teacher.float() / temperature
    if problem == "multi_label_classification":
        entropy = F.binary_cross_entropy_with_logits(s, t.sigmoid(), reduction="none").mean(-1)
    else:
        entropy = -(t.softmax(-1) * s.log_softmax(-1)).mean(-1)
    mean = entropy.mean() if entropy.dim() == 1 else (entropy * _token_weights(mask, student)).sum()
    return mean * temperature**2


def _layer_pairs(
    key: str, student: Outputs, teacher: Outputs, layers: Sequence[int] | None
) -> list[tuple[Tensor, Tensor]]:
    """Pairs (student, teacher) of the hidden states or attention maps to compare."""
    theirs = teacher[key]
    if layers is not None:
        first = [0] if key == "hidden_states" else []  # hidden states begin with the embeddings
        theirs = [theirs[index] for index in (*first, *(layer + len(first) for layer in layers))]
    pairs = list(zip(student[key], theirs, strict=True))
    for s, t in pairs:
        if s.shape != t.shape:
            raise ValueError(
                f"the student's {key} have shape {tuple(s.shape)} and the teacher's {tuple(t.shape)}: set "
                f"{FIELDS[key]}=0, or use a teacher of the same shape"
            )
    return pairs


def _token_weights(mask: Tensor | None, like: Tensor) -> Tensor:
    """Weights (batch, tokens) in float32 that turn a sum into a mean over real tokens, then over examples.

    `like` is any tensor (batch, tokens, ...) of the states to be weighed.
    """
    if mask is None:
        mask = like.new_ones(like.shape[:2])
    elif mask.shape != like.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)} but the model returns states of {tuple(like.shape[:2])} "
            "(batch, tokens): pass a 0/1 mask of that shape, so that padding can be left out of the distillation, or "
            "set distill_hidden=0 and distill_attention=0"
        )
    mask = mask.ne(0).float()
    return mask / (mask.sum(1, keepdim=True).clamp(min=1) * len(mask))


def _weighted_mse(student: Tensor, teacher: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Sum of `weights` times the squared difference averaged over `dim`.

    `mse_loss` squares the difference in one pass. For the backward it keeps only its two inputs, which exist anyway.
    """
    return (F.mse_loss(student.float(), teacher.float(), reduction="none").mean(dim) * weights).sum()


def _label_mse(logits: Tensor, labels: Tensor | None) -> Tensor:
    """MSE of regression logits (batch, outputs) to the labels (batch,) or (batch, outputs), as the paper on STS-B."""
    if labels is None:
        raise ValueError(
            "distilling a regression compares the student with the labels and this batch has none: keep the labels in "
            "the dataset, or set distill_logits=0"
        )
    if labels.numel() != logits.numel():
        raise ValueError(
            f"the regression labels have shape {tuple(labels.shape)} and the logits {tuple(logits.shape)}: give one "
            "number for each output"
        )
    return F.mse_loss(logits.float(), labels.float().reshape(logits.shape))
