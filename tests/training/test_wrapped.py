"""Models that are compiled or wrapped before they are passed in, and models that are assigned later."""

import copy

import pytest
import torch
from tiny import METHODS, losses, make, make_config, make_rows, make_trainer, same, save_pruned, weights_of
from torch import nn
from transformers import AutoModelForSequenceClassification

from hf_maskselect import (
    Distiller,
    MaskSet,
    PruningTrainer,
    permute_channels,
    prunable_weights,
    refit,
    sparsity_report,
    verify,
)
from hf_maskselect.utils.wrappers import plain_model

COMPILED = []


def backend(graph, _):
    """Compiles nothing, and notes that it was asked to."""
    COMPILED.append(graph)
    return graph.forward


def compiled(model):
    return torch.compile(model, backend=backend)


def compiled_inside(model):
    for layer, module in enumerate(model.bert.encoder.layer):
        model.bert.encoder.layer[layer] = torch.compile(module, backend=backend)
    model.bert = torch.compile(model.bert, backend=backend)
    return model


WRAPPERS = [compiled, compiled_inside, nn.DataParallel, lambda model: nn.DataParallel(compiled(model))]
IDS = ["compiled", "inside", "parallel", "both"]
RANDOM = {"method": "random", "num_candidates": 2, "trial_steps": 1, "refit_rows": 16, "num_levels": 1}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    COMPILED.clear()


def batch(rows=8):
    listed = make_rows(rows)
    return {name: torch.stack([row[name] for row in listed]) for name in listed[0]}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("plain"), **RANDOM, max_steps=6)
    trainer.train()
    return losses(trainer), weights_of(trainer.model)


@pytest.mark.parametrize("wrap", [*WRAPPERS[:3], pytest.param(WRAPPERS[3], marks=pytest.mark.slow)], ids=IDS)
def test_a_wrapped_model_trains_as_it_is_and_loads_again(tmp_path, expected, wrap):
    given = wrap(make())
    trainer = make_trainer(tmp_path, given, **RANDOM, max_steps=6)
    trainer.train()
    assert bool(COMPILED) is (wrap is not nn.DataParallel)
    torch.testing.assert_close(losses(trainer), expected[0], rtol=1e-4, atol=1e-5)
    assert weights_of(trainer.model).keys() == expected[1].keys()
    trainer.save_model()
    assert verify(tmp_path).masks.sparsity() == 0.75
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert same(weights_of(loaded), weights_of(trainer.model))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m["method"])
def test_every_method_resumes_with_a_compiled_model(tmp_path, method):
    changes = {**method, "save_strategy": "steps", "save_steps": 6}
    whole = make_trainer(tmp_path, compiled(make()), **changes)
    whole.train()
    resumed = make_trainer(tmp_path, compiled_inside(make()), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for name, tensor in weights_of(whole.model).items():
        torch.testing.assert_close(weights_of(resumed.model)[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_teacher_may_be_wrapped(tmp_path):
    found = []
    for wrap in (lambda model: model, compiled):
        teacher = wrap(make(seed=1))
        trainer = make_trainer(tmp_path, keywords={"teacher": teacher}, max_steps=4)
        trainer.train()
        found.append(losses(trainer))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert COMPILED
    assert Distiller(compiled(make(seed=1)), compiled(make())).teacher.classifier.weight.requires_grad is False


@pytest.mark.slow
def test_model_init_may_return_a_wrapped_model(tmp_path):
    rows = make_rows()
    trainer = PruningTrainer(None, make_config(tmp_path), train_dataset=rows, model_init=lambda: compiled(make()))
    trainer.train()
    assert MaskSet.from_zeros(trainer.model).sparsity() == 0.75
    assert not any("_orig_mod" in name for name in trainer.model.state_dict())


@pytest.mark.parametrize("wrap", WRAPPERS, ids=IDS)
def test_functions_take_a_wrapped_model(tmp_path, wrap):
    plain, _ = save_pruned(tmp_path)
    wrapped = wrap(copy.deepcopy(plain))
    names = list(prunable_weights(plain))
    assert list(prunable_weights(wrapped)) == names
    masks = MaskSet.from_zeros(wrapped)
    assert masks.digest() == MaskSet.from_zeros(plain).digest()
    assert sparsity_report(wrapped) == sparsity_report(plain)
    dense = wrap(make())
    masks.apply_(dense)
    assert MaskSet.from_zeros(dense).digest() == masks.digest()
    assert len(permute_channels(wrap(make()), "2:4").rows) > 0
    dense = wrap(make()).eval()
    before = {name: weight.detach().clone() for name, weight in prunable_weights(dense).items()}
    masks.apply_(dense)
    done = refit(dense, prunable_weights(dense), before, {k: v for k, v in batch(64).items() if k != "labels"})
    assert set(done.refitted) == set(names)


def test_a_plain_model_is_left_alone():
    model = make()
    before = dict(model.named_modules())
    assert plain_model(model) is model and dict(model.named_modules()) == before
    assert plain_model("a path") == "a path" and plain_model(None) is None


@pytest.mark.parametrize("trains_first", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_that_is_assigned_is_the_one_that_is_pruned(tmp_path, trains_first):
    first, second = make(seed=1), make()
    trainer = make_trainer(tmp_path, first)
    if trains_first:
        trainer.train()
    before = weights_of(first)
    trainer.model = second
    trainer.train()
    assert same(before, weights_of(first)) and trainer.model is second
    reference = make_trainer(tmp_path)
    reference.train()
    assert same(weights_of(second), weights_of(reference.model))
