"""Metrics against values computed by hand or with NumPy."""

import sys

import numpy as np
import pytest
from transformers import EvalPrediction

from metrics import GlueMetric, make_compute_metrics
from tasks import TASKS

# Against the references: 2 true positives, 1 true negative, 1 false positive, 2 false negatives.
PREDICTIONS, REFERENCES = [1, 1, 0, 1, 0, 0], [1, 1, 0, 0, 1, 1]


def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1; ties get their mean rank."""
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def test_accuracy_and_f1():
    scores = GlueMetric("mrpc").compute(predictions=PREDICTIONS, references=REFERENCES)
    assert scores == {"accuracy": pytest.approx(3 / 6), "f1": pytest.approx(2 * 2 / (2 * 2 + 1 + 2))}


def test_matthews():
    scores = GlueMetric("cola").compute(predictions=PREDICTIONS, references=REFERENCES)
    expected = (2 * 1 - 1 * 2) / np.sqrt((2 + 1) * (2 + 2) * (1 + 1) * (1 + 2))
    assert scores == {"matthews_correlation": pytest.approx(expected)}


def test_correlations():
    rng = np.random.default_rng(0)
    references = rng.integers(0, 6, 50).astype(float)  # with ties
    predictions = np.round(references + rng.normal(size=50), 1)
    scores = GlueMetric("stsb").compute(predictions=predictions, references=references)
    pearson = np.corrcoef(predictions, references)[0, 1]
    spearman = np.corrcoef(ranks(predictions), ranks(references))[0, 1]
    assert scores["pearson"] == pytest.approx(pearson, abs=1e-5)
    assert scores["spearmanr"] == pytest.approx(spearman, abs=1e-5)
    assert scores["combined_score"] == pytest.approx((pearson + spearman) / 2, abs=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_reports_what_the_table_says_and_a_perfect_model_scores_one(name):
    references = [0, 1, 1, 0, 1]
    scores = GlueMetric(name).compute(predictions=references, references=references)
    assert scores == {metric: pytest.approx(1.0) for metric in TASKS[name].metrics}


def test_adds_up_over_batches():
    metric = GlueMetric("rte")
    metric.add_batch(predictions=PREDICTIONS[:4], references=REFERENCES[:4])
    metric.add_batch(predictions=PREDICTIONS[4:], references=REFERENCES[4:])
    assert metric.compute() == {"accuracy": pytest.approx(0.5)}


def test_constant_predictions_score_zero():
    scores = make_compute_metrics("stsb")(EvalPrediction(np.full((4, 1), 2.5), np.array([0.0, 1.0, 3.0, 5.0])))
    assert scores == {"pearson": 0.0, "spearmanr": 0.0, "combined_score": 0.0}


def test_takes_the_class_with_the_largest_logit():
    logits = np.array([[2.0, 1.0, 0.0], [-3.0, -1.0, -2.0], [0.0, 0.0, 5.0], [1.0, 9.0, 0.0]])
    compute = make_compute_metrics(TASKS["mnli"])
    assert compute(EvalPrediction(logits, np.array([0, 1, 2, 0]))) == {"accuracy": 0.75}
    assert compute(EvalPrediction((logits, "hidden states"), np.array([0, 1, 2, 0]))) == {"accuracy": 0.75}


@pytest.mark.parametrize("shape", [(3, 1), (3,)])
def test_regression_takes_both_shapes(shape):
    scores = make_compute_metrics("stsb")(EvalPrediction(np.array([1.0, 2.0, 3.0]).reshape(shape), np.arange(3.0)))
    assert scores["pearson"] == pytest.approx(1.0)


def test_one_example_is_enough():
    assert make_compute_metrics("rte")(EvalPrediction(np.array([[0.0, 1.0]]), np.array([1]))) == {"accuracy": 1.0}
    assert make_compute_metrics("stsb")(EvalPrediction(np.array([[0.5]]), np.array([1.0])))["pearson"] == 0.0


def test_diverged_model_is_named():
    with pytest.raises(ValueError, match="NaN or infinity, so training diverged"):
        make_compute_metrics("rte")(EvalPrediction(np.array([[0.0, np.nan]]), np.array([1])))


def test_no_examples():
    with pytest.raises(ValueError, match="at least one"):
        make_compute_metrics("rte")(EvalPrediction(np.zeros((0, 2)), np.zeros(0, dtype=int)))


def test_unequal_lengths():
    with pytest.raises(ValueError, match="one prediction for each row"):
        make_compute_metrics("rte")(EvalPrediction(np.zeros((3, 2)), np.zeros(2, dtype=int)))


def test_unknown_task():
    with pytest.raises(ValueError, match="unknown task 'boolq'"):
        GlueMetric("boolq")


def test_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r"pip install hf_maskselect\[glue\]"):
        GlueMetric("rte").compute(predictions=[1], references=[1])
