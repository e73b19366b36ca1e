"""Runs that begin with a model that is sparse already."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from tiny import METHODS, make, make_trainer, same, weights_of
from transformers import BertForSequenceClassification, BertModel

from hf_maskselect import MaskSet, PruningState, load_pruned, prunable_weights, verify
from hf_maskselect.masking.patterns import NM, Channel, Unstructured


def sparse(sparsity, scope="layer", seed=0, pattern=None):
    """A model with zeros and their masks, as any pruner may leave it."""
    model = make(seed=seed)
    pattern = Unstructured(scope) if pattern is None else pattern
    masks = MaskSet(pattern.masks({n: w.detach().abs() for n, w in prunable_weights(model).items()}, sparsity))
    masks.apply_(model)
    return model, masks


def frozen_at_zero():
    """A dense model with one matrix that is zero and not trained."""
    model = make()
    model.bert.encoder.layer[0].attention.self.query.weight.requires_grad_(False).zero_()
    return model


EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method["method"])


@each_method
def test_a_sparse_model_is_fine_tuned_with_its_zeros_kept(tmp_path, method):
    model, masks = sparse(0.75)
    before = weights_of(model)
    trainer = make_trainer(tmp_path, model, **method)
    trainer.train()
    assert trainer.pruning_state().masks.digest() == masks.digest() == MaskSet.from_zeros(model).digest()
    name = next(iter(masks))
    assert not torch.equal(weights_of(model)[name], before[name])
    trainer.save_model()
    verify(tmp_path)


@each_method
def test_a_sparse_model_is_pruned_further(tmp_path, method):
    model, masks = sparse(0.5)
    trainer = make_trainer(tmp_path, model, **method)
    trainer.train()
    found = trainer.pruning_state().masks
    assert found.sparsity() == 0.75 and found.overlap(masks) == 1
    trainer.save_model()
    assert verify(tmp_path).start == 0.5


@each_method
def test_less_than_the_zeros_there_are_is_refused(tmp_path, method):
    model, _ = sparse(0.9)
    with pytest.raises(ValueError, match=r"sparsity=0.75 is less than the 0.90.* keep_zeros=False"):
        make_trainer(tmp_path, model, **method).train()
    asked = MaskSet.from_zeros(model).sparsity()
    make_trainer(tmp_path, copy.deepcopy(model), **{**method, "sparsity": asked}).train()
    trainer = make_trainer(tmp_path, model, **method, keep_zeros=False)
    trainer.train()
    assert trainer.pruning_state().masks.sparsity() == 0.75


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", None), ("channel", 0.25), ("channel", 0.5)])
@pytest.mark.parametrize("first", [Unstructured(), NM(1, 4), Channel()], ids=["anywhere", "groups", "rows"])
def test_what_is_advised_works(tmp_path, pattern, sparsity, first):
    model, masks = sparse(0.75, pattern=first)
    changes = {"pattern": pattern, "sparsity": sparsity, "num_levels": None}
    with pytest.raises(ValueError, match="is less than the 0.75") as refused:
        make_trainer(tmp_path, model, **changes).train()
    told = dict(re.findall(r"(\w+)=('?[\w.]+'?)", str(refused.value).partition(" set ")[2]))
    assert ("pattern" in told) == (pattern == "2:4" or first != Channel())
    advised = {name: eval(value) for name, value in told.items() if name != "keep_zeros"}
    trainer = make_trainer(tmp_path, copy.deepcopy(model), **{**changes, **advised})
    trainer.train()
    assert trainer.pruning_state().masks.digest() == masks.digest()
    make_trainer(tmp_path, model, **changes, keep_zeros=eval(told["keep_zeros"])).train()


def test_a_model_of_zeros_can_only_let_them_return(tmp_path):
    model = make()
    for weight in prunable_weights(model).values():
        weight.data.zero_()
    with pytest.raises(ValueError, match=r"the 1.000000 .* do not return: set keep_zeros=False to let"):
        make_trainer(tmp_path, model).train()
    trainer = make_trainer(tmp_path, model, keep_zeros=False)
    trainer.train()
    assert trainer.pruning_state().masks.sparsity() == 0.75


def test_levels_that_the_model_has_reached_are_left_out(tmp_path):
    model, _ = sparse(0.7)
    trainer = make_trainer(tmp_path, model, levels=[0.3, 0.6, 0.72, 0.75], num_levels=None)
    trainer.train()
    assert trainer.run.plan.levels == (0.72, 0.75)
    dense = make_trainer(tmp_path, levels=[0.3, 0.6, 0.72, 0.75], num_levels=None)
    dense.train()
    assert dense.run.plan.levels == (0.3, 0.6, 0.72, 0.75)


def test_the_plan_tells_where_the_model_begins(tmp_path, capsys):
    make_trainer(tmp_path, sparse(0.5)[0]).train()
    assert "from a model with sparsity 0.5000 whose zeros stay" in capsys.readouterr().out
    make_trainer(tmp_path, make()).train()
    assert "whose zeros" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """method -> the trainer of a run from a sparse model, with a checkpoint of every step; trained once."""
    trained = {}

    def run(method):
        if method["method"] not in trained:
            trainer = make_trainer(tmp_path_factory.mktemp("whole"), sparse(0.5)[0], **method, **EVERY_STEP)
            trainer.train()
            trained[method["method"]] = trainer
        return trained[method["method"]]

    return run


@each_method
@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 7, 10])
def test_a_run_from_a_sparse_model_resumes_to_the_bit(tmp_path, whole_run, method, step):
    """The plan is that of the start, though the checkpoint is sparser."""
    whole = whole_run(method)
    resumed = make_trainer(tmp_path, sparse(0.5, seed=3)[0], **method, **EVERY_STEP)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
    assert resumed.run.plan == whole.run.plan
    assert same(weights_of(whole.model), weights_of(resumed.model))


def test_load_pruned_gives_what_the_trainer_goes_on_with(tmp_path):
    first = make_trainer(tmp_path / "first", pack_on_save=True)
    first.train()
    first.save_model()
    model, masks = load_pruned(tmp_path / "first")
    trainer = make_trainer(tmp_path / "second", model, sparsity=0.875)
    trainer.train()
    trainer.save_model()
    state = verify(tmp_path / "second")
    assert state.masks.overlap(masks) == 1 and state.start == 0.75
    for name in ("model.safetensors", "pruning_state.safetensors"):
        (tmp_path / "first" / name).unlink()
    packed, again = load_pruned(tmp_path / "first")
    assert again.digest() == masks.digest() and same(weights_of(packed), weights_of(first.model))


def test_a_foreign_sparse_folder_goes_on_without_a_state(tmp_path):
    model, masks = sparse(0.75, scope="global")
    model.save_pretrained(tmp_path / "foreign")
    assert PruningState.find(tmp_path / "foreign") is None
    loaded, found = load_pruned(tmp_path / "foreign")
    assert found.digest() == masks.digest()
    trainer = make_trainer(tmp_path / "out", loaded)
    trainer.train()
    assert trainer.pruning_state().masks.digest() == masks.digest()


def test_an_n_m_model_keeps_its_groups(tmp_path):
    model, masks = sparse(0.5, pattern=NM(2, 4))
    trainer = make_trainer(tmp_path, model, pattern="2:4", sparsity=None, num_levels=None)
    trainer.train()
    assert trainer.pruning_state().masks.digest() == masks.digest()


@each_method
def test_groups_without_room_beside_the_zeros_are_refused(tmp_path, method):
    model, _ = sparse(0.4)
    before = weights_of(model)
    changes = {**method, "pattern": "2:4", "sparsity": None, "num_levels": None}
    with pytest.raises(ValueError, match=r"query.weight \d+ of its groups of 4 have fewer than 2 .* keep_zeros=False"):
        make_trainer(tmp_path, model, **changes).train()
    assert same(before, weights_of(model))
    trainer = make_trainer(tmp_path, model, **changes, keep_zeros=False)
    trainer.train()
    trainer.save_model()
    verify(tmp_path, "2:4")


@pytest.mark.parametrize("method", [METHODS[0], METHODS[2]], ids=lambda method: method["method"])
def test_rows_without_room_beside_the_zeros_are_refused(tmp_path, method):
    model, _ = sparse(0.4)
    with pytest.raises(
        ValueError, match="rows must stay whole, and only 0 have no pruned weight; set keep_zeros=False"
    ):
        make_trainer(tmp_path, model, **method, pattern="channel").train()
    trainer = make_trainer(tmp_path, model, **method, pattern="channel", keep_zeros=False)
    trainer.train()
    trainer.save_model()
    verify(tmp_path)


def test_a_level_between_that_has_no_room_can_be_left_out(tmp_path):
    model = make()
    weight = model.bert.encoder.layer[1].output.dense.weight
    weight.data[3, 4:6] = 0  # one group is 2:4, none is sparser
    changes = {"pattern": "2:4", "sparsity": None}
    with pytest.raises(ValueError, match=r"at sparsity 0.25.*1 of its groups.*0.5 in one level \(num_levels=1\)"):
        make_trainer(tmp_path, model, **changes, num_levels=3).train()
    trainer = make_trainer(tmp_path, model, **changes, num_levels=1)
    trainer.train()
    assert weight[3, 4:6].eq(0).all() and trainer.pruning_state().masks.sparsity() == 0.5


@pytest.mark.parametrize(
    ("method", "first", "then"),
    [(method, NM(2, 4), {"pattern": "1:4", "sparsity": None}) for method in METHODS]
    + [(METHODS[i], Channel(), {"pattern": "channel"}) for i in (0, 2)],
    ids=lambda value: value.get("method") or value["pattern"] if isinstance(value, dict) else "from",
)
def test_a_pattern_is_pruned_further_within_itself(tmp_path, method, first, then):
    model, masks = sparse(0.5, pattern=first)
    trainer = make_trainer(tmp_path, model, **{**method, **then})
    trainer.train()
    trainer.save_model()
    found = verify(tmp_path).masks
    assert found.sparsity() == 0.75 and found.overlap(masks) == 1


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("channel", 0.75)])
def test_a_count_alone_is_no_pattern(tmp_path, pattern, sparsity):
    """`verify` checks the pattern that the state names; a run trains to it, or is refused."""
    trainer = make_trainer(tmp_path, sparsity=sparsity)
    trainer.train()
    trainer.save_model()
    replace(verify(tmp_path), pattern=pattern).save(tmp_path)
    with pytest.raises(ValueError, match=f"weight keeps as many weights as pattern '{pattern}'"):
        verify(tmp_path)
    again = make_trainer(tmp_path, trainer.model, pattern=pattern, sparsity=sparsity, num_levels=1, keep_zeros=False)
    again.train()
    again.save_model()
    verify(tmp_path)


@each_method
def test_zeros_of_a_frozen_weight_stay_in_any_case(tmp_path, method):
    """Nothing could bring them back; other matrices keep what this one lacks."""
    model = frozen_at_zero()
    frozen = model.bert.encoder.layer[0].attention.self.query.weight
    other = model.bert.encoder.layer[1].attention.self.value.weight
    other.data.zero_()
    trainer = make_trainer(tmp_path, model, **method, scope="layer", sparsity=0.5, keep_zeros=False)
    trainer.train()
    trainer.save_model()
    assert verify(tmp_path).masks.sparsity() == 0.5 and not frozen.any() and other.any()
    with pytest.raises(ValueError, match=r"query.weight 256 of its groups .* set requires_grad=True"):
        again = {**method, "pattern": "2:4", "sparsity": None, "num_levels": None, "keep_zeros": False}
        make_trainer(tmp_path, frozen_at_zero(), **again).train()


def test_a_kept_weight_that_stayed_zero_is_told(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    name, weight = next(iter(prunable_weights(trainer.model).items()))
    weight.data.zero_()
    trainer.save_model()
    with pytest.raises(ValueError, match=f"{name} has 0 non-zero weights.*were still zero when they were saved"):
        verify(tmp_path)


def test_an_early_save_of_a_sparse_model_knows_its_zeros(tmp_path):
    model, masks = sparse(0.75)
    trainer = make_trainer(tmp_path, model)
    trainer.save_model()
    assert PruningState.load(tmp_path).masks.digest() == masks.digest()


PARTS = [{"target_modules": ["query", "value"]}, {"exclude_modules": ["key"]}]
each_part = pytest.mark.parametrize("part", PARTS, ids=["target", "exclude"])


@each_part
def test_a_model_pruned_in_part_goes_on_in_part(tmp_path, part):
    first = make_trainer(tmp_path / "first", pack_on_save=True, **part)
    first.train()
    first.save_model()
    model, masks = load_pruned(tmp_path / "first")
    ((field, names),) = part.items()
    assert model.config.pruning[field] == names
    with pytest.raises(ValueError, match=f"pruned with {field}=.*set {field}=.*'{names[-1]}'.* or name all"):
        make_trainer(tmp_path / "second", model, sparsity=masks.sparsity())
    trainer = make_trainer(tmp_path / "second", model, sparsity=masks.sparsity(), **part)
    trainer.train()
    assert trainer.pruning_state().masks.digest() == masks.digest()
    for name in ("pruning_state.safetensors", "model.safetensors"):  # the zeros alone, then the packed file
        (tmp_path / "first" / name).unlink()
        assert load_pruned(tmp_path / "first")[1].digest() == masks.digest()


@pytest.mark.parametrize("names", [["key", "classifier"], [r".*key", r"classifier"]])
def test_what_was_pruned_in_part_may_have_lost_its_head_or_its_weights(tmp_path, names):
    first = make_trainer(tmp_path / "first", exclude_modules=names)
    first.train()
    first.save_model()
    BertModel.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "encoder")
    _, masks = load_pruned(tmp_path / "encoder")
    assert len(masks) == 10 and masks.sparsity() == 0.75
    fresh = BertForSequenceClassification(first.model.config)
    make_trainer(tmp_path / "second", fresh).train()  # dense, whatever its configuration tells


def test_more_of_a_model_pruned_in_part_is_pruned_where_it_is_named(tmp_path):
    first = make_trainer(tmp_path / "first", target_modules=["query"])
    first.train()
    first.save_model()
    model, masks = load_pruned(tmp_path / "first")
    trainer = make_trainer(tmp_path / "second", model, target_modules=[r"bert\.encoder\..*"])
    trainer.train()
    trainer.save_model()
    found = trainer.pruning_state().masks
    assert len(found) == 12 and found.sparsity() == 0.75
    assert all(not (found[name] & ~mask).any() for name, mask in masks.items())
    named = load_pruned(tmp_path / "second")[0].config.pruning["target_modules"]  # plain names, no regex
    assert {f"bert.{name}.weight" for name in named} == found.keys()


def test_what_was_pruned_by_default_says_nothing_of_modules(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.save_model()
    assert not {"target_modules", "exclude_modules"} & trainer.model.config.pruning.keys()
