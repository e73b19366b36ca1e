"""What the soft methods share: resuming, accumulation, interruption, second runs."""

import pytest
import torch
from tiny import FAMILIES, losses, make, make_trainer, same, weights_of
from transformers import AutoModelForSequenceClassification, TrainerCallback

from hf_maskselect import MaskSet, PruningState, prunable_weights, verify
from hf_maskselect.masking.allocation import allocate

SOFT = {"num_levels": None, "frozen_steps": 0, "pruning_warmup_steps": 2, "soft_ramp": 0.8}
METHODS = [
    {**SOFT, "method": "pdp", "pdp_tau": 1e-3},
    {**SOFT, "method": "gumbel", "criterion": "magnitude"},
    {**SOFT, "method": "pdp", "criterion": "taylor"},
    {**SOFT, "method": "gumbel", "criterion": "taylor"},
    {**SOFT, "method": "movement"},
    {**SOFT, "method": "movement", "criterion": "taylor"},
    {**SOFT, "method": "pdp", "soft_ramp": None},  # begins from a fit
]
IDS = ["pdp", "gumbel", "pdp-taylor", "gumbel-taylor", "movement", "movement-taylor", "pdp-fit"]
each_method = pytest.mark.parametrize("method", METHODS, ids=IDS)


@each_method
def test_accumulated_batches_are_one_batch(tmp_path, method):
    """In double precision: Adam gives a gradient that is zero but for rounding a full step, which may flip a mask."""
    runs = []
    for batch, count in ((8, 1), (4, 2), (2, 4)):
        trainer = make_trainer(
            tmp_path / str(batch),
            make().double(),
            **method,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=count,
        )
        trainer.train()
        runs.append(trainer)
    for other in runs[1:]:
        assert losses(runs[0]) == pytest.approx(losses(other), rel=1e-5)
        assert runs[0].pruning_state().masks.overlap(other.pruning_state().masks) > 0.999


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS[3:5], ids=IDS[3:5])  # PDP has more to show, in its own file
def test_the_count_is_exact_and_the_model_is_plain(tmp_path, family, method):
    trainer = make_trainer(tmp_path, make(family), **method)
    keys = trainer.model.state_dict().keys()
    trainer.train()
    trainer.save_model()
    assert verify(tmp_path).masks.sparsity() == MaskSet.from_zeros(trainer.model).sparsity() == 0.75
    assert trainer.model.state_dict().keys() == keys
    assert same(weights_of(AutoModelForSequenceClassification.from_pretrained(tmp_path)), weights_of(trainer.model))


SAVED = {"sparsity": None, "frozen_steps": 3, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """(method, pattern) -> the trainer of a run with a checkpoint of every step; trained once."""
    trained = {}

    def run(method, pattern):
        key = str(method), pattern
        if key not in trained:
            trained[key] = make_trainer(tmp_path_factory.mktemp("whole"), **{**method, "pattern": pattern, **SAVED})
            trained[key].train()
        return trained[key]

    return run


@each_method
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 4, 10])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_run_resumes_to_the_bit(tmp_path, whole_run, method, step, pattern):
    """From the warm-up, the ramp and the frozen phase."""
    whole = whole_run(method, pattern)
    resumed = make_trainer(tmp_path, make(seed=5), **{**method, "pattern": pattern, **SAVED})
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
    assert losses(whole) == losses(resumed)
    assert same(weights_of(whole.model), weights_of(resumed.model))
    assert whole.pruning_state().masks.digest() == resumed.pruning_state().masks.digest()


@pytest.mark.parametrize("method", METHODS[:6], ids=IDS[:6])  # with a ramp
def test_a_step_that_never_ends_loses_nothing(tmp_path, method):
    """Training stopped between micro-batches, and again after an interruption: masks fit the weights each time."""

    class Stop(TrainerCallback):
        raising = True

        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                if self.raising:
                    raise KeyboardInterrupt
                control.should_training_stop = True

    stop = Stop()
    trainer = make_trainer(tmp_path, **method, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer.add_callback(stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trained = {name: tensor.clone() for name, tensor in trainer.run.method._trained.items()}
    stop.raising = False
    with pytest.warns(UserWarning, match="before the soft masks reached their target"):
        trainer.train()
    assert trained and MaskSet.from_zeros(trainer.model).sparsity() == 0.75
    trainer.save_model()
    verify(tmp_path)


@each_method
def test_a_second_run_starts_afresh_and_keeps_what_is_dead(tmp_path, method):
    trainer = make_trainer(tmp_path, **method)
    trainer.train()
    first = trainer.pruning_state().masks
    trainer.train()
    second = trainer.pruning_state().masks
    assert second.sparsity() == MaskSet.from_zeros(trainer.model).sparsity() == 0.75
    assert second.overlap(first) == 1
    trainer.save_model()
    verify(tmp_path)


@each_method
def test_a_run_that_ends_in_its_warm_up_is_cut_by_magnitude(tmp_path, method):
    """None has learned anything yet: PDP ranks by magnitude, and logits and scores start from it."""
    dense = {}

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            dense.update(weights_of(trainer.model))
            control.should_training_stop = True

    trainer = make_trainer(tmp_path, **method, scope="layer")
    trainer.add_callback(Stop())
    with pytest.warns(UserWarning, match="the rest is cut at once"):
        trainer.train()
    for name, mask in trainer.pruning_state().masks.items():
        size = dense[name].abs()
        assert mask.float().mean() == 0.25 and size[mask].min() >= size[~mask].max()


def hollow(share):
    """A model whose query matrices alone are sparse, nearly empty or to 95 %."""
    model = make()
    for name, weight in prunable_weights(model).items():
        if "query" in name:
            order = weight.detach().abs().flatten().argsort(descending=True)
            kept = torch.zeros(weight.numel(), dtype=torch.bool)
            kept[order[: round(share * weight.numel())]] = True
            weight.data.mul_(kept.view(weight.shape))
    return model, MaskSet.from_zeros(model)


@each_method
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("share", [0.0, 0.002, 0.05])
def test_floors_and_quotas_take_nothing_dead(tmp_path, method, scope, share):
    """Where a matrix has fewer weights left than its share, others keep more, as under hard masks."""
    model, start = hollow(share)
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer = make_trainer(tmp_path, model, **{**method, "frozen_steps": 3}, scope=scope, sparsity=0.5, **saving)
    trainer.train()
    trainer.save_model()
    masks = verify(tmp_path).masks
    assert masks.sparsity() == 0.5 and masks.overlap(start) == 1
    room = [int(mask.sum()) for mask in start.values()]
    expected = allocate(masks.kept, [mask.numel() for mask in start.values()], room)
    assert ([int(masks[name].sum()) for name in start] == expected) == (scope == "layer")
    early = PruningState.load(tmp_path / "checkpoint-3").masks
    assert start.sparsity() <= early.sparsity() <= 0.5 and early.overlap(start) == 1
    assert (early.sparsity() == 0.5) == (method["soft_ramp"] is None)  # at the target from the first step
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-3")
    assert early.digest() == MaskSet.from_zeros(plain).digest()


@pytest.mark.parametrize("method", METHODS[:4], ids=IDS[:4])
def test_neighbours_take_nothing_dead(tmp_path, method):
    model, start = hollow(0.002)
    more = {"frozen_steps": 4, "num_candidates": 3, "trial_steps": 2}
    trainer = make_trainer(tmp_path, model, **{**method, **more}, scope="layer", sparsity=0.5)
    candidate, found = trainer.run.method.candidate, []

    def watched(ratio, seed):
        found.append(candidate(ratio, seed))
        return found[-1]

    trainer.run.method.candidate = watched
    trainer.train()
    assert len({masks.digest() for masks in found}) == 3
    assert all(masks.sparsity() == 0.5 and masks.overlap(start) == 1 for masks in found)


@pytest.mark.parametrize("method", METHODS[::2], ids=IDS[::2])
def test_rows_with_a_dead_weight_are_not_kept_whole(tmp_path, method):
    model = make()
    for weight in prunable_weights(model).values():
        weight.data[:3, 1] = 0
        weight.data[:3].mul_(4)  # the largest rows
    start = MaskSet.from_zeros(model)
    trainer = make_trainer(tmp_path, model, **method, pattern="channel", sparsity=0.5)
    trainer.train()
    masks = trainer.pruning_state().masks
    assert masks.sparsity() == 0.5 and masks.overlap(start) == 1
