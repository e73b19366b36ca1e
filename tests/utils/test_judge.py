"""The distance of outputs, against what the tasks' own losses say."""

import pytest
import torch
from tiny import COMMON, NO_DROPOUT
from torch.distributions import Bernoulli, Categorical, kl_divergence
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification

from hf_maskselect.utils.judge import Judge


def make(kind, seed, **changes):
    torch.manual_seed(seed)
    return kind(BertConfig(**COMMON | NO_DROPOUT | changes, initializer_range=0.5)).eval()


@pytest.fixture
def batch():
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[1, 6:], mask[3, 2:] = 0, 0
    return {"input_ids": torch.randint(5, 60, (4, 9)), "attention_mask": mask}


@torch.no_grad()
def outputs(models, batch):
    return [model(**batch) for model in models]


def test_each_of_several_labels_is_a_choice_of_two(batch):
    changes = {"num_labels": 3, "problem_type": "multi_label_classification"}
    models = [make(BertForSequenceClassification, seed, **changes) for seed in (0, 1)]
    old, new = (Bernoulli(logits=output.logits.double()) for output in outputs(models, batch))
    assert Judge(models[0], [batch])(models[1]) == pytest.approx(float(kl_divergence(old, new).mean()))
    one = [make(BertForSequenceClassification, seed, **changes | {"num_labels": 1}) for seed in (0, 1)]
    old, new = (Bernoulli(logits=output.logits.double()) for output in outputs(one, batch))
    assert Judge(one[0], [batch])(one[1]) == pytest.approx(float(kl_divergence(old, new).mean()))


def test_a_question_has_a_first_and_a_last_position_within_the_text(batch):
    models = [make(BertForQuestionAnswering, seed) for seed in (0, 1)]
    terms = []
    for name in ("start_logits", "end_logits"):
        for row, mask in enumerate(batch["attention_mask"].bool()):
            old, new = (Categorical(logits=out[name][row][mask].double()) for out in outputs(models, batch))
            terms.append(kl_divergence(old, new))
    assert Judge(models[0], [batch])(models[1]) == pytest.approx(float(torch.stack(terms).mean()))
