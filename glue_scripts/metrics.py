"""The GLUE metrics, computed locally: `evaluate.load("glue")` downloads a script from the Hub and fails offline."""

from __future__ import annotations

from collections.abc import Callable

import evaluate
import numpy as np
from datasets import Features, Value
from transformers import EvalPrediction

from tasks import GlueTask, get_task


class GlueMetric(evaluate.Metric):
    """Scores of one task, with the key names of the `glue` metric of evaluate.

    Args:
        config_name: the task's name, such as "mrpc".

    `compute(predictions=..., references=...)` takes class ids, or floats for stsb, and returns a dict of floats.
    """

    def __init__(self, config_name: str, **kwargs) -> None:
        # Not in _info, so that a wrong name raises a plain ValueError before a cache file exists.
        self._task = get_task(config_name)
        super().__init__(config_name=config_name, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        number = Value("float32" if self._task.is_regression else "int64")
        return evaluate.MetricInfo(
            description="GLUE scores of one task.",
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
                "GLUE metrics need scikit-learn and scipy: run `pip install hf_maskselect[glue]`"
            ) from error
        predictions, references = np.asarray(predictions), np.asarray(references)
        if self._task.is_regression:
            scores = {"pearson": 0.0, "spearmanr": 0.0}
            # The correlation with a constant is NaN, which would break the choice of the best checkpoint. A model that
            # predicts one value for all rows has learnt nothing, so it scores 0.
            if np.ptp(predictions) > 0 and np.ptp(references) > 0:
                scores["pearson"] = float(pearsonr(predictions, references)[0])
                scores["spearmanr"] = float(spearmanr(predictions, references)[0])
            scores["combined_score"] = (scores["pearson"] + scores["spearmanr"]) / 2
            return scores
        functions = {"accuracy": accuracy_score, "f1": f1_score, "matthews_correlation": matthews_corrcoef}
        return {name: float(functions[name](references, predictions)) for name in self._task.metrics}


def make_compute_metrics(task: GlueTask | str) -> Callable[[EvalPrediction], dict[str, float]]:
    """Build the Trainer's `compute_metrics` for a task.

    The function takes logits of shape (rows, classes), or (rows, 1) or (rows,) for regression; if the model returns
    several outputs, the first one is used. Labels have shape (rows,).

    Raises:
        ValueError: (from the function) the numbers of predictions and labels differ, there are none, or logits are not
            finite.
    """
    task = get_task(task) if isinstance(task, str) else task

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        outputs, references = prediction.predictions, np.asarray(prediction.label_ids).reshape(-1)
        logits = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)
        if len(logits) != len(references) or len(logits) == 0:
            raise ValueError(
                f"task {task.name!r} got {len(logits)} predictions for {len(references)} references: give one "
                "prediction for each row, and at least one"
            )
        if not np.isfinite(logits).all():
            raise ValueError(
                f"the model's outputs for task {task.name!r} hold NaN or infinity, so training diverged: try a lower "
                "learning rate"
            )
        predictions = logits.reshape(len(logits)) if task.is_regression else logits.argmax(axis=-1)
        # In memory, because several processes would write to one cache file.
        return GlueMetric(task.name, keep_in_memory=True).compute(predictions=predictions, references=references)

    return compute_metrics
