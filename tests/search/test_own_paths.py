"""Trials, scores, gradient samples and refits go through the trainer's own losses, predictions and evaluation."""

import math

import numpy as np
import pytest
import torch
from tiny import COMMON, NO_DROPOUT, losses, make, make_rows, make_trainer, same, weights_of
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertModel, TrainerCallback

from hf_maskselect import MaskSet, PruningTrainer

FITTED = {"method": "random", "num_candidates": 3, "num_levels": 1, "max_steps": 6}
TRAINED = {**FITTED, "trial_steps": 2, "refit_rows": 0}
NAMES = {"tokens": "input_ids", "mask": "attention_mask", "target": "labels"}


def renamed(rows):
    """A batch with a nest, and keys that no model takes."""
    batch = {name: torch.stack([row[own] for row in rows]) for name, own in NAMES.items()}
    return {
        "text": {"tokens": batch["tokens"], "mask": [batch["mask"]]},
        "target": batch["target"],
        "of": ["x"] * len(rows),
    }


class OwnKeys(PruningTrainer):
    """Takes such a batch; nothing but its `compute_loss` knows how."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        asked = {} if self.distiller is None or not model.training else self.distiller.student_kwargs
        batch = {"input_ids": inputs["text"]["tokens"], "attention_mask": inputs["text"]["mask"][0]}
        assert len(inputs["of"]) == len(inputs["target"])
        outputs = model(**batch, labels=inputs["target"], **asked)
        loss = self.distilled(outputs.loss, outputs, batch)
        return (loss, outputs) if return_outputs else loss


def run(folder, own, teacher=False, **changes):
    keywords = {"compute_metrics": accuracy, **({"teacher": make(seed=3)} if teacher else {})}
    if own:
        keywords |= {"data_collator": renamed}
        changes |= {"remove_unused_columns": False, "label_names": ["target"]}
    trainer = make_trainer(folder, trainer=OwnKeys if own else PruningTrainer, keywords=keywords, **changes)
    trainer.train()
    scores = [candidate.scores for search in trainer.run.search.history for candidate in search.candidates]
    return scores, losses(trainer), weights_of(trainer.model)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


CASES = {
    "fitted": FITTED,
    "taylor": {"method": "taylor", "refit_rows": 32, "max_steps": 6},
    "metric": {**TRAINED, "selection_metric": "accuracy"},
    "early": {**TRAINED, "selection": "early", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
}


@pytest.mark.parametrize("name", ["fitted", *(pytest.param(n, marks=pytest.mark.slow) for n in list(CASES)[1:])])
def test_a_batch_that_only_the_loss_understands_changes_nothing(tmp_path, name):
    expected, found = (run(tmp_path / str(own), own, **CASES[name]) for own in (False, True))
    assert expected[:2] == found[:2] and same(expected[2], found[2])


@pytest.mark.parametrize("metric", ["teacher", pytest.param("loss", marks=pytest.mark.slow)])
def test_nor_with_a_teacher(tmp_path, metric):
    """The teacher gets the batch that `distilled` was given."""
    changes = {**TRAINED, "selection_metric": metric, "hard_label_weight": 0.5}
    expected, found = (run(tmp_path / str(own), own, teacher=True, **changes) for own in (False, True))
    assert expected[:2] == found[:2] and same(expected[2], found[2])


class Pairs(nn.Module):
    """A bi-encoder: it embeds one text at a time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = BertModel(BertConfig(**{**COMMON, **NO_DROPOUT, "initializer_range": 0.2}))

    def forward(self, features):
        return self.encoder(**features).last_hidden_state.mean(1)


class PairTrainer(PruningTrainer):
    """Contrasts pairs of texts; there are no labels."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        first, second = (model(features) for features in inputs["pair"])
        scores = first @ second.T
        loss = cross_entropy(scores, torch.arange(len(scores)))
        return (loss, {"scores": scores}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


def pairs(rows):
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"pair": [{"input_ids": ids}, {"input_ids": ids.flip(1)}]}


@pytest.mark.parametrize(
    "method", [FITTED, pytest.param({"method": "fisher", "refit_rows": 32}, marks=pytest.mark.slow)]
)
def test_a_bi_encoder_trains(tmp_path, method):
    rows = make_rows(24, seed=5)
    keywords = {"data_collator": pairs, "selection_dataset": rows}
    changes = {**method, "remove_unused_columns": False, "max_steps": 6, "per_device_eval_batch_size": 10}
    trainer = make_trainer(tmp_path, Pairs(), trainer=PairTrainer, keywords=keywords, **changes)
    score, model = trainer.run.bench.score(), trainer.model.eval()
    parts = [rows[:10], rows[10:20], rows[20:]]
    with torch.no_grad():
        expected = sum(float(trainer.compute_loss(model, pairs(part))) * len(part) for part in parts) / 24
    assert score == pytest.approx(expected)
    trainer.train()
    assert MaskSet.from_zeros(trainer.model).sparsity() == 0.75
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_a_prediction_step_of_the_users_gives_the_loss(tmp_path):
    class Own(PruningTrainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            return torch.tensor(float(len(inputs["labels"]))), None, None

    keywords = {"selection_dataset": make_rows(20)}
    trainer = make_trainer(tmp_path, trainer=Own, keywords=keywords, **FITTED, per_device_eval_batch_size=16)
    assert trainer.run.bench.score() == (16 * 16 + 4 * 4) / 20


# -- metrics ---------------------------------------------------------------------------------------------------------


def of_lists(prediction):
    assert isinstance(prediction.predictions, list) and len(prediction.predictions) == 2
    right = [(p.argmax(-1) == y).mean() for p, y in zip(prediction.predictions, prediction.label_ids, strict=True)]
    return {"accuracy": sum(right) / 2}


def of_inputs(prediction):
    assert prediction.inputs.shape == (32, 8) and prediction.losses.shape == (32,)
    return {"accuracy": float((prediction.inputs[:, 0] > 20).mean() + prediction.losses.mean())}


class Counter:
    """Counts batch by batch."""

    def __init__(self):
        self.right, self.rows = 0, 0

    def __call__(self, prediction, compute_result=False):
        self.right += int((prediction.predictions.argmax(-1) == prediction.label_ids).sum())
        self.rows += len(prediction.label_ids)
        result = {"accuracy": self.right / self.rows}
        if compute_result:
            assert self.rows == 32
            self.right, self.rows = 0, 0
        return result


def with_states(model):
    model.config.output_hidden_states = True
    return model


def one_array(prediction):
    assert prediction.predictions.ndim == 2  # the hidden states are ignored
    return accuracy(prediction)


METRICS = {
    "lists": (of_lists, {"eval_do_concat_batches": False}, {}),
    "inputs": (of_inputs, {"include_for_metrics": ["inputs", "loss"]}, {}),
    "batches": (Counter(), {"batch_eval_metrics": True}, {}),
    "ignored": (one_array, {}, {"ignore_keys_for_eval": ["hidden_states"]}),
    "float32": (lambda p: {"accuracy": np.float32(accuracy(p)["accuracy"])}, {}, {}),
    "array": (lambda p: {"accuracy": np.array(accuracy(p)["accuracy"])}, {}, {}),
    "tensor": (lambda p: {"eval_accuracy": torch.tensor(accuracy(p)["accuracy"])}, {}, {}),
    "accumulated": (accuracy, {"eval_accumulation_steps": 1}, {}),
}


class Watching(TrainerCallback):
    def __init__(self):
        self.evaluations, self.predictions = 0, 0

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluations += 1

    def on_prediction_step(self, args, state, control, **kwargs):
        self.predictions += 1


@pytest.mark.parametrize("name", METRICS)
def test_a_trial_gives_compute_metrics_what_evaluate_gives(tmp_path, name, monkeypatch):
    metric, changes, train = METRICS[name]
    model, rows, watching = make(), make_rows(32, seed=2), Watching()
    model = with_states(model) if name == "ignored" else model
    keywords = {"compute_metrics": metric, "selection_dataset": rows, "callbacks": [watching]}
    changes = {**TRAINED, **changes, "selection_metric": "accuracy", "max_steps": 2, "num_candidates": 2}
    trainer = make_trainer(tmp_path, model, keywords=keywords, **changes)
    said, found, score = [], [], trainer.run.bench.scorer.score
    monkeypatch.setattr("transformers.trainer_callback.logger.warning", said.append)
    trainer.run.bench.scorer.score = lambda: found.append(score()) or found[-1]
    trainer.train(**train)
    trainer.ignored_keys = train.get("ignore_keys_for_eval")
    assert len(found) == 3 and all(type(value) is float for value in found)
    assert watching.evaluations == watching.predictions == 0
    assert not any("eval_accuracy" in entry for entry in trainer.state.log_history)
    assert not said
    last, evaluated = score(), trainer.evaluate(rows, ignore_keys=trainer.ignored_keys)
    assert last == pytest.approx(-evaluated["eval_accuracy"])


def test_an_evaluation_of_the_users_gives_the_metric(tmp_path):
    class Own(PruningTrainer):
        def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
            rows = self.eval_dataset if eval_dataset is None else eval_dataset
            self.log({"eval_rows": len(rows)})
            return {"eval_rows": np.int64(len(rows))}

    keywords = {"selection_dataset": make_rows(20)}
    trainer = make_trainer(tmp_path, trainer=Own, keywords=keywords, selection_metric="rows", **TRAINED)
    before = list(trainer.state.log_history)
    assert trainer.run.bench.score() == -20 and trainer.state.log_history == before
    assert trainer.evaluate() == {"eval_rows": 32}


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            lambda p: {"glue": {"accuracy": 0.5}, "f1": 0.1},
            "selection_metric='glue' is .*no number: .* one of glue, f1",
        ),
        (lambda p: {"glue": "good", "f1": 0.1}, "selection_metric='glue' is 'good', which is no number"),
        (lambda p: {"f1": 0.1, "mcc": 0.2}, "'glue' is not returned by compute_metrics: .* one of f1, mcc"),
    ],
)
def test_a_metric_that_is_no_number_is_named(tmp_path, metric, message):
    trainer = make_trainer(tmp_path, keywords={"compute_metrics": metric}, selection_metric="glue", **TRAINED)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_rows_without_labels_have_no_metric(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in make_rows(16)]
    keywords = {"compute_metrics": accuracy, "selection_dataset": rows}
    trainer = make_trainer(tmp_path, keywords=keywords, selection_metric="accuracy", **TRAINED)
    with pytest.raises(
        ValueError, match="'accuracy' is not returned by compute_metrics: choose 'loss' or one of nothing"
    ):
        trainer.train()


def test_a_collator_that_is_assigned_is_that_of_the_scores(tmp_path):
    def halved(rows):
        return {
            name: torch.stack([row[name] for row in rows])[:, :4]
            if name != "labels"
            else torch.stack([row[name] for row in rows])
            for name in rows[0]
        }

    scores = []
    for assigned in (False, True):
        keywords = {"selection_dataset": make_rows(16), **({} if assigned else {"data_collator": halved})}
        trainer = make_trainer(tmp_path, keywords=keywords, **FITTED)
        if assigned:
            trainer.data_collator = halved
        trainer.train()
        scores.append([c.scores for c in trainer.run.search.history[0].candidates])
    assert scores[0] == scores[1]
