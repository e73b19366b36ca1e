"""What the trainer promises: exact zeros at every step, one trajectory however the batch is cut, plain checkpoints."""

import copy
import threading
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from tiny import FAMILIES, losses, make, make_config, make_rows, make_trainer, same, weights_of
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    default_data_collator,
)

from hf_maskselect import MaskSet, PruningState, PruningTrainer, prunable_weights, sparsity_report, verify
from hf_maskselect.search.weight_files import LevelBest
from hf_maskselect.training.held_out import hold_out


class Watch(TrainerCallback):
    """Runs a function after every optimizer step."""

    def __init__(self, look):
        self._look = look

    def on_step_end(self, args, state, control, **kwargs):
        self._look(state.global_step)


def masks_of(trainer):
    return trainer.pruning_state().masks


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["magnitude", pytest.param("random", marks=pytest.mark.slow)])
def test_every_family_ends_exactly_sparse_and_loads_plainly(tmp_path, family, method):
    model = make(family)
    trainer = make_trainer(tmp_path, model, method=method, sparsity=0.9375, max_steps=8, trial_steps=1)
    trainer.train()
    trainer.save_model()
    masks = masks_of(trainer)
    assert masks.total - masks.kept == round(masks.total * 0.9375)
    assert verify(tmp_path).masks.digest() == masks.digest()
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    batch = {name: torch.stack([row[name] for row in make_rows(4)]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "rmsprop"])
def test_dead_weights_are_zero_after_every_step(tmp_path, optim):
    changes = {"optim": optim, "weight_decay": 0.1, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1}
    trainer = make_trainer(tmp_path, **changes)
    seen = []

    def look(step):
        masks = masks_of(trainer)
        weights = dict(trainer.model.named_parameters())
        assert all(torch.count_nonzero(weights[name][~mask]) == 0 for name, mask in masks.items())
        seen.append(masks.sparsity())

    trainer.add_callback(Watch(look))
    trainer.train()
    assert seen == sorted(seen) and len(set(seen)) == 2 and seen[-1] == 0.75


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_dead_gradients_do_not_count_in_the_norm(tmp_path, clip):
    trainer = make_trainer(tmp_path, num_levels=1, max_steps=3, max_grad_norm=clip)
    norms = []

    class Norm(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            parameters, masks = dict(trainer.model.named_parameters()), masks_of(trainer)
            for name, mask in masks.items():
                assert torch.count_nonzero(parameters[name].grad[~mask]) == 0
            norms.append(torch.stack([p.grad.norm() for p in parameters.values() if p.grad is not None]).norm().item())

    trainer.add_callback(Norm())
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    expected = [clip] * 3 if clip else logged
    assert norms == pytest.approx(expected, rel=1e-3)


def test_moments_of_newly_dead_weights_are_cleared(tmp_path):
    trainer = make_trainer(tmp_path, pruning_warmup_steps=4)
    checked = []

    class Moments(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            weights, masks = trainer.run.method.weights, masks_of(trainer)
            for name, mask in masks.items():
                moments = trainer.optimizer.state.get(weights[name], {})
                for key in ("exp_avg", "exp_avg_sq"):
                    if key in moments:
                        assert torch.count_nonzero(moments[key][~mask]) == 0
                        assert torch.count_nonzero(moments[key][mask]) > 0
                        checked.append(masks.sparsity())

    trainer.add_callback(Moments())
    trainer.train()
    assert 0.75 in checked and 0.0 in checked


@pytest.mark.parametrize("with_teacher", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("refit_rows", "close"), [(0, 1e-5), (64, 5e-4)])  # least squares magnify what rounding left
def test_the_trajectory_does_not_depend_on_accumulation(tmp_path, with_teacher, refit_rows, close):
    runs = []
    for size, accumulation in ((16, 1), (8, 2), (4, 4)):
        model = make()
        trainer = make_trainer(
            tmp_path / f"{size}",
            model,
            method="taylor",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            refit_rows=refit_rows,
            keywords={"teacher": make(seed=3) if with_teacher else None},
        )
        trainer.train()
        runs.append((losses(trainer), masks_of(trainer).digest(), trainer.evaluate()["eval_loss"]))
    for run_losses, digest, loss in runs[1:]:
        assert run_losses == pytest.approx(runs[0][0], abs=close)
        assert digest == runs[0][1]
        assert loss == pytest.approx(runs[0][2], abs=close)


def test_dense_warmup_is_the_plain_trainer(tmp_path):
    """Before the first cut nothing differs from `Trainer`, to the bit."""
    first, second = make(), make()
    pruned = make_trainer(tmp_path / "a", first, pruning_warmup_steps=11, num_levels=1, lr_rewind=False)
    plain = make_trainer(tmp_path / "b", second, lr_rewind=False)
    plain = Trainer(second, plain.args, train_dataset=make_rows())
    pruned.train()
    plain.train()
    assert losses(pruned)[:11] == losses(plain)[:11]


def test_evaluation_before_training_changes_nothing(tmp_path):
    first, second = make_trainer(tmp_path / "a"), make_trainer(tmp_path / "b")
    metrics = first.evaluate()
    assert metrics["eval_sparsity"] == 0
    assert not first.model._is_accelerate_prepared and not first.accelerator._models
    first.train()
    second.train()
    assert same(weights_of(first.model), weights_of(second.model))


def test_evaluation_before_training_undoes_its_autocast(tmp_path):
    trainer = make_trainer(tmp_path, bf16=True)
    batch = {name: torch.stack([row[name] for row in make_rows(4)]) for name in ("input_ids", "attention_mask")}
    before = trainer.model.eval()(**batch).logits
    trainer.evaluate()
    assert torch.equal(trainer.model.eval()(**batch).logits, before)


def test_the_learning_rate_starts_again_at_every_level(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=20, levels=[0.5, 0.7, 0.75], warmup_steps=0, last_level_weight=2)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    peaks = [step for step, rate in enumerate(rates) if rate == pytest.approx(1e-3)]
    assert peaks == list(trainer.run.plan.starts) == [0, 5, 10]
    assert all(a > b for step, (a, b) in enumerate(zip(rates, rates[1:], strict=False)) if step + 1 not in peaks)


def test_the_best_model_is_a_sparse_one(tmp_path):
    """The dense model scores best, and must not win."""
    ranks = iter(range(100, 0, -1))
    trainer = make_trainer(
        tmp_path,
        pruning_warmup_steps=4,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="rank",
        greater_is_better=True,
        keywords={"compute_metrics": lambda prediction: {"rank": next(ranks)}},
    )
    trainer.train()
    assert trainer.state.best_global_step == trainer.run.plan.starts[-1] + 1
    assert masks_of(trainer).sparsity() == MaskSet.from_zeros(trainer.model).sparsity() == 0.75


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"bf16": True}, id="bf16"),
        pytest.param({"activation_checkpointing": True}, id="activation checkpointing"),
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "aot_eager"}, id="compile", marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.parametrize(
    "method",
    [
        {"method": "random", "num_candidates": 2, "trial_steps": 2},
        {"method": "pdp", "num_levels": None, "pdp_tau": 1e-3},
        {"method": "gumbel", "num_levels": None, "gumbel_learning_rate": 0.5},
    ],
    ids=["random", "pdp", "gumbel"],
)
def test_training_modes(tmp_path, method, changes):
    trainer = make_trainer(tmp_path, keywords={"teacher": make(seed=3)}, **method, **changes)
    trainer.train()
    trainer.save_model()
    assert verify(tmp_path).masks.sparsity() == 0.75
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_regression(tmp_path):
    model = make(num_labels=1, problem_type="regression")
    teacher = make(num_labels=1, problem_type="regression", seed=3)
    trainer = make_trainer(tmp_path, model, make_rows(regression=True), method="fisher", keywords={"teacher": teacher})
    trainer.train()
    assert MaskSet.from_zeros(model).sparsity() == 0.75


SAVED = {"method": "random", "trial_steps": 2, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with a checkpoint of every step."""
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), **SAVED)
    trainer.train()
    return trainer


@pytest.mark.parametrize("stop", [3, 5, 6, 9])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, whole, stop):
    resumed = make_trainer(tmp_path, make(seed=5), **SAVED)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{stop}")
    assert same(weights_of(whole.model), weights_of(resumed.model))
    assert masks_of(whole).digest() == masks_of(resumed).digest()


def test_resuming_another_run_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=6)
    trainer.train()
    checkpoint = str(tmp_path / "checkpoint-6")
    for changes in ({"sparsity": 0.9}, {"method": "taylor"}, {"pattern": "1:4", "num_levels": None}):
        with pytest.raises(ValueError, match="checkpoint was written with"):
            make_trainer(tmp_path / "other", **changes).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="architecture='BertForSequenceClassification' but this run has .*Token"):
        make_trainer(tmp_path / "other", make(head="ForTokenClassification")).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="masks do not fit the model"):
        make_trainer(tmp_path / "other", make(intermediate_size=48)).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="masks do not fit the model"):
        make_trainer(tmp_path / "other", exclude_modules=["query"]).train(resume_from_checkpoint=checkpoint)
    (tmp_path / "checkpoint-6" / "pruning_state.safetensors").unlink()
    with pytest.raises(ValueError, match="no checkpoint of a pruning run"):
        make_trainer(tmp_path / "other").train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_a_pruned_weight_is_plus_zero(tmp_path, optim):
    """One bit pattern, so that any compressor sees the zeros."""
    trainer = make_trainer(tmp_path, optim=optim, weight_decay=0.1)
    trainer.train()
    for name, mask in masks_of(trainer).items():
        assert not trainer.model.get_parameter(name).detach()[~mask].view(torch.int32).any()


def test_a_run_resumed_after_its_last_step_trains_no_more(tmp_path):
    whole = make_trainer(tmp_path, save_strategy="steps", save_steps=6)
    whole.train()
    resumed = make_trainer(tmp_path, make(seed=5), save_strategy="steps", save_steps=6)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12 and losses(resumed) == losses(whole)
    assert same(weights_of(whole.model), weights_of(resumed.model))


def test_a_checkpoint_that_fails_its_check_gets_no_name(tmp_path):
    """The check runs beside the writing of the optimizer, and what it finds is not lost there."""
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=6)

    def revive(step):
        if step == 12:
            name, mask = next(iter(masks_of(trainer).items()))
            trainer.model.get_parameter(name).data[~mask] = 1

    trainer.add_callback(Watch(revive))
    with pytest.raises(ValueError, match="non-zero weights where its mask is zero"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    resumed = make_trainer(tmp_path, save_strategy="steps", save_steps=6)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12 and verify(tmp_path / "checkpoint-12").step == 12


def test_a_checkpoint_of_two_steps_is_refused(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=6).train()
    path = tmp_path / "checkpoint-6" / "trainer_state.json"
    path.write_text(path.read_text().replace('"global_step": 6', '"global_step": 7'))
    with pytest.raises(ValueError, match="is of step 6 but trainer_state.json of step 7"):
        make_trainer(tmp_path / "other").train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_the_best_checkpoint_is_found_in_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer("./out", save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3)
    trainer.args.load_best_model_at_end, trainer.args.metric_for_best_model = True, "eval_loss"
    trainer.args.greater_is_better = False
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).is_dir()
    assert masks_of(trainer).sparsity() == 0.75


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self._step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self._step


def test_a_run_stopped_short_of_its_target_says_so(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, keywords={"callbacks": [StopAfter(2)]})
    with pytest.warns(UserWarning, match=r"after 2 of 12 steps at sparsity 0.6562, .* the target 0.75: resume from"):
        trainer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = make_trainer(tmp_path)
        resumed.train(resume_from_checkpoint=True)
        assert masks_of(resumed).sparsity() == 0.75
        make_trainer(tmp_path / "b", trainer.model).train()
        make_trainer(tmp_path / "c", keywords={"callbacks": [StopAfter(9)]}).train()  # inside the last level
        emergent = {"method": "gumbel", "gumbel_untrained": True, "sparsity": None, "num_levels": None}
        make_trainer(tmp_path / "d", **emergent, keywords={"callbacks": [StopAfter(11)]}).train()


class Diverging(PruningTrainer):
    """Loses its loss at the ninth step."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        factor = float("nan") if self.state.global_step >= 8 and model.training else 1.0
        return (found[0] * factor, found[1]) if return_outputs else found * factor


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({}, r"[\w.]+\.weight"),
        ({"method": "gumbel", "num_levels": None, "frozen_steps": 0.2}, r"the logit matrix of [\w.]+\.weight"),
        ({"method": "gumbel", "num_levels": None, "scope": "layer", "frozen_steps": 0}, r"the logit matrix of"),
        (
            {"method": "gumbel", "num_levels": None, "frozen_steps": 0.2, "sparsity": None, "pattern": "2:4"},
            r"the logit matrix of",
        ),
        ({"method": "gumbel", "num_levels": None, "frozen_steps": 4}, r"[\w.]+\.weight"),
    ],
    ids=["magnitude", "gumbel", "last step", "groups", "frozen"],
)
def test_a_run_that_diverged_is_told(tmp_path, changes, what):
    trainer = make_trainer(tmp_path, trainer=Diverging, **changes)
    with pytest.raises(ValueError, match=f"{what}.* holds NaN or infinity.*, training has diverged: use a lower"):
        trainer.train()
        trainer.save_model()
    assert not (tmp_path / "model.safetensors").exists()


def test_a_folder_keeps_files_of_its_own_when_a_model_is_saved(tmp_path):
    trainer = make_trainer(tmp_path, pack_on_save=True)
    trainer.train()
    for name in ("model_dense.safetensors", "model.fp16.safetensors", "model-00001-of-00002.safetensors"):
        (tmp_path / name).write_text("x")
    trainer.save_model()
    assert (tmp_path / "packed_model.safetensors").exists()
    trainer.args.pack_on_save = False
    trainer.save_model()
    left = {path.name for path in tmp_path.glob("*.safetensors")}
    own = {"model_dense.safetensors", "model.fp16.safetensors"}
    written = {"model.safetensors", "pruning_state.safetensors", "packed_model.safetensors"}
    assert left == own | written  # the packed file is of the same weights
    with torch.no_grad():
        trainer.model.classifier.bias.add_(1)
    trainer.save_model()
    assert {path.name for path in tmp_path.glob("*.safetensors")} == left - {"packed_model.safetensors"}


def test_packing_needs_a_class_of_transformers(tmp_path):
    class Own(type(make())):
        pass

    with pytest.raises(ValueError, match="pack_on_save=True needs a model class of transformers, and Own is none"):
        make_trainer(tmp_path, Own(make().config), pack_on_save=True)
    trainer = make_trainer(tmp_path, Own(make().config))
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert "Its class is not one of transformers" in (tmp_path / "README.md").read_text()


def test_resuming_from_nothing_is_refused(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()  # another hand began one
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_scoring_a_level_loses_no_logged_loss(tmp_path):
    trainer = make_trainer(tmp_path, level_eval_steps=1)
    trainer.train()
    assert len(losses(trainer)) == 12


class Normed(nn.Module):
    """A small model whose running statistics change with every batch; track: whether it keeps any."""

    def __init__(self, track=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(64, 16), nn.Linear(16, 2)
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.norm = nn.BatchNorm1d(16, track_running_stats=track)

    def forward(self, input_ids, attention_mask=None, labels=None):
        first, second = self.layers
        logits = self.head(second(torch.relu(self.norm(first(self.embed(input_ids).mean(1))))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_running_statistics_without_which_a_level_was_kept_stay(tmp_path):
    """Such as an earlier version has kept it."""
    LevelBest(tmp_path).consider(0, 0.5, Normed(track=False))
    model = Normed()
    with torch.no_grad():
        for tensor in (*model.parameters(), model.norm.running_mean):
            tensor.add_(1)
    assert LevelBest(tmp_path).restore(0, model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), Normed().parameters(), strict=True))
    assert torch.equal(model.norm.running_mean, torch.ones(16))


def test_a_resumed_level_ends_with_the_same_running_statistics(tmp_path):
    ends = []
    for resumed in (False, True):
        changes = {"level_eval_steps": 1, "num_levels": 1, "save_strategy": "steps", "save_steps": 8}
        trainer = make_trainer(tmp_path, Normed(), **changes)
        trainer.run.bench.score = lambda trainer=trainer: abs(trainer.state.global_step - 5.0)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8") if resumed else None)
        ends.append(weights_of(trainer.model))
    assert same(*ends) and ends[0]["norm.num_batches_tracked"] == 5


@pytest.mark.parametrize("family", [make, Normed])
def test_the_best_weights_of_a_level_go_on(tmp_path, family):
    trainer = make_trainer(tmp_path, family(), level_eval_steps=2)
    scores = iter([0.5, 0.1, 0.9, 0.3, 0.8, 0.6])
    states = {}
    trainer.run.bench.score = lambda: next(scores)
    trainer.add_callback(Watch(lambda step: states.update({step: weights_of(trainer.model)})))
    trainer.train()
    last = {step: state for step, state in states.items() if step > trainer.run.plan.starts[-1]}
    logged = [entry for entry in trainer.state.log_history if "selection_score" in entry]
    best = min((e for e in logged if e["step"] in last), key=lambda e: e["selection_score"])["step"]
    assert best < 12  # otherwise this test shows nothing
    assert same(weights_of(trainer.model), states[best])
    assert not (tmp_path / "_level_best.safetensors").exists()


def test_training_again_keeps_the_zeros(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    zeros = masks_of(trainer).digest()
    trainer.train()
    assert masks_of(trainer).digest() == zeros and MaskSet.from_zeros(trainer.model).sparsity() == 0.75


def test_score_fn_replaces_the_criterion(tmp_path):
    calls = []

    def first_columns(name, weight, stats):
        calls.append((name, stats.samples))
        return torch.arange(weight.numel(), 0, -1.0).view(weight.shape)

    changes = {"method": "random", "num_candidates": 1, "scope": "layer", "num_levels": 1}
    trainer = make_trainer(tmp_path, keywords={"score_fn": first_columns}, **changes)
    trainer.train()
    for name, mask in masks_of(trainer).items():
        assert mask.view(-1)[: mask.numel() // 4].all() and not mask.view(-1)[mask.numel() // 4 :].any(), name
    assert {samples for _, samples in calls} == {4}


def test_bad_scores_are_refused_by_name(tmp_path):
    def broken(name, weight, stats):
        return weight / 0 if "layer.1.output" in name else weight.abs()

    trainer = make_trainer(tmp_path, method="random", keywords={"score_fn": broken})
    with pytest.raises(ValueError, match=r"NaN or infinity in the scores of bert\.encoder\.layer\.1\.output\.dense"):
        trainer.train()


def test_n_m_levels_end_in_the_pattern(tmp_path):
    trainer = make_trainer(tmp_path, method="random", pattern="2:4", sparsity=None, num_levels=2, trial_steps=1)
    trainer.train()
    for mask in masks_of(trainer).values():
        assert (mask.view(-1, 4).sum(1) == 2).all()


def by_size(name, weight, stats):
    """A score that reads no gradients."""
    assert stats.square is None and stats.product is None
    return weight.abs()


NO_GRADIENTS = {"method": "random", "criterion": "magnitude", "criterion_batches": 0}


@pytest.mark.parametrize("keywords", [{}, {"score_fn": by_size}])
def test_what_the_refusal_of_no_gradients_advises_works(tmp_path, keywords):
    with pytest.raises(ValueError, match="=0 .*64 or more, or leave criterion unset with proposals='paper'"):
        make_trainer(tmp_path, method="random", keywords=keywords, criterion_batches=0)
    changes = {"criterion_batches": 0, "proposals": "paper", "max_steps": 4, "trial_steps": 1}
    trainer = make_trainer(tmp_path, method="random", keywords=keywords, **changes)
    trainer.train()
    assert masks_of(trainer).sparsity() == 0.75


@pytest.mark.parametrize(
    ("changes", "keywords", "message"),
    [
        ({"max_steps": 1}, {}, "the plan cannot reach sparsity"),
        ({"target_modules": ["nothing"]}, {}, "no weight to prune"),
        ({"pattern": "2:5", "sparsity": None}, {}, "no multiple of 5"),
        ({"method": "random", "selection_fraction": 0.001}, {}, "leaves one part empty"),
        ({"method": "random"}, {"selection_dataset": []}, "selection_dataset is empty"),
        ({"method": "random"}, {"selection_dataset": (row for row in [])}, "selection_dataset has no length"),
        (
            {"method": "random"},
            {"selection_dataset": {"a": make_rows(8)}},
            "selection_dataset is a dict of 'a', not one",
        ),
        ({}, {"train_dataset": DatasetDict(train=Dataset.from_list([{"a": 1}]))}, "is a DatasetDict of 'train', not"),
        (
            {},
            {"teacher": torch.nn.Linear(3, 3)},
            "teacher must be a transformers model or the name of one, got Lin",
        ),
        ({"method": "random", "train_sampling_strategy": "batch_rebalance"}, {}, "a trial runs on one"),
        ({"warmup_steps": 5}, {}, "longer than the shortest level \\(4 steps\\)"),
        ({}, {"teacher": make(num_labels=3)}, "teacher has 3 labels and the student 2"),
        ({}, {"score_fn": lambda name, weight, stats: weight}, "score_fn has no meaning"),
        ({"method": "random", "selection_metric": "accuracy"}, {}, "needs compute_metrics"),
        ({"method": "random", "proposals": ["entropy:layer"]}, {}, "proposal 'entropy:layer' is unknown"),
        ({"method": "random", "proposals": ["taylor:layer"]}, {}, "only 2 different masks"),
        ({"method": "random", "proposals": ["score_fn:layer"]}, {}, "proposal 'score_fn:layer' is unknown"),
        (NO_GRADIENTS, {}, "'fisher:balanced' needs gradients: .*64 or more, or proposals='paper'"),
        (NO_GRADIENTS, {"score_fn": by_size}, "'fisher:balanced' needs gradients: .*64 or more, or proposals='paper'"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, {}, "cannot be restarted"),
    ],
)
def test_bad_input_is_refused_before_training(tmp_path, changes, keywords, message):
    model = make()
    before = weights_of(model)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "out", model, keywords=keywords, **changes).train()
    assert same(before, weights_of(model)) and not list(tmp_path.rglob("*.safetensors"))


class CountedStream(torch.utils.data.IterableDataset):
    """Rows in their own order, whose number is known."""

    def __iter__(self):
        return iter(make_rows())

    def __len__(self):
        return 96


@pytest.mark.parametrize("changes", [{"method": "random"}, {"method": "taylor"}, {"refit_rows": 8}], ids=str)
def test_rows_that_cannot_be_drawn_are_refused_though_they_are_counted(tmp_path, changes):
    with pytest.raises(ValueError, match="train_dataset is an IterableDataset.*map-style"):
        make_trainer(tmp_path, keywords={"train_dataset": CountedStream()}, **changes)
    with pytest.raises(ValueError, match="selection_dataset is an IterableDataset.*map-style"):
        make_trainer(tmp_path, keywords={"selection_dataset": CountedStream()}, **changes, level_eval_steps=2)
    make_trainer(tmp_path, keywords={"train_dataset": CountedStream()}).train()


class LockedCollator:
    """A collator that cannot be copied."""

    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, rows):
        with self.lock:
            return default_data_collator(rows)


@pytest.mark.parametrize("changes", [{"method": "random"}, {"method": "taylor"}, {"level_eval_steps": 2}], ids=str)
def test_a_collator_is_copied_only_where_something_is_drawn_beside_the_training(tmp_path, changes):
    collator = {"data_collator": LockedCollator()}
    with pytest.raises(ValueError, match="data collator, a LockedCollator, cannot be copied.*__deepcopy__"):
        make_trainer(tmp_path, keywords=collator, **changes)
    make_trainer(tmp_path, keywords=collator).train()


@pytest.mark.parametrize(
    ("changes", "later"),
    [
        ({}, {"sparsity": 0.5}),
        ({}, {"num_levels": 3}),
        ({}, {"method": "random"}),
        ({}, {"method": "pdp", "num_levels": None}),
        ({"sparsity": None}, {"pattern": "2:4"}),
        pytest.param({"method": "random"}, {"criterion": "fisher"}, marks=pytest.mark.slow),
        ({"method": "random"}, {"proposals": ["paper"]}),
        ({"method": "gumbel", "num_levels": None, "sparsity": None}, {"gumbel_untrained": True}),
    ],
    ids=str,
)
def test_a_field_from_which_others_follow_may_be_set_afterwards(tmp_path, changes, later):
    told = PruningTrainer(make(), make_config(tmp_path, **{**changes, **later}), train_dataset=make_rows())
    told.train()
    trainer = PruningTrainer(make(), make_config(tmp_path, **changes), train_dataset=make_rows())
    for name, value in later.items():
        setattr(trainer.args, name, value)
    trainer.train()
    assert same(weights_of(told.model), weights_of(trainer.model))
    assert told.pruning_state().method == trainer.pruning_state().method == trainer.args.method


def test_other_fields_may_be_set_afterwards_and_are_checked(tmp_path):
    args = make_config(tmp_path)
    args.max_steps, args.levels, args.level_eval_steps = 6, [0.25, 0.5, 0.75], 2
    trainer = PruningTrainer(make(), args, train_dataset=make_rows())
    args.learning_rate = 1e-4
    trainer.train()
    assert trainer.state.global_step == 6 and [s.sparsity for s in trainer.run.search.history] == [0.25, 0.5, 0.75]
    args.levels = [0.25, 0.5]
    with pytest.raises(ValueError, match="end at 0.5 but sparsity=0.75"):
        PruningTrainer(make(), args, train_dataset=make_rows())


def test_a_plain_module_cannot_be_distilled(tmp_path):
    with pytest.raises(ValueError, match="a teacher needs a model of transformers"):
        make_trainer(tmp_path, make().bert.encoder.layer[0], target_modules=["dense"], keywords={"teacher": make()})


def test_other_arguments_are_refused(tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(ValueError, match="must be a PruningConfig"):
        PruningTrainer(make(), TrainingArguments(str(tmp_path), use_cpu=True), train_dataset=make_rows())


def test_hold_out_is_seeded_disjoint_and_complete():
    rows = list(range(50))
    rest, held = hold_out(rows, 0.2, seed=1, most=1000)
    assert sorted([*rest, *held]) == rows and len(held) == 10
    assert list(held) == list(hold_out(rows, 0.2, 1, 1000)[1]) != list(hold_out(rows, 0.2, 2, 1000)[1])
    few = list(hold_out(rows, 0.2, seed=1, most=3)[1])
    assert len(few) == 3 and set(few) < set(held)


def test_the_teacher_is_left_alone(tmp_path):
    teacher = make(seed=3)
    before = copy.deepcopy(weights_of(teacher))
    make_trainer(tmp_path, keywords={"teacher": teacher}).train()
    assert same(before, weights_of(teacher))


@pytest.mark.parametrize("changes", [{}, {"distill_attention": 1.0}])
def test_the_model_of_a_model_init_is_distilled_like_one_that_is_given(tmp_path, changes):
    """With labels of several at once, the first forward pass tells the model what they are."""
    rows = [{**row, "labels": (row["input_ids"][:3] > 32).float()} for row in make_rows()]

    def init():
        with torch.random.fork_rng():  # the order of the rows is drawn next
            return make(num_labels=3)

    found = []
    for given in ({}, {"model_init": init}):
        keywords = {"teacher": make(num_labels=3, seed=3), "train_dataset": rows, **given}
        model = None if given else make(num_labels=3)
        trainer = PruningTrainer(model, make_config(tmp_path, **changes), **keywords)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == found[1] and len(found[0]) == 12


def test_segment_ids_reach_a_teacher_whose_student_knows_none(tmp_path):
    """`remove_unused_columns` looks at the student; a BERT teacher must still see two segments as two."""
    from datasets import Dataset

    rows = [{**{k: v.tolist() for k, v in row.items()}, "token_type_ids": [0] * 4 + [1] * 4} for row in make_rows()]
    teacher, seen = make(seed=3), []
    teacher.register_forward_pre_hook(lambda m, a, given: seen.append(given["token_type_ids"]), with_kwargs=True)
    trainer = make_trainer(
        tmp_path,
        make("DistilBert"),
        Dataset.from_list(rows),
        keywords={"teacher": teacher, "eval_dataset": Dataset.from_list(rows)},
    )
    trainer.train()
    assert len(seen) == 12 and all(ids[:, 4:].all() and not ids[:, :4].any() for ids in seen)
    trainer.evaluate()


def test_a_resumed_run_remembers_its_searches(tmp_path):
    changes = {"method": "random", "trial_steps": 2, "save_strategy": "steps", "save_steps": 6}
    whole = make_trainer(tmp_path, **changes)
    whole.train()
    resumed = make_trainer(tmp_path, make(seed=5), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    costs = [t.search_summary()["search_step_equivalents"] for t in (whole, resumed)]
    assert costs[0] == costs[1] and len(resumed.run.search.history) == 2


FIRST, SECOND = (f"bert.encoder.layer.{i}.attention.self.query.weight" for i in range(2))


class TiedBert(BertForSequenceClassification):
    """Two layers with one query matrix, which is saved under the name in the second."""

    _tied_weights_keys = {FIRST: SECOND}


@pytest.mark.parametrize("changes", [{}, {"method": "random", "num_candidates": 3}], ids=["magnitude", "random"])
def test_tied_matrices_have_the_name_that_they_are_saved_by(tmp_path, changes):
    saving = {"save_strategy": "steps", "save_steps": 6}
    trainer = make_trainer(tmp_path / "whole", TiedBert(make().config), **changes, **saving)
    trainer.train()
    trainer.save_model()
    model, state = trainer.model, PruningState.load(tmp_path / "whole")
    assert len(state.masks) == 11 and SECOND in state.masks and FIRST not in state.masks
    state.masks.check_fits(prunable_weights(model))
    state.masks.apply_(model)
    state.check_saved(tmp_path / "whole")
    assert state.masks.digest() == MaskSet.from_zeros(model).digest()
    assert sparsity_report(model).sparsity == state.masks.sparsity() == 0.75
    again = TiedBert.from_pretrained(tmp_path / "whole")
    assert torch.equal(again.get_parameter(FIRST), model.get_parameter(SECOND))
    resumed = make_trainer(tmp_path / "again", TiedBert(make(seed=3).config), **changes, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert same(weights_of(model), weights_of(resumed.model))


def test_a_weight_that_is_computed_is_refused_before_training(tmp_path):
    model = make()
    torch.nn.utils.parametrizations.weight_norm(model.bert.encoder.layer[0].attention.self.query)
    with pytest.raises(ValueError, match=f"{FIRST} is computed from .*parametrization.*exclude_modules"):
        make_trainer(tmp_path, model)
    trainer = make_trainer(tmp_path, model, exclude_modules=[FIRST.removesuffix(".weight")])
    trainer.train()
    trainer.save_model()
