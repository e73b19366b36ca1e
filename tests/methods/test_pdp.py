"""PDP: its training equals an independent implementation, its end is exact, and it resumes to the bit."""

import copy

import pytest
import torch
from plain_pdp import plain_training
from tiny import FAMILIES, losses, make, make_config, make_rows, make_trainer, same, weights_of
from transformers import AutoModelForSequenceClassification, TrainerCallback

from hf_maskselect import MaskSet, PruningState, PruningTrainer, prunable_weights, verify
from hf_maskselect.storage.state import load_method_state

PDP = {"method": "pdp", "num_levels": None, "pruning_warmup_steps": 2, "frozen_steps": 0, "pdp_tau": 1e-3}


def test_training_equals_the_paper_written_with_autograd(tmp_path):
    model, rows = make(), make_rows(96)
    factors = {name: torch.ones(()) for name in prunable_weights(model)}
    zeros = {name: round(0.75 * weight.numel()) for name, weight in prunable_weights(model).items()}

    def soft_mask(squares, t):
        return torch.sigmoid((squares - t**2) / 1e-3)

    start = copy.deepcopy(model)
    expected = plain_training(start, rows, 12, factors, zeros, soft_mask, warmup=2, ramp=8, rate=0.1)
    trainer = make_trainer(
        tmp_path,
        model,
        rows,
        **PDP,
        scope="layer",
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
    )
    trainer.train()
    assert losses(trainer) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_is_exact_and_plain(tmp_path, family):
    trainer = make_trainer(tmp_path, make(family), **PDP)
    keys = trainer.model.state_dict().keys()
    trainer.train()
    trainer.save_model()
    state = verify(tmp_path)
    assert state.method == "pdp" and MaskSet.from_zeros(trainer.model).sparsity() == 0.75
    assert trainer.model.state_dict().keys() == keys
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert same(weights_of(loaded), weights_of(trainer.model))
    (gap,) = [entry["soft_hard_gap"] for entry in trainer.state.log_history if "soft_hard_gap" in entry]
    assert 0 < gap < 1


@pytest.mark.parametrize(("pattern", "share"), [("2:4", 0.5), ("1:4", 0.25), ("3:8", 0.375)])
def test_groups_keep_n_of_m(tmp_path, pattern, share):
    trainer = make_trainer(tmp_path, **{**PDP, "sparsity": None}, pattern=pattern, eval_strategy="steps", eval_steps=5)
    trainer.train()
    size = int(pattern[-1])
    for mask in trainer.pruning_state().masks.values():
        assert (mask.view(-1, size).sum(1) == share * size).all()
    found = [entry["eval_sparsity"] for entry in trainer.state.log_history if "eval_sparsity" in entry]
    assert 0 < found[0] < found[1] == 1 - share  # after 5 and 10 steps; the ramp ends with the tenth


def test_channels_fall_whole_and_the_count_is_exact(tmp_path):
    trainer = make_trainer(
        tmp_path, **{**PDP, "sparsity": 0.5}, pattern="channel", eval_strategy="steps", eval_steps=6
    )
    trainer.train()
    trainer.save_model()
    masks = verify(tmp_path).masks
    assert all(torch.equal(mask.all(1), mask.any(1)) and mask.any(1).float().mean() == 0.5 for mask in masks.values())
    found = [entry["eval_sparsity"] for entry in trainer.state.log_history if "eval_sparsity" in entry]
    assert 0 < found[0] < found[1] == 0.5


@pytest.mark.parametrize("scope", ["layer", "balanced", "global"])
def test_counts_are_fixed_by_one_ranking_and_met_on_the_ramp(tmp_path, scope):
    model = make()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.mul_(4)
    trainer = make_trainer(tmp_path, model, **PDP, scope=scope, eval_strategy="steps", eval_steps=1)
    trainer.train()
    method, masks = trainer.run.method, trainer.pruning_state().masks
    zeros = {name: mask.numel() - int(mask.sum()) for name, mask in masks.items()}
    assert zeros == method._zeros
    shares = {round(count / masks[name].numel(), 3) for name, count in zeros.items()}
    assert (len(shares) == 1) == (scope == "layer")
    found = [entry["eval_sparsity"] for entry in trainer.state.log_history if "eval_sparsity" in entry]
    expected = [sum(round(min(1, max(0, s - 2) / 8) * z) for z in zeros.values()) / masks.total for s in range(1, 13)]
    assert found[:12] == pytest.approx(expected, abs=1e-12)


def test_an_evaluation_changes_nothing(tmp_path):
    plain, watched = (
        make_trainer(tmp_path / name, **PDP, **more)
        for name, more in (("a", {}), ("b", {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}))
    )
    plain.train()
    watched.train()
    assert losses(plain) == losses(watched) and same(weights_of(plain.model), weights_of(watched.model))


def test_a_checkpoint_on_the_ramp_is_plain_and_sparse_for_its_users(tmp_path):
    trainer = make_trainer(tmp_path, **PDP, save_strategy="steps", save_steps=5)
    trainer.train()
    folder = tmp_path / "checkpoint-5"
    masks = PruningState.load(folder).masks
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert MaskSet.from_zeros(loaded).digest() == masks.digest() and 0.2 < masks.sparsity() < 0.3
    assert load_method_state(folder).keys() == {f"{kind}.{name}" for kind in ("dense", "zeros") for name in masks}
    trainer.save_model()
    assert not load_method_state(tmp_path)  # the finished model holds nothing but itself


def test_inside_a_step_the_model_computes_with_effective_weights(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.append(("between", model.bert.encoder.layer[0].output.dense.weight.detach().clone()))

    class Trainer(type(make_trainer(tmp_path))):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if model.training:
                seen.append(("inside", model.bert.encoder.layer[0].output.dense.weight.detach().clone()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = make_trainer(tmp_path, trainer=Trainer, **PDP)
    trainer.add_callback(Look())
    trainer.train()
    pairs = list(zip(seen[::2], seen[1::2], strict=True))
    for step, ((first, inside), (second, trained)) in enumerate(pairs):
        assert (first, second) == ("inside", "between")
        assert torch.equal(inside, trained) == (step < 2)
        assert (inside.abs() <= trained.abs()).all()


def test_a_run_stopped_inside_a_step_saves_its_trained_weights(tmp_path):
    class Stop(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, **PDP, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.save_model()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for name, mask in PruningState.load(tmp_path).masks.items():
        trained = trainer.run.method._trained[name]
        assert torch.equal(loaded.get_parameter(name), trained * mask)
        assert not torch.equal(trainer.run.method.weights[name], trained)


def test_another_model_gets_its_own_targets(tmp_path):
    """`model_init`: the second model is not pruned to the first one's counts."""
    first, second = make(), make(seed=1)
    with torch.no_grad():
        first.bert.encoder.layer[0].output.dense.weight.mul_(4)
        second.bert.encoder.layer[1].output.dense.weight.mul_(4)
    models = iter([first, first, second])
    changes = {**PDP, "pruning_warmup_steps": 0}
    trainer = PruningTrainer(
        args=make_config(tmp_path / "a", **changes),
        model_init=lambda: copy.deepcopy(next(models)),
        train_dataset=make_rows(),
    )
    trainer.train()
    counts = trainer.run.method._zeros
    trainer.train()
    alone = make_trainer(tmp_path / "b", second, **changes)
    alone.train()
    assert trainer.run.method._zeros == alone.run.method._zeros != counts


@pytest.mark.parametrize("size", [64, 1024])
def test_diverged_weights_are_named(tmp_path, size):
    """At the first ranking, in small matrices and in those that are searched by brackets."""
    model = make(intermediate_size=size)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer\.0\.attention\.self\.query\.weight holds NaN or infinity at step 2"):
        make_trainer(tmp_path, model, **PDP).train()


def test_candidates_are_neighbours_tried_when_the_mask_hardens(tmp_path):
    trainer = make_trainer(tmp_path, **{**PDP, "frozen_steps": 4}, num_candidates=3, trial_steps=2)
    trainer.train()
    (search,) = trainer.run.search.history
    assert search.step == 8 and [c.index for c in search.candidates] == [0, 1, 2]
    assert [c.proposal.split("@")[0] for c in search.candidates] == ["pdp:global"] + 2 * ["pdp:global:votes"]
    assert all(0.5 < c.overlap < 1 for c in search.candidates[1:])
    masks = trainer.pruning_state().masks
    assert masks.sparsity() == 0.75
    assert {n: m.numel() - int(m.sum()) for n, m in masks.items()} == trainer.run.method._zeros


def test_nothing_is_held_beside_the_weights(tmp_path):
    """No copy of the weights outlives a step, and no mask is held before the hard phase."""
    held = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            method = trainer.run.method
            held.append(sum(t.numel() for group in (method._keep, method._trained) for t in group.values()))

    trainer = make_trainer(tmp_path, **PDP)
    trainer.add_callback(Look())
    trainer.train()
    assert held == [0] * 12


def test_tied_embeddings_are_left_alone(tmp_path):
    model = make(head="ForMaskedLM")
    rows = [{**row, "labels": row["input_ids"]} for row in make_rows()]
    trainer = make_trainer(tmp_path, model, rows, **PDP, exclude_modules=["transform.dense"])
    trainer.train()
    assert model.bert.embeddings.word_embeddings.weight is model.cls.predictions.decoder.weight
    assert not any("embedding" in name or "decoder" in name for name in trainer.pruning_state().masks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pdp_tau": 0.0}, "pdp_tau=0.0 must be positive"),
        ({"soft_ramp": 0.0}, "soft_ramp=0.0 must lie in"),
        ({"frozen_steps": -1}, "frozen_steps=-1 must be a share"),
        ({"levels": [0.5, 0.75]}, "levels and num_levels have no meaning with method='pdp'"),
        ({"num_levels": 3}, "levels and num_levels have no meaning"),
        ({"criterion": "taylor"}, "pdp_tau=0.001 has no meaning with criterion='taylor', .* use pdp_relative_tau"),
        ({"pdp_relative_tau": 0.1}, "pdp_relative_tau=0.1 has no meaning with pdp_tau=0.001"),
        ({"pdp_tau": None, "pdp_relative_tau": 0.0}, "pdp_relative_tau=0.0 must be positive"),
        (
            {"pdp_tau": None, "criterion_batches": 0},
            "criterion_batches=0 gives criterion='taylor' no gradients: .* criterion='magnitude'",
        ),
        ({"proposals": ["paper"]}, r"proposals=\['paper'\] has no meaning with method='pdp'"),
        ({"num_candidates": 4}, "num_candidates=4 needs steps under the hard mask"),
        ({"level_eval_steps": 2}, "level_eval_steps=2 needs steps under the hard mask"),
        (
            {"method": "magnitude", "pdp_tau": None, "frozen_steps": 2},
            "frozen_steps=2 has no meaning with method='magnitude'",
        ),
        ({"method": "magnitude", "frozen_steps": 0}, "pdp_tau=0.001 has no meaning with method='magnitude'"),
        ({"frozen_steps": 0.05, "num_candidates": 2}, "frozen_steps=0.05 of 12 steps is less than one step"),
        (
            {"pattern": "channel", "num_candidates": 2, "frozen_steps": 3},
            "num_candidates=2 has no meaning with pattern",
        ),
        ({"pruning_warmup_steps": 9, "frozen_steps": 3}, "leave no soft step of 12"),
    ],
)
def test_what_has_no_meaning_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **{**PDP, **changes}).train()
