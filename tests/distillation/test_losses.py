"""The loss as a pure function of outputs."""

import dataclasses

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from hf_maskselect.distillation.losses import DistillWeights, distill_loss, soft_cross_entropy

LOGITS = DistillWeights(hidden=0.0)


def make_outputs(seed, layers=2, rows=3, tokens=4, width=5, heads=2, classes=3):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "logits": random(rows, classes),
        "hidden_states": [random(rows, tokens, width) for _ in range(layers + 1)],
        "attentions": [random(rows, heads, tokens, tokens).softmax(-1) for _ in range(layers)],
    }


def test_the_terms_are_means_over_real_tokens_then_over_examples():
    student, teacher = make_outputs(0), make_outputs(1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])
    hidden = attention = 0.0
    for row, real in enumerate(mask.sum(1).tolist()):
        for s, t in zip(student["hidden_states"], teacher["hidden_states"], strict=True):
            hidden += functional.mse_loss(s[row, :real], t[row, :real]) / 3
        for s, t in zip(student["attentions"], teacher["attentions"], strict=True):
            attention += functional.mse_loss(s[row, :, :real, :real], t[row, :, :real, :real]) / 3
    logits = -(teacher["logits"].softmax(-1) * student["logits"].log_softmax(-1)).mean()
    weights = DistillWeights(logits=0.5, hidden=2.0, attention=3.0, hard_label=0.25)
    loss = distill_loss(weights, student, teacher, mask, label_loss=torch.tensor(8.0))
    assert_close(loss, 0.5 * logits + 2 * hidden + 3 * attention + 2)


def test_a_deeper_teacher_is_paired_by_the_ratio_of_layers():
    student, deep = make_outputs(0), make_outputs(1, layers=4)
    shallow = {**deep, "hidden_states": deep["hidden_states"][::2], "attentions": deep["attentions"][1::2]}
    weights = DistillWeights(attention=1.0)
    assert_close(distill_loss(weights, student, deep, layers=[1, 3]), distill_loss(weights, student, shallow))


def test_temperature_softens_and_keeps_the_scale_of_the_gradient():
    student, teacher = make_outputs(0)["logits"], make_outputs(1)["logits"]
    expected = 9 * soft_cross_entropy(student / 3, teacher / 3, None)
    assert_close(soft_cross_entropy(student, teacher, None, temperature=3.0), expected)
    weights = dataclasses.replace(LOGITS, temperature=3.0)
    assert_close(distill_loss(weights, {"logits": student}, {"logits": teacher}), expected)


def test_a_regression_needs_no_teacher():
    student, labels = {"logits": torch.tensor([[1.0], [2.0]])}, torch.tensor([1.0, 4.0])
    assert distill_loss(LOGITS, student, {}, labels=labels, problem="regression").item() == 2.0


def test_nothing_is_changed_and_gradients_reach_the_student_only():
    student, teacher = make_outputs(0), make_outputs(1)
    student["logits"].requires_grad_()
    copies = [tensor.clone() for tensor in (*student["hidden_states"], *teacher["hidden_states"])]
    distill_loss(DistillWeights(attention=1.0), student, teacher).backward()
    assert student["logits"].grad.abs().sum() > 0 and teacher["logits"].grad is None
    assert all(map(torch.equal, copies, (*student["hidden_states"], *teacher["hidden_states"])))


def test_another_number_of_layers_is_refused():
    with pytest.raises(ValueError):
        distill_loss(DistillWeights(), make_outputs(0), make_outputs(1, layers=3))
