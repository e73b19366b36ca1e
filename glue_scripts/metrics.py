"""GLUE's metrics, computed here: `evaluate.load("glue")` would fetch a script from the Hub and fail offline."""

from __future__ import annotations

from collections.abc import Callable

import evaluate
import numpy as np
from datasets import Features, Value
from transformers import EvalPrediction

from tasks import GlueTask, get_task


class GlueMetric(evaluate.Metric):
    """The scores of one task, under the key names of evaluate's own `glue` metric.

    Args:
        config_name: the task's name, such as "mrpc".

    `compute(predictions=..., references=...)` takes class ids, or floats for stsb, and returns a dict of floats.
    """

    def __init__(self, config_name: str, **kwargs) -> None:
        # Here and not in _info, so that a wrong name is a plain ValueError before any cache file is made.
        self._task = get_task(config_name)
        super().__init__(config_name=config_name, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        number = Value("float32" if self._task.is_regression else "int64")
        return evaluate.MetricInfo(
            description="GLUE's scores for one task.",
            citation="",
            inputs_description="predictions and references: class ids, or floats for stsb.",
            features=Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        try:
            from scipy.stats import pearsonr, spearmanr
            from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
        except ImportError as error:
            raise ImportError(
                "GLUE metrics need scikit-learn and scipy; install them with `pip install hf_maskselect[glue]`."
            ) from error
        predictions, references = np.asarray(predictions), np.asarray(references)
        if self._task.is_regression:
            scores = {"pearson": 0.0, "spearmanr": 0.0}
            # Correlation with a constant is undefined (NaN). A model that predicts one value for everything has learnt
            # nothing, so it scores 0: a NaN would break the choice of the best checkpoint instead.
            if np.ptp(predictions) > 0 and np.ptp(references) > 0:
                scores["pearson"] = float(pearsonr(predictions, references)[0])
                scores["spearmanr"] = float(spearmanr(predictions, references)[0])
            scores["combined_score"] = (scores["pearson"] + scores["spearmanr"]) / 2
            return scores
        functions = {"accuracy": accuracy_score, "f1": f1_score, "matthews_correlation": matthews_corrcoef}
        return {name: float(functions[name](references, predictions)) for name in self._task.metrics}


def make_compute_metrics(task: GlueTask | str) -> Callable[[EvalPrediction], dict[str, float]]:
    """Build the Trainer's `compute_metrics` for a task.

    It takes logits of shape (examples, classes), or (examples, 1) or (examples,) for regression; where the model
    returns more than logits, the first output counts. Labels have shape (examples,).
    """
    task = get_task(task) if isinstance(task, str) else task

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        outputs, references = prediction.predictions, np.asarray(prediction.label_ids).reshape(-1)
        logits = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)
        if len(logits) != len(references) or len(logits) == 0:
            raise ValueError(
                f"Task {task.name!r} got {len(logits)} predictions for {len(references)} references; give one "
                "prediction per example, and at least one."
            )
        if not np.isfinite(logits).all():
            raise ValueError(
                f"The model's outputs for task {task.name!r} hold NaN or infinity; training diverged, so try a lower "
                "learning rate."
            )
        predictions = logits.reshape(len(logits)) if task.is_regression else logits.argmax(axis=-1)
        # In memory: no cache file for several processes to argue about.
        return GlueMetric(task.name, keep_in_memory=True).compute(predictions=predictions, references=references)

    return compute_metrics
