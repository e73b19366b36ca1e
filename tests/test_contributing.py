"""The examples of CONTRIBUTING.md run as they stand there."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny import METHODS, make, make_trainer, same, weights_of

from hf_maskselect import MaskSet, PruningTrainer, verify
from hf_maskselect.masking.base import Pattern
from hf_maskselect.masking.patterns import PATTERNS
from hf_maskselect.masking.scores import CRITERIA, Criterion
from hf_maskselect.methods.hard import HardMethod

EXAMPLES = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(), re.S)


def test_a_new_score_works_with_scopes_and_search(tmp_path):
    exec(EXAMPLES[0], {"CRITERIA": CRITERIA, "Criterion": Criterion})
    try:
        proposals = ["signed_taylor:global", "signed_taylor:layer:votes"]
        trainer = make_trainer(
            tmp_path, method="random", criterion="signed_taylor", proposals=proposals, trial_steps=1
        )
        trainer.train()
    finally:
        del CRITERIA["signed_taylor"]
    assert MaskSet.from_zeros(trainer.model).sparsity() == 0.75
    assert "signed_taylor:global" in [c.proposal for c in trainer.run.search.history[0].candidates]


@pytest.fixture
def columns():
    """The pattern of the example, known by its name."""
    names = {"dataclass": dataclass, "Pattern": Pattern, "PATTERNS": PATTERNS}
    exec(EXAMPLES[1], names)
    yield names["Columns"]()
    del PATTERNS["columns"]


@pytest.mark.parametrize("shape", [(8, 6), (4, 6, 3, 3)])
def test_a_new_pattern_is_one_class(columns, shape):
    score = torch.rand(shape)
    mask = columns.masks({"w": score}, 0.5)["w"].transpose(0, 1).flatten(1)
    kept, norms = mask.all(1), score.transpose(0, 1).flatten(1).norm(dim=1)
    assert torch.equal(mask.any(1), kept) and int(kept.sum()) == 3
    assert norms[kept].min() > norms[~kept].max()


@pytest.mark.parametrize("method", [METHODS[0], {"method": "fisher"}, METHODS[2]], ids=lambda m: m["method"])
def test_a_new_pattern_trains(tmp_path, columns, method):
    model = make()
    before = weights_of(model)
    trainer = make_trainer(tmp_path, model, **method, pattern="columns", sparsity=0.5)
    trainer.train()
    trainer.save_model()
    masks = verify(tmp_path).masks
    assert masks.sparsity() == 0.5 and masks.reaches(columns, 0.5)
    assert masks.digest() == MaskSet.from_zeros(model).digest()
    after = weights_of(model)
    assert all(not torch.equal(after[name], before[name] * mask) for name, mask in masks.items())


def test_a_new_pattern_resumes_inside_the_soft_phase(tmp_path, columns):
    changes = {**METHODS[2], "pattern": "columns", "sparsity": 0.5}
    whole = make_trainer(tmp_path, **changes, save_strategy="steps", save_steps=4)
    whole.train()
    resumed = make_trainer(tmp_path, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(weights_of(whole.model), weights_of(resumed.model))


def test_a_new_method_is_one_class(tmp_path):
    names = {"HardMethod": HardMethod, "PruningTrainer": PruningTrainer}
    exec(EXAMPLES[2], names)
    model = make()
    before = weights_of(model)
    trainer = make_trainer(tmp_path, model, trainer=names["FrozenTrainer"])
    trainer.train()
    masks = trainer.pruning_state().masks
    assert masks.sparsity() == 0.75
    after = weights_of(model)
    assert all(torch.equal(after[name], before[name] * mask) for name, mask in masks.items())
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])
