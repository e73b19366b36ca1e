"""The examples of CONTRIBUTING.md run as they stand there."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny import make, make_trainer, weights_of

from hf_maskselect import MaskSet, PruningTrainer
from hf_maskselect.masking.patterns import kept_count
from hf_maskselect.masking.ranking import top_k_masks
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


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_a_new_pattern_is_one_class(sparsity):
    names = {"dataclass": dataclass, "top_k_masks": top_k_masks, "kept_count": kept_count}
    exec(EXAMPLES[1], names)
    score = torch.rand(8, 6)
    mask = names["Rows"]().masks({"w": score}, sparsity)["w"]
    kept = mask.all(1)
    assert torch.equal(mask.any(1), kept) and int(kept.sum()) == 8 * (1 - sparsity)
    assert score.sum(1)[kept].min() > score.sum(1)[~kept].max()


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
