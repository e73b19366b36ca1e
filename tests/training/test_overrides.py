"""Hooks of the trainer that a subclass overrides without `super()`, and parts that a user replaces."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny import METHODS, make, make_trainer, same, weights_of
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from transformers import Trainer, get_scheduler
from transformers.optimization import Adafactor, AdafactorSchedule
from transformers.trainer_callback import CallbackHandler

from hf_maskselect import MaskSet, PruningState, PruningTrainer

GUMBEL = METHODS[3]
SEARCH = {"method": "random", "num_candidates": 2, "trial_steps": 2, "refit_rows": 0, "num_levels": 1}


class OwnOptimizer(PruningTrainer):
    """Makes what `Trainer` makes, in its own words."""

    def create_optimizer(self):
        decayed = set(self.get_decay_parameter_names(self.model))
        named = list(self.model.named_parameters())
        groups = [
            {"params": [p for n, p in named if n in decayed], "weight_decay": self.args.weight_decay},
            {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate, fused=True)


class OwnSchedule(OwnOptimizer):
    """Returns what it makes, and assigns nothing."""

    def create_optimizer(self):
        super().create_optimizer()
        made, self.optimizer = self.optimizer, None
        return made

    def create_scheduler(self, num_training_steps, optimizer=None):
        return get_scheduler("linear", self.optimizer, 0, num_training_steps)


class OwnClipping(PruningTrainer):
    def _clip_grad_norm(self, model):
        return torch.nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        return grad_norm


class OwnLoading(PruningTrainer):
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.model.load_state_dict(load_file(f"{resume_from_checkpoint}/model.safetensors"), strict=False)


class OwnSave(PruningTrainer):
    def _save(self, output_dir=None, state_dict=None):
        self.model.save_pretrained(output_dir)


class OwnSaveModel(PruningTrainer):
    def save_model(self, output_dir=None, _internal_call=False):
        self.model.save_pretrained(output_dir)


class MoreInSave(PruningTrainer):
    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)


class OwnColumns(PruningTrainer):
    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["input_ids", "attention_mask", "labels"]


class OwnEvaluation(PruningTrainer):
    """Evaluates in its own loop."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self.seen = [*getattr(self, "seen", []), MaskSet.from_zeros(self.model).sparsity()]
        return {"eval_loss": 0.0}


class OwnPreparation(PruningTrainer):
    def _prepare_for_training(self, *args):
        return Trainer._prepare_for_training(self, *args)


def trained(folder, kind=PruningTrainer, **changes):
    trainer = make_trainer(folder, trainer=kind, **changes)
    trainer.train()
    return trainer


METHOD = pytest.mark.parametrize(
    "method", [METHODS[3], *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS[:3])], ids=lambda m: m["method"]
)


@METHOD
def test_own_makers_change_nothing(tmp_path, method):
    """Not the logits either, nor the trials."""
    changes = {**method, "lr_rewind": False}
    expected = weights_of(trained(tmp_path / "a", **changes).model)
    assert same(expected, weights_of(trained(tmp_path / "b", OwnOptimizer, **changes).model))
    found = weights_of(trained(tmp_path / "c", OwnSchedule, **changes).model)
    for name, tensor in expected.items():  # the rates of logits follow the schedule but for rounding
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(found[name] == 0, tensor == 0)


def test_own_rates_restart_only_with_the_trainers_schedule(tmp_path):
    said = []
    for kind in (OwnOptimizer, OwnSchedule):
        trainer = make_trainer(tmp_path, trainer=kind)
        trainer._say = said.append
        trainer.train()
    assert "its rates do not restart" not in said[0] and said[0].count("  0.001  ") == 2
    assert "Your own LambdaLR: its rates do not restart" in said[1]


class OwnGroups(PruningTrainer):
    def create_optimizer(self):
        head = [p for n, p in self.model.named_parameters() if "classifier" in n]
        body = [p for n, p in self.model.named_parameters() if "classifier" not in n]
        groups = [{"params": body, "lr": 0.02}, {"params": head, "lr": 0.1, "weight_decay": 0.5}]
        self.optimizer = torch.optim.SGD(groups, momentum=0.8, nesterov=True)
        return self.optimizer


class OneOptimizer(OwnGroups):
    """Makes an optimizer once and hands out the same one again."""

    def create_optimizer(self):
        if not hasattr(self, "only"):
            self.only = super().create_optimizer()
        self.optimizer = self.only


@pytest.mark.parametrize("kind", [OwnGroups, OneOptimizer])
def test_trials_take_their_optimizer_from_the_same_method(tmp_path, kind):
    trainer = make_trainer(tmp_path, trainer=kind, **SEARCH)
    found, new = [], trainer.new_optimizer
    trainer.new_optimizer = lambda rate: found.append(new(rate)) or found[-1]
    trainer.train()
    run = trainer.optimizer.optimizer
    assert len(found) == 2
    for trial in found:
        assert type(trial) is torch.optim.SGD and trial is not run
        for group, source, peak in zip(trial.param_groups, run.param_groups, (0.02, 0.1), strict=True):
            assert group["initial_lr"] == pytest.approx(peak)
            assert all(group[name] == source[name] for name in ("momentum", "nesterov", "weight_decay"))
            assert all(a is b for a, b in zip(group["params"], source["params"], strict=True))


def test_a_maker_that_makes_nothing_is_named(tmp_path):
    class Nothing(PruningTrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            pass

    with pytest.raises(ValueError, match="create_scheduler of Nothing made nothing"):
        trained(tmp_path, Nothing)


def test_an_optimizer_assigned_later_is_the_users(tmp_path):
    model = make()
    trainer = make_trainer(tmp_path, model, **{**SEARCH, "seed": 3})
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    trainer.args.seed = 7  # the run is made again
    trainer.train()
    assert trainer.given_optimizer is trainer.optimizer.optimizer and type(trainer.given_optimizer) is torch.optim.SGD
    assert trainer.peak_rate == 0.03


@METHOD
def test_own_clipping_gets_the_gradients_of_the_method(tmp_path, method):
    expected = trained(tmp_path / "a", **method, max_grad_norm=1e9)
    found = trained(tmp_path / "c", OwnClipping, **method, max_grad_norm=1e9)
    assert same(weights_of(expected.model), weights_of(found.model))


@pytest.mark.parametrize("method", METHODS[2:3], ids=lambda m: m["method"])
def test_a_run_resumes_from_weights_that_a_subclass_loads(tmp_path, method):
    changes = {**method, "save_strategy": "steps", "save_steps": 6}
    whole = trained(tmp_path, OwnLoading, **changes)
    resumed = make_trainer(tmp_path, trainer=OwnLoading, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert same(weights_of(whole.model), weights_of(resumed.model))


@pytest.mark.parametrize("kind", [OwnSave, pytest.param(OwnSaveModel, marks=pytest.mark.slow), MoreInSave])
@pytest.mark.parametrize("method", [METHODS[3], pytest.param(METHODS[1], marks=pytest.mark.slow)])
def test_a_run_resumes_from_what_a_subclass_saves(tmp_path, kind, method):
    changes = {**method, "save_strategy": "steps", "save_steps": 6}
    whole = trained(tmp_path, kind, **changes)
    checkpoint = str(tmp_path / "checkpoint-6")
    resumed = make_trainer(tmp_path, trainer=kind, **changes)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert same(weights_of(whole.model), weights_of(resumed.model))
    state = PruningState.load(checkpoint)
    state.check_saved(checkpoint)
    assert state.masks.digest() == MaskSet.from_zeros(make().from_pretrained(checkpoint)).digest()


def test_the_teacher_gets_its_columns(tmp_path):
    teacher = make("Bert", num_hidden_layers=2)
    trainer = make_trainer(tmp_path, make("DistilBert"), trainer=OwnColumns, keywords={"teacher": teacher})
    trainer.train()
    assert "token_type_ids" in trainer._signature_columns


@pytest.mark.parametrize("method", METHODS[3:], ids=lambda m: m["method"])
def test_an_own_evaluation_sees_the_sparse_model(tmp_path, method):
    changes = {**method, "eval_strategy": "steps", "eval_steps": 2}
    expected = trained(tmp_path / "a", **changes)
    found = trained(tmp_path / "b", OwnEvaluation, **changes)
    sparsities = [entry["eval_sparsity"] for entry in expected.state.log_history if "eval_sparsity" in entry]
    assert found.seen[: len(sparsities)] == sparsities and 0 < sparsities[0] < sparsities[-1]
    assert same(weights_of(expected.model), weights_of(found.model))


def test_callbacks_that_are_replaced_still_cut(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.callback_handler = CallbackHandler([], trainer.model, None, None, None)
    trainer.train()
    assert MaskSet.from_zeros(trainer.model).sparsity() == 0.75


def test_a_subclass_that_leaves_out_the_plan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="OwnPreparation overrides _prepare_for_training without super"):
        trained(tmp_path, OwnPreparation)


# -- given schedules -------------------------------------------------------------------------------------------------

SCHEDULES = {
    "lambda": lambda o: LambdaLR(o, [lambda step: 1 - step / 24] * 2),
    "one_cycle": lambda o: OneCycleLR(o, [1e-3, 2e-3], total_steps=30),
    "cyclic": lambda o: CyclicLR(o, [1e-4, 1e-4], [1e-3, 2e-3], step_size_up=4, cycle_momentum=False),
    "sequential": lambda o: SequentialLR(o, [LinearLR(o), CosineAnnealingLR(o, 8)], [4]),
    "plateau": lambda o: ReduceLROnPlateau(o, patience=0, min_lr=[1e-5, 1e-6], threshold=10.0),
}


def with_schedule(folder, name, **changes):
    model = make()
    head = [p for n, p in model.named_parameters() if "classifier" in n]
    body = [p for n, p in model.named_parameters() if "classifier" not in n]
    optimizer = torch.optim.AdamW([{"params": body, "lr": 1e-3}, {"params": head, "lr": 2e-3}])
    given = (optimizer, SCHEDULES[name](optimizer))
    if name == "plateau":
        changes |= {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    changes = {**GUMBEL, **changes}
    trainer = make_trainer(folder, model, keywords={"optimizers": given}, **changes)
    trainer.watched = []
    optimizer.register_step_post_hook(lambda o, *_: trainer.watched.append([group["lr"] for group in o.param_groups]))
    return trainer


@pytest.mark.parametrize("name", ["lambda", *(pytest.param(n, marks=pytest.mark.slow) for n in list(SCHEDULES)[1:])])
def test_the_rates_of_logits_follow_a_given_schedule(tmp_path, name):
    trainer = with_schedule(tmp_path, name)
    trainer.train()
    rates = torch.tensor(trainer.watched, dtype=torch.float64)
    assert rates.shape == (12, 4)  # body, head, logits, scales
    logit_rate = trainer.run.settings.gumbel.logit_rate
    torch.testing.assert_close(rates[:, 2], logit_rate * rates[:, 0] / 1e-3)
    assert len(set(rates[:, 2].tolist())) > 2  # it changes
    trainer.train()  # once more, and nothing is added twice
    assert len(trainer.optimizer.param_groups) == 4


@pytest.mark.parametrize("name", ["one_cycle", pytest.param("sequential", marks=pytest.mark.slow)])
def test_a_run_with_a_given_schedule_resumes_to_the_bit(tmp_path, name):
    whole = with_schedule(tmp_path, name, save_strategy="steps", save_steps=6)
    whole.train()
    resumed = with_schedule(tmp_path, name)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert same(weights_of(whole.model), weights_of(resumed.model))
    assert resumed.watched == whole.watched[6:]


FITTED = {**SEARCH, "trial_steps": None, "refit_rows": 16}


@pytest.mark.parametrize(
    ("given", "method"),
    [
        ("none", FITTED),
        ("schedule", GUMBEL),
        pytest.param("class", FITTED, marks=pytest.mark.slow),
        pytest.param("class", GUMBEL, marks=pytest.mark.slow),
        pytest.param("none", GUMBEL, marks=pytest.mark.slow),
    ],
)
def test_an_optimizer_that_finds_its_rates_trains(tmp_path, given, method):
    model = make()
    optimizer = Adafactor(model.parameters())
    keywords = {"optimizers": (optimizer, AdafactorSchedule(optimizer) if given == "schedule" else None)}
    if given == "class":
        keywords = {"optimizer_cls_and_kwargs": (Adafactor, {"lr": None})}
    trainer = make_trainer(tmp_path, model, keywords=keywords, **method)
    before = copy.deepcopy(weights_of(model))
    trainer.train()
    after = weights_of(model)
    assert MaskSet.from_zeros(model).sparsity() == 0.75
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])
    if method is GUMBEL:
        rates = [group["lr"] for group in trainer.optimizer.param_groups[-2:]]
        options = trainer.run.settings.gumbel
        assert rates == [options.logit_rate, options.scale_rate]
        logits = next(iter(trainer.run.method._learned.values()))
        assert float(logits.detach().std()) > 0.1


def test_a_trial_needs_a_rate(tmp_path):
    keywords = {"optimizer_cls_and_kwargs": (Adafactor, {"lr": None})}
    with pytest.raises(ValueError, match="Adafactor has no learning rate above 0 from which a trial could start"):
        make_trainer(tmp_path, keywords=keywords, **SEARCH).train()
