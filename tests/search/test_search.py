"""The search: paired, honest, never worse than the deterministic mask on its own measure, and without a trace."""

import json
import random

import numpy as np
import pytest
import torch
from tiny import losses, make, make_rows, make_trainer, same, weights_of
from tqdm import tqdm
from transformers import default_data_collator

from hf_maskselect.masking.proposals import Proposal, propose
from hf_maskselect.masking.scores import CRITERIA
from hf_maskselect.search.bench import Trial
from hf_maskselect.search.draws import CandidateMasks
from hf_maskselect.search.race import best_of
from hf_maskselect.search.results import Candidate, LevelSearch
from hf_maskselect.search.schedule import halving_rungs

PROPOSALS = [Proposal("magnitude", "layer"), Proposal("taylor", "global")]
NO_BAR = tqdm(disable=True)
SEARCH = {"method": "random", "num_candidates": 4, "trial_steps": 2}


def candidates(*scores):
    return [Candidate(i, f"p{i}", None, 1.0, str(i), [score]) for i, score in enumerate(scores)]


def test_rungs_halve_the_field_and_double_the_steps():
    assert halving_rungs(8, 40, 1000) == [(8, 40), (4, 80), (2, 160)]
    assert halving_rungs(5, 10, 1000) == [(5, 10), (3, 20), (2, 40)]
    assert halving_rungs(2, 10, 1000) == [(2, 10)]
    assert halving_rungs(8, 40, 60) == [(8, 40), (4, 60)]  # paired trials of the same length say nothing new


def test_the_deterministic_candidate_always_survives():
    kept = best_of(candidates(0.9, 0.1, 0.2, 0.3), 2)
    assert [c.index for c in kept] == [0, 1]
    kept = best_of(candidates(0.1, 0.3, 0.2, 0.9), 2)
    assert [c.index for c in kept] == [0, 2]
    assert [c.index for c in best_of(candidates(0.5, 0.5, 0.5), 2)] == [0, 1]  # ties by index
    diverged = best_of(candidates(0.9, float("nan"), 0.1, 0.05), 3)
    assert [c.index for c in diverged] == [0, 2, 3]


class DrawingCollator:
    """Replaces one token a row by a random one, from its own generator, as masked language modelling does."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, rows):
        batch = default_data_collator(rows)
        batch["input_ids"][:, -1] = torch.randint(3, 64, (len(rows),), generator=self.generator)
        return batch


@pytest.mark.parametrize("optim", ["adamw_torch_fused", pytest.param("sgd", marks=pytest.mark.slow)])
def test_a_search_leaves_the_outer_run_untouched_to_the_bit(tmp_path, optim):
    """A run whose search always picks candidate 0 equals the run without a search: weights, losses, data, dropout,
    and what the collator draws with a generator of its own."""
    dropout = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.1}
    held = {"train_dataset": make_rows(seed=1), "selection_dataset": make_rows(16, seed=2)}
    common = {"method": "random", "optim": optim, "gradient_accumulation_steps": 2}
    runs = []
    for count in (1, 3):
        folder, keywords = tmp_path / str(count), {**held, "data_collator": DrawingCollator()}
        trainer = make_trainer(
            folder, make(**dropout), num_candidates=count, trial_steps=2, keywords=keywords, **common
        )
        trials = []
        trial = trainer.run.bench.trial

        def candidate_0_wins(*args, trial=trial, trials=trials, **kwargs):
            trials.append(trial(*args, **kwargs))
            return float(len(trials))

        trainer.run.bench.trial = candidate_0_wins
        trainer.train()
        runs.append((trainer, trials))
    (plain, none), (searched, trials) = runs
    assert not none and len(trials) == 2 * (3 + 2)
    assert losses(plain) == losses(searched)
    assert same(weights_of(plain.model), weights_of(searched.model))
    moments = [list(t.optimizer.state_dict()["state"].values()) for t in (plain, searched)]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(*moments, strict=True) for k in a if torch.is_tensor(a[k]))


def test_frozen_weights_are_masked_and_restored_too(tmp_path):
    """A prunable weight that is not trained: every candidate starts from it as it was, and gradients score it."""
    model = make()
    for name, weight in model.named_parameters():
        weight.requires_grad_("layer.0" not in name)
    frozen = {n: w.detach().clone() for n, w in model.named_parameters() if not w.requires_grad}
    trainer = make_trainer(tmp_path, model, **SEARCH)
    trainer.train()
    masks = trainer.pruning_state().masks
    assert masks.sparsity() == 0.75
    for name, before in frozen.items():
        weight = dict(model.named_parameters())[name]
        assert not weight.requires_grad
        assert torch.equal(weight, before * masks[name] if name in masks else before)


def test_half_precision_weights_can_be_searched(tmp_path):
    trainer = make_trainer(tmp_path, make().to(torch.bfloat16), **SEARCH)
    trainer.train()
    assert trainer.pruning_state().masks.sparsity() == 0.75


def test_inside_untouched_everything_may_change(tmp_path):
    trainer = make_trainer(tmp_path, keywords={"selection_dataset": make_rows(8)}, **SEARCH)
    trainer.run.method.attach(trainer.model)
    before = weights_of(trainer.model)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    trainer.model.train()
    with trainer.run.bench.sandbox.untouched():
        torch.rand(3), random.random(), np.random.rand()
        trainer.model.eval()
        with torch.no_grad():
            for weight in trainer.model.parameters():
                weight.add_(1)
    assert same(before, weights_of(trainer.model)) and trainer.model.training
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert trainer.run.method.masks.sparsity() == 0


def test_trials_are_paired_and_repeatable(tmp_path):
    """The same mask scores the same however often, and whatever was tried in between."""
    dropout = {"hidden_dropout_prob": 0.3}
    trainer = make_trainer(tmp_path, make(**dropout), keywords={"selection_dataset": make_rows(8)}, **SEARCH)
    trainer.run.method.attach(trainer.model)
    dense = trainer.run.method.masks
    sparse = type(dense)({name: torch.rand_like(mask, dtype=torch.float) > 0.9 for name, mask in dense.items()})
    with trainer.run.bench.sandbox.untouched():
        scores = [
            trainer.run.bench.trial(lambda m=masks: m, Trial(3, 1e-3), 0, NO_BAR) for masks in (dense, sparse, dense)
        ]
    assert scores[0] == scores[2] != scores[1]


def test_the_table_says_why(tmp_path):
    trainer = make_trainer(tmp_path, **SEARCH)
    trainer.train()
    levels = json.loads((tmp_path / "search.json").read_text())
    assert [level["level"] for level in levels] == [0, 1]
    for level in levels:
        last = [c for c in level["candidates"] if len(c["scores"]) == 2]
        chosen = [c for c in level["candidates"] if c["chosen"]]
        assert len(chosen) == 1 and 0 in [c["index"] for c in last]
        assert chosen[0]["scores"][-1] == min(c["scores"][-1] for c in last)
        assert level["candidates"][0]["overlap"] == 1.0
        rows = 4 * 8 / 8  # gradient samples in steps of eight rows
        trained = sum(c["steps"] for c in level["candidates"])
        scored = sum(len(c["scores"]) for c in level["candidates"]) * len(trainer.selection_dataset) / 24
        trials = sum(len(c["scores"]) for c in level["candidates"])
        refitted = (trials + 1) * (1 + 1 / 3) * len(trainer.train_dataset) / 8  # fewer rows than refit_rows
        assert level["step_equivalents"] == pytest.approx(rows + trained + scored + refitted)
        assert 0 < level["refit_error"] < level["cut_error"]
    summary = trainer.search_summary()
    assert summary["search_cost_ratio"] == pytest.approx(summary["search_step_equivalents"] / 12, abs=1e-2)
    assert [e["search_level"] for e in trainer.state.log_history if "search_level" in e] == [1, 2]
    assert not list(tmp_path.glob("_search-*"))  # the losers' masks are gone


def test_identical_masks_are_tried_once(tmp_path, monkeypatch):
    def two_kinds(proposal, index, **given):
        return propose(PROPOSALS[index % 2], 0, **given)

    monkeypatch.setattr("hf_maskselect.search.draws.propose", two_kinds)
    trainer = make_trainer(tmp_path, num_levels=1, **SEARCH)
    trainer.train()
    tried = trainer.run.search.history[0].candidates
    assert [c.index for c in tried] == [0, 1] and all(c.scores for c in tried)


def test_early_selection_averages_the_last_ten_evaluations(tmp_path):
    keywords = {"selection_dataset": make_rows(8)}
    trainer = make_trainer(tmp_path, selection="early", keywords=keywords, **{**SEARCH, "trial_steps": None})
    trainer.run.method.attach(trainer.model)
    scores = iter(range(100))
    trainer.run.bench.score = lambda: next(scores)
    with trainer.run.bench.sandbox.untouched():
        mean = trainer.run.bench.trial(lambda: trainer.run.method.masks, Trial(20, 1e-3, 20), 0, NO_BAR)
        few = trainer.run.bench.trial(lambda: trainer.run.method.masks, Trial(4, 1e-3, 4), 0, NO_BAR)
    assert mean == sum(range(10, 20)) / 10
    assert few == sum(range(20, 24)) / 4  # fewer than ten evaluations are averaged over their own number
    trainer.train()
    assert all(c.steps == 4 for c in trainer.run.search.history[0].candidates)  # a level is shorter than an epoch here


def test_selection_by_metric_prefers_the_higher(tmp_path):
    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    keywords = {"compute_metrics": accuracy, "selection_dataset": make_rows(32)}
    trainer = make_trainer(tmp_path, selection_metric="accuracy", keywords=keywords, **SEARCH)
    score = trainer.run.bench.score()
    assert -1 <= score <= 0 and score == -trainer.evaluate(make_rows(32))["eval_accuracy"]
    named = make_trainer(tmp_path, selection_metric="eval_accuracy", keywords=keywords, **SEARCH)
    assert named.run.bench.score() == score
    keywords["compute_metrics"] = lambda prediction: {"eval_accuracy": accuracy(prediction)["accuracy"]}
    assert make_trainer(tmp_path, selection_metric="accuracy", keywords=keywords, **SEARCH).run.bench.score() == score


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection_metric": "f1"}, "selection_metric='f1' is not returned"),
        ({"selection_metric": "f1", "prediction_loss_only": True}, "choose 'loss' or one of nothing"),
    ],
)
def test_a_metric_that_cannot_be_had_is_refused_before_the_dense_warm_up(tmp_path, changes, message):
    model = make()
    before = weights_of(model)
    keywords = {"compute_metrics": lambda prediction: {"accuracy": 0.5}, "selection_dataset": make_rows(32)}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model, keywords=keywords, pruning_warmup_steps=4, **SEARCH, **changes).train()
    assert same(before, weights_of(model))


def test_selection_by_teacher_is_its_cross_entropy(tmp_path):
    teacher, rows = make(seed=3), make_rows(24)
    keywords = {"selection_dataset": rows, "teacher": teacher}
    trainer = make_trainer(tmp_path, keywords=keywords, **SEARCH)
    assert trainer.selection_metric == "teacher" and make_trainer(tmp_path, **SEARCH).selection_metric == "loss"
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        student, taught = (m.eval()(**batch).logits.double() for m in (trainer.model, teacher))
    expected = -(taught.softmax(-1) * student.log_softmax(-1)).mean()
    assert trainer.run.bench.score() == pytest.approx(float(expected), rel=1e-5)
    trainer.train()
    for name in ("teacher", "eval_teacher"):
        with pytest.raises(ValueError, match="selection_metric='teacher' needs a teacher"):
            make_trainer(tmp_path, selection_metric=name, **SEARCH)


@pytest.mark.parametrize("most", [1 << 24, 0])
def test_the_teacher_sees_the_selection_split_once(tmp_path, monkeypatch, most):
    """Its logits are kept, unless they are large; the score and its cost follow."""
    monkeypatch.setattr("hf_maskselect.search.scorer.MOST_SOFT_LABELS", most)
    keywords = {"selection_dataset": make_rows(24), "teacher": make(seed=3)}
    bench = make_trainer(tmp_path, keywords=keywords, **SEARCH, per_device_eval_batch_size=8).run.bench
    seen = []
    keywords["teacher"].register_forward_hook(lambda module, *_: seen.append(module))
    first, second = bench.score(), bench.score()
    assert first == second and len(seen) == (3 if most else 6)
    a_pass = 24 / (3 * bench.batches.rows_of_training())
    assert bench.scorer.steps_of_score() == pytest.approx(a_pass if most else 2 * a_pass)
    assert bench.scorer.steps_of_teaching() == pytest.approx(a_pass if most else 0)


def test_soft_labels_that_are_large_once_are_never_kept(tmp_path, monkeypatch):
    """Token logits of uneven batches: the first too large to keep, the second not."""
    lengths = [12] * 8 + [4] * 8
    rows = [
        {key: value[:length] if value.dim() else value for key, value in row.items()}
        for length, row in zip(lengths, make_rows(16), strict=True)
    ]
    keywords = {"selection_dataset": rows, "teacher": make(seed=3)}
    trainer = make_trainer(tmp_path, keywords=keywords, **SEARCH, per_device_eval_batch_size=8)
    monkeypatch.setattr("hf_maskselect.search.scorer.MOST_SOFT_LABELS", 16 * 8 * 2 - 1)
    seen = []

    def disagreement(inputs, outputs, taught):
        seen.append(inputs["input_ids"].shape == taught.shape[:2])
        return torch.ones(())

    soft_labels = lambda inputs: torch.zeros(*inputs["input_ids"].shape, 2)  # noqa: E731
    monkeypatch.setattr(trainer.distiller, "soft_labels", soft_labels)
    monkeypatch.setattr(trainer.distiller, "disagreement", disagreement)
    trainer.run.bench.score(), trainer.run.bench.score()
    assert seen == [True] * 4
    assert not trainer.run.bench.scorer._soft_labels and trainer.run.bench.scorer.steps_of_teaching() == 0


def test_every_score_sees_the_same_rows(tmp_path):
    """A collator that draws, with the global generator or its own, draws the same for every score."""
    for collator in (DrawingCollator(), global_drawing_collator):
        keywords = {"selection_dataset": make_rows(16), "data_collator": collator}
        trainer = make_trainer(tmp_path, keywords=keywords, **SEARCH)
        first = trainer.run.bench.score()
        torch.rand(5), collator(make_rows(4))
        assert trainer.run.bench.score() == first


@pytest.mark.parametrize("metric", ["loss", "teacher"])
def test_rows_are_scored_the_shortest_first(tmp_path, metric):
    """Batches have little padding, and the score is the mean over the same rows."""
    lengths = [12, 3, 9, 6, 4, 11, 3, 10, 5, 8]
    rows = [
        {key: value[:length] if value.dim() else value for key, value in row.items()}
        for length, row in zip(lengths, make_rows(10, length=12), strict=True)
    ]
    scores, seen = [], []
    for held_out in (rows, sorted(rows, key=lambda row: len(row["input_ids"]))):
        keywords = {"selection_dataset": held_out, "data_collator": padded, "teacher": make(seed=3)}
        trainer = make_trainer(
            tmp_path, keywords=keywords, **SEARCH, selection_metric=metric, per_device_eval_batch_size=4
        )
        trainer.model.register_forward_pre_hook(
            lambda module, args, inputs: seen.append(inputs["input_ids"].shape[1]), with_kwargs=True
        )
        scores.append(trainer.run.bench.score())
    assert seen == [5, 10, 12] * 2 and scores[0] == scores[1]
    with torch.no_grad():
        alone = [float(trainer.model(**padded([row])).loss) for row in rows]
    if metric == "loss":
        assert scores[0] == pytest.approx(sum(alone) / len(alone), rel=1e-4)


def padded(rows):
    """Rows of several lengths as one batch."""
    batch = {
        key: torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True)
        for key in ("input_ids", "attention_mask")
    }
    return {**batch, "labels": torch.stack([row["labels"] for row in rows])}


def global_drawing_collator(rows):
    """As `DrawingCollator`, from torch's generator."""
    batch = default_data_collator(rows)
    batch["input_ids"][:, -1] = torch.randint(3, 64, (len(rows),))
    return batch


def test_selection_rows_are_never_trained_on(tmp_path):
    trainer = make_trainer(tmp_path, **SEARCH)
    seen = {tuple(row["input_ids"].tolist()) for row in trainer.train_dataset}
    held = {tuple(row["input_ids"].tolist()) for row in trainer.selection_dataset}
    assert len(held) == 10 and len(seen) == 86 and not seen & held


def test_nothing_is_held_out_where_nothing_is_chosen(tmp_path):
    trainer = make_trainer(tmp_path, method="magnitude")
    assert trainer.selection_dataset is None and len(trainer.train_dataset) == 96


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, [8]), ({"gradient_accumulation_steps": 2}, [8, 8]), ({"trial_batch_size": 24}, [8, 8, 8]),
     ({"trial_batch_size": 4, "gradient_accumulation_steps": 2}, [4])],
)  # fmt: skip
def test_a_trial_step_has_the_rows_it_was_given(tmp_path, changes, expected):
    trainer = make_trainer(tmp_path, keywords={"selection_dataset": make_rows(8)}, **SEARCH, **changes)
    for step in trainer.run.bench.batches.of_training(3):
        assert [len(batch["labels"]) for batch in step] == expected
    assert trainer.run.bench.batches.rows_per_step() == sum(expected)


def test_a_mask_that_is_drawn_again_must_be_the_same(tmp_path):
    trainer = make_trainer(tmp_path, proposals=["magnitude:layer:votes"], criterion="magnitude", **SEARCH)
    trainer.run.method.attach(trainer.model)
    drawn, record = Candidate(1, "votes", 1e-4, 1.0, "of another rank"), LevelSearch(0, 0.5, 0, [])
    masks = CandidateMasks(trainer.run.bench, CRITERIA, trainer.run.search._team, tmp_path, record)
    masks._holders[1].add(3)
    with pytest.raises(RuntimeError, match="candidate 1 of level 1 is another mask on rank 0 than on rank 3"):
        masks.take(drawn)
    assert not list(tmp_path.glob("candidate-*"))
