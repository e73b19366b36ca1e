"""The best mask and the best weights are kept, whichever direction a metric has."""

import math
import re

import numpy as np
import pytest
from tiny import make_config, make_rows, make_trainer

from hf_maskselect.fields.rules import greater_is_better
from hf_maskselect.search.race import race
from hf_maskselect.search.results import Candidate, LevelSearch

LOWER = """loss eval_loss error eval_mse mae rmse perplexity wer eval_cer mean_squared_error MeanSquaredError logloss
CharErrorRate word_error_rate RMSE mse_2 rmse1 accuracy_loss zero_one_loss brier_score false_positive_rate eval_nll
negative_log_likelihood cross_entropy hamming_loss error_rate val_loss""".split()
GREATER = """accuracy eval_f1 neg_mean_squared_error neg_log_loss pearson matthews_correlation bleu rougeL r2 score
combined_score error_detection_accuracy exact_match wer_accuracy precision_at_1 something_else""".split()


def rmse(prediction):
    """How far the chance of label 1 is from the label."""
    logits = prediction.predictions
    chance = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    error = float(np.sqrt(np.mean((chance - prediction.label_ids) ** 2)))
    return {"rmse": error, "quality": error, "neg_rmse": -error}


RUN = {"method": "random", "num_candidates": 4, "proposals": ["magnitude:layer:votes", "taylor:global"]}
KEYWORDS = {"compute_metrics": rmse, "selection_dataset": make_rows(32, seed=2)}
SELECTIONS = [
    {"trial_steps": 0},
    {"trial_steps": 2},
    {"selection": "survivors", "trial_steps": 2},
    {"selection": "early", "trial_steps": 2},
]
# Ways to say that "lower is better", which are all obeyed.
DIRECTIONS = [
    {"selection_metric": "eval_rmse"},
    {"selection_metric": "quality", "selection_greater_is_better": False},
    {"selection_metric": "quality", "metric_for_best_model": "eval_quality", "greater_is_better": False},
]


@pytest.mark.parametrize("name", LOWER)
def test_a_loss_or_an_error_is_known_by_its_name(name):
    assert not greater_is_better(name)


@pytest.mark.parametrize("name", GREATER)
def test_every_other_metric_is_greater_is_better(name):
    assert greater_is_better(name)


def test_what_the_user_says_counts_before_the_name(tmp_path):
    def direction(**fields):
        return make_config(tmp_path, **fields).resolved().selection_greater_is_better

    assert direction(selection_metric="accuracy") and not direction(selection_metric="rmse") and not direction()
    assert direction(selection_metric="rmse", selection_greater_is_better=True)
    best = {"metric_for_best_model": "eval_rmse", "greater_is_better": True}
    assert direction(selection_metric="rmse", **best) and not direction(selection_metric="mae", **best)
    assert not direction(selection_metric="rmse", selection_greater_is_better=False, **best)
    assert not direction(selection_metric="rmse", metric_for_best_model="rmse")
    for loss in (None, "loss", "teacher"):
        assert not direction(selection_metric=loss, metric_for_best_model="loss", greater_is_better=True)
        with pytest.raises(ValueError, match="selection_greater_is_better=True has no meaning with selection_metric"):
            direction(selection_metric=loss, selection_greater_is_better=True)


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        (SELECTIONS[0], DIRECTIONS[1]),
        (SELECTIONS[2], DIRECTIONS[2]),
        *[pytest.param(selection, DIRECTIONS[0], marks=pytest.mark.slow) for selection in SELECTIONS],
    ],
    ids=str,
)
def test_the_mask_with_the_lowest_error_wins_and_a_level_ends_with_its_best_weights(tmp_path, selection, said):
    trainer = make_trainer(tmp_path, keywords=KEYWORDS, **RUN, **selection, **said, level_eval_steps=1)
    trainer.train()
    for level in trainer.run.search.history:
        last = {c.index: c.scores[-1] for c in level.candidates if len(c.scores) == len(level.candidates[0].scores)}
        (chosen,) = [c.index for c in level.candidates if c.chosen]
        assert last[chosen] == min(last.values()) < max(last.values())
        assert min(last.values()) > 0  # the errors themselves, without a minus
    logged = [entry for entry in trainer.state.log_history if "selection_score" in entry]
    span = trainer.run.plan.span(1)
    of_last_level = [entry["selection_score"] for entry in logged if span[0] < entry["step"] <= span[1]]
    adopted = trainer.run.search.adopted  # what the winner had trained counts too
    assert trainer.run.bench.score() == min([*of_last_level, *([] if adopted is None else [adopted])])
    assert logged[-1]["selection_best"] == (of_last_level[-1] == min(of_last_level))


def test_the_best_checkpoint_has_the_lowest_error(tmp_path):
    """`TrainingArguments` alone takes "rmse" for greater is better."""
    saved = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2, "num_levels": 1}
    trainer = make_trainer(
        tmp_path, keywords=KEYWORDS, **saved, load_best_model_at_end=True, metric_for_best_model="rmse"
    )
    assert trainer.args.greater_is_better is False
    trainer.train()
    errors = [entry["eval_rmse"] for entry in trainer.state.log_history if "eval_rmse" in entry]
    assert trainer.state.best_metric == min(errors) < max(errors)
    assert trainer.evaluate()["eval_rmse"] == min(errors)


def test_nan_is_never_the_best():
    scores = [math.nan, 0.5, math.nan, 0.4, math.inf]
    candidates = [Candidate(i, f"p{i}", None, 1.0, str(i), [score]) for i, score in enumerate(scores)]
    table = LevelSearch(0, 0.5, 0, candidates).table()
    assert re.findall(r"p\d", table) == ["p3", "p1", "p4", "p0", "p2"]
    assert race([candidates[0], candidates[4]], [(2, 0)], lambda tried, steps: {0: math.nan, 4: math.inf}).index == 4
