"""A teacher beside losses of the user's own."""

import pytest
import torch
from tiny import METHODS, losses, make, make_rows, make_trainer, same, weights_of
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers import BertForSequenceClassification

from hf_maskselect import Distiller, PruningTrainer

SOFT = {"distill_hidden": 0.0, "max_steps": 4}
WEIGHTS = {"hard_label_weight": 0.5, "max_steps": 4}


def trained(folder, kind=PruningTrainer, teacher=None, **changes):
    keywords = {"teacher": make(seed=3) if teacher is None else teacher, **changes.pop("keywords", {})}
    trainer = make_trainer(folder, changes.pop("model", None), trainer=kind, keywords=keywords, **changes)
    trainer.train()
    return trainer


def equal(first, second):
    return losses(first) == losses(second) and same(weights_of(first.model), weights_of(second.model))


class Own(PruningTrainer):
    """Takes the labels out of the batch and the loss of `Trainer` into its own hands."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        asked = self.distiller.student_kwargs if model.training and self.distiller else {}
        outputs = model(**inputs, **asked)
        loss = self.distilled(cross_entropy(outputs.logits, labels), outputs, inputs)
        return (loss, outputs) if return_outputs else loss


class Deaf(Own):
    def distilled(self, loss, outputs, inputs):
        return loss


class Silent(PruningTrainer):
    """Leaves out the teacher."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class SilentStep(PruningTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**self._prepare_inputs(inputs)).loss
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize("method", [{}, pytest.param(METHODS[1], marks=pytest.mark.slow)], ids=["hard", "random"])
def test_a_loss_that_calls_the_hook_is_distilled(tmp_path, method):
    expected = trained(tmp_path / "a", **method, **WEIGHTS)
    found = trained(tmp_path / "b", Own, **method, **WEIGHTS)
    assert equal(expected, found)
    assert found.evaluate()["eval_loss"] == expected.evaluate()["eval_loss"]


TRIALS = {"method": "random", "num_candidates": 2, "trial_steps": 1}  # they call `compute_loss`


@pytest.mark.parametrize(("kind", "method"), [(Silent, {}), (SilentStep, {}), (Silent, TRIALS)])
def test_a_loss_without_the_teacher_is_refused_before_the_first_step(tmp_path, kind, method):
    model = make()
    before = weights_of(model)
    name = "compute_loss" if kind is Silent else "training_step"
    with pytest.raises(ValueError, match=f"{name} of {kind.__name__} leaves out the teacher: return self.distilled"):
        trained(tmp_path, kind, model=model, pruning_warmup_steps=0 if method else 2, **method, **SOFT)
    assert same(before, weights_of(model))
    keywords = {"teacher": None}
    make_trainer(tmp_path, trainer=kind, keywords=keywords, **SOFT).train()  # without a teacher it trains


def test_a_student_gets_no_columns_of_the_teacher_from_a_loss_of_its_own(tmp_path):
    rows = [{**row, "token_type_ids": torch.arange(8) % 2} for row in make_rows()]
    ends = []
    for kind in (PruningTrainer, Own):
        trainer = make_trainer(
            tmp_path,
            make("DistilBert"),
            rows,
            kind,
            {"teacher": make(seed=3)},
            method="random",
            num_candidates=2,
            trial_steps=1,
            distill_hidden=0.0,
            max_steps=4,
        )
        trainer.train()
        ends.append(trainer)
    assert equal(*ends)


def test_a_hook_of_the_users_distils_from_any_module(tmp_path):
    """A bi-encoder has no logits; what to learn from it is for its user to say."""

    class Embedder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make(seed=3)

        def forward(self, input_ids, attention_mask):
            return self.inner.bert(input_ids, attention_mask).pooler_output

    class Embedding(PruningTrainer):
        calls = 0

        def distilled(self, loss, outputs, inputs):
            assert not self.teacher.training
            self.calls += 1
            student = self.model.bert(inputs["input_ids"], inputs["attention_mask"]).pooler_output
            return loss + mse_loss(student, self.teacher(inputs["input_ids"], inputs["attention_mask"]))

    teacher = Embedder()
    with pytest.raises(ValueError, match="the teacher must be a transformers model"):
        make_trainer(tmp_path, keywords={"teacher": teacher})
    trainer = trained(tmp_path, Embedding, teacher, max_steps=4)
    assert trainer.calls == 4 and not any(p.requires_grad for p in teacher.parameters())
    assert trainer.selection_metric == "loss" and trainer.teacher is teacher
    with pytest.raises(ValueError, match="shares its parameters with the student"):
        make_trainer(tmp_path, teacher.inner, trainer=Embedding, keywords={"teacher": teacher})


class NoLogits(BertForSequenceClassification):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask, **kwargs)
        return {"embeddings": outputs.logits, "hidden_states": outputs.hidden_states}


def test_a_teacher_whose_output_has_no_logits_is_named(tmp_path):
    teacher = NoLogits(make().config)
    with pytest.raises(
        ValueError, match="the teacher returned no logits but embeddings, hidden_states: set distill_log"
    ):
        trained(tmp_path, teacher=teacher)
    with pytest.raises(ValueError, match="the student returned no logits but a Tensor"):
        distiller = Distiller(make(seed=3), make(), hidden=0.0)
        distiller.loss({"input_ids": torch.ones(2, 4, dtype=torch.long)}, torch.ones(2, 2), None)
    with pytest.raises(ValueError, match="returned a tuple, in which nothing is named"):
        distiller = Distiller(make(seed=3), make(), logits=0.0)
        distiller.loss({"input_ids": torch.ones(2, 4, dtype=torch.long)}, (torch.ones(2, 2),), None)


# -- combined losses -------------------------------------------------------------------------------------------------


def mean_of_step(outputs, labels, num_items_in_batch):
    return cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


class Scaled(PruningTrainer):
    """Counts the labels of a step itself."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        asked = self.distiller.student_kwargs if model.training else {}
        outputs = model(**inputs, **asked)
        items = len(inputs["labels"]) if num_items_in_batch is None else num_items_in_batch
        loss = cross_entropy(outputs.logits, inputs["labels"], reduction="sum") / items
        loss = self.distilled(loss, outputs, inputs)
        return (loss, outputs) if return_outputs else loss


STEPS = {"optim": "sgd", "learning_rate": 0.02, "max_grad_norm": 0.0, "max_steps": 6, "hard_label_weight": 0.5}
ACCUMULATED = {**STEPS, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}
SEARCHED = {"method": "random", "num_candidates": 2, "trial_steps": 2, "trial_batch_size": 4}


@pytest.mark.parametrize(
    "search", [{}, pytest.param({**SEARCHED, "selection_metric": "loss"}, marks=pytest.mark.slow)], ids=["", "search"]
)
@pytest.mark.parametrize("own", ["compute_loss_func", "loss_is_scaled_for_ga"])
def test_a_loss_over_a_whole_step_goes_with_a_teacher(tmp_path, own, search):
    """As the loss of the model does, however rows are accumulated; gradient steps tell a loss from its double."""
    given = {"keywords": {"compute_loss_func": mean_of_step}} if own == "compute_loss_func" else {"kind": Scaled}
    expected = trained(tmp_path / "a", **ACCUMULATED, **search)
    found = trained(tmp_path / "b", **ACCUMULATED, **search, **given)
    torch.testing.assert_close(weights_of(found.model), weights_of(expected.model), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses(found), losses(expected), rtol=1e-4, atol=1e-5)
    if search:
        scores = [[c.scores for s in t.run.search.history for c in s.candidates] for t in (expected, found)]
        torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)


def batch_of(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def test_label_smoothing_goes_with_a_teacher(tmp_path):
    trainer = make_trainer(
        tmp_path,
        keywords={"teacher": make(seed=3)},
        label_smoothing_factor=0.1,
        hard_label_weight=0.5,
        distill_hidden=0.0,
    )
    batch, model = batch_of(make_rows(8)), trainer.model.train()
    found = trainer.compute_loss(model, dict(batch))
    with torch.no_grad():
        logits = model(batch["input_ids"], batch["attention_mask"]).logits
        taught = trainer.teacher(batch["input_ids"], batch["attention_mask"]).logits
        soft = -(taught.softmax(-1) * logits.log_softmax(-1)).mean()
        hard = 0.9 * cross_entropy(logits, batch["labels"]) - 0.1 * logits.log_softmax(-1).mean()
    torch.testing.assert_close(found.detach(), soft + 0.5 * hard)


class ManyLabels(PruningTrainer):
    """Whole numbers as labels, which the model itself would refuse."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = binary_cross_entropy_with_logits(outputs.logits, labels.float())
        loss = self.distilled(loss, outputs, inputs)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
def test_several_labels_a_row_have_a_teacher(tmp_path, problem):
    rows = [{**row, "labels": torch.stack([row["labels"], 1 - row["labels"], row["labels"]])} for row in make_rows()]
    models = [make(seed=seed, num_labels=3, problem_type=problem) for seed in (0, 3)]
    trainer = make_trainer(
        tmp_path,
        models[0],
        rows,
        ManyLabels,
        {"teacher": models[1]},
        distill_hidden=0.0,
        max_steps=4,
        method="random",
        num_candidates=2,
        trial_steps=1,
        selection_metric="teacher",
    )
    batch = batch_of(rows[:8])
    found = trainer.compute_loss(trainer.model.train(), trainer._prepare_inputs(batch))
    with torch.no_grad():
        logits, taught = (m(batch["input_ids"], batch["attention_mask"]).logits for m in models)
        expected = binary_cross_entropy_with_logits(logits, taught.sigmoid())
    torch.testing.assert_close(found.detach(), expected)
    trainer.train()
