"""Every method trains to blocks, which stay whole from the first cut to the packed file."""

import copy

import pytest
import torch
from test_beyond_encoders import gpt2, pictures, resnet
from tiny import METHODS, losses, make, make_trainer, same, save_pruned, weights_of

from hf_maskselect import MaskSet, load_pruned, pack, prunable_weights, unpack, verify
from hf_maskselect.cli import main
from hf_maskselect.masking.patterns import parse_pattern
from hf_maskselect.methods.gumbel import Gumbel, GumbelOptions
from hf_maskselect.methods.pdp import Pdp

OTHERS = [
    {"method": "taylor", "scope": "global"},
    {"method": "fisher", "scope": "layer"},
    {"method": "random", "num_candidates": 3},
    {"method": "platon"},
    {"method": "obert", "scope": "global"},
]
SAVED = {"save_strategy": "steps", "save_steps": 5}


def named(options):
    return options["method"]


def assert_blocks(trainer, text):
    masks, pattern = trainer.pruning_state().masks, parse_pattern(text)
    assert MaskSet.from_zeros(trainer.model).digest() == masks.digest()
    assert masks.kept == pattern.keeps([mask.shape for mask in masks.values()], trainer.args.sparsity)
    assert all(pattern.holds(mask, trainer.args.sparsity) for mask in masks.values())
    return masks


@pytest.mark.parametrize(
    ("text", "method"),
    [("1x4", METHODS[1]), ("2x8", METHODS[3])]
    + [pytest.param("1x4", method, marks=pytest.mark.slow) for method in (*METHODS[2:], OTHERS[0], OTHERS[2])]
    + [pytest.param("2x8", method, marks=pytest.mark.slow) for method in (METHODS[0], METHODS[2], OTHERS[1])],
    ids=str,
)
def test_a_run_ends_in_blocks_and_resumes_to_the_bit(tmp_path, text, method):
    whole = make_trainer(tmp_path / "whole", **method, **SAVED, pattern=text, sparsity=0.8)
    whole.train()
    masks = assert_blocks(whole, text)
    whole.save_model()
    assert verify(tmp_path / "whole", text).pattern == text
    changes = {**method, **SAVED, "pattern": text, "sparsity": 0.8}
    resumed = make_trainer(tmp_path / "resumed", make(seed=5), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-5"))
    assert losses(whole) == losses(resumed) and same(weights_of(whole.model), weights_of(resumed.model))
    pack(tmp_path / "whole", tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    assert verify(tmp_path / "again", text).masks.digest() == masks.digest()


@pytest.mark.parametrize(
    "method", [METHODS[3], *(pytest.param(m, marks=pytest.mark.slow) for m in (*METHODS[:3], *OTHERS))], ids=named
)
def test_zeros_of_the_start_stay_and_more_follow(tmp_path, method):
    save_pruned(tmp_path / "start", 0.5, "1x4")
    model, masks = load_pruned(tmp_path / "start")
    trainer = make_trainer(tmp_path, copy.deepcopy(model), **{"sparsity": 0.75, **method}, pattern="1x4")
    trainer.train()
    assert assert_blocks(trainer, "1x4").overlap(masks) == 1
    again = make_trainer(tmp_path, model, **{**method, "sparsity": 0.5}, pattern="1x4")
    again.train()
    assert again.pruning_state().masks.digest() == masks.digest()


def test_a_model_with_too_few_whole_blocks_is_refused_before_training(tmp_path):
    save_pruned(tmp_path / "start", 0.5)
    model, _ = load_pruned(tmp_path / "start")
    trainer = make_trainer(tmp_path, model, pattern="1x4")
    with pytest.raises(
        ValueError, match=r": 5632 weights must stay in whole blocks, and only \d+ .* keep_zeros=False"
    ):
        trainer.train()
    trainer = make_trainer(tmp_path, model, pattern="1x4", keep_zeros=False)
    trainer.train()
    assert_blocks(trainer, "1x4")


@pytest.mark.parametrize("method", [METHODS[2], pytest.param(METHODS[3], marks=pytest.mark.slow)], ids=named)
def test_blocks_of_a_convolution_lie_along_its_channels(tmp_path, method):
    trainer = make_trainer(tmp_path, resnet(), pictures(), **{"num_levels": None, **method}, pattern="1x4")
    trainer.train()
    trainer.save_model()
    for mask in verify(tmp_path, "1x4").masks.values():
        blocks = mask.unflatten(1, (-1, 4))
        assert torch.equal(blocks.all(2), blocks.any(2))


def test_what_does_not_fit_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="'1x5' does not fit .*: its 32 columns are no multiple of 5"):
        make_trainer(tmp_path, pattern="1x5")
    with pytest.raises(ValueError, match="c_attn.weight: Conv1D stores its weight transposed"):
        make_trainer(tmp_path, gpt2(), pattern="1x4")
    with pytest.raises(ValueError, match="pattern='1x4' needs gumbel_budget=True"):
        make_trainer(tmp_path, method="gumbel", num_levels=None, pattern="1x4", gumbel_budget=False, sparsity=None)


def test_the_command_checks_blocks(tmp_path, capsys):
    save_pruned(tmp_path / "blocks", 0.75, "1x4")
    save_pruned(tmp_path / "single", 0.75)
    assert main(["verify", str(tmp_path / "blocks"), "--pattern", "1x4"]) == 0
    assert main(["verify", str(tmp_path / "blocks"), "--pattern", "1x2"]) == 0  # whole blocks are whole halves
    assert main(["verify", str(tmp_path / "blocks"), "--pattern", "1x8"]) == 1
    assert main(["verify", str(tmp_path / "single"), "--pattern", "1x4"]) == 1
    said = capsys.readouterr().err
    assert "does not hold the pattern 1x8" in said and "blocks have both zeros and other weights" in said


def gradients(method, pattern):
    """One soft step: the effective weight, and what its gradient becomes."""
    model = make()
    (name, weight), *_ = prunable_weights(model).items()
    method._find_weights = lambda _: {name: weight}
    method.attach(model)
    method.plan = type("Plan", (), {"ramp_at": staticmethod(lambda step: 0.6)})
    method._step, rows = 3, weight.detach().clone()
    method.prepare(3)
    effective = method.effective(name, rows)
    grad = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    carried = grad.clone()
    threshold = method._thresholds[name] if isinstance(method, Pdp) else None
    slope = method._slopes[name].clone() if isinstance(method, Gumbel) else None
    method.carry(name, rows, carried, effective)
    return method, name, rows, effective, grad, carried, threshold, slope


def test_a_block_of_gumbel_has_one_logit_whose_gradient_is_a_sum(tmp_path):
    options = GumbelOptions(1.0, True, True, 3.0, 1.0, False, 0.5, 1e-3, True)
    pattern = parse_pattern("2x4", "global")
    method = Gumbel(lambda _: {}, print, pattern, 0.8, options, lambda step: step)
    method, name, rows, effective, grad, _, _, slope = gradients(method, pattern)
    blocks = effective.unflatten(1, (-1, 4)).unflatten(0, (-1, 2)).transpose(1, 2).flatten(2) != 0
    assert torch.equal(blocks.all(2), blocks.any(2)) and 0 < int(blocks.sum()) < rows.numel()
    expected = (grad * rows).unflatten(1, (-1, 4)).unflatten(0, (-1, 2)).sum((1, 3)).flatten() * slope
    assert torch.allclose(method._learned[name].grad, expected, rtol=1e-5)


def test_a_block_of_pdp_shares_one_soft_mask(tmp_path):
    pattern = parse_pattern("1x4", "global")
    method, name, rows, effective, grad, carried, threshold, _ = gradients(
        Pdp(lambda _: {}, print, pattern, 0.8, 1e-2), pattern
    )
    trained = rows.clone().requires_grad_()
    squares = trained.unflatten(1, (-1, 4)).square().mean(-1, keepdim=True)
    soft = trained.unflatten(1, (-1, 4)) * torch.sigmoid((squares - threshold**2) / 1e-2)
    assert torch.allclose(effective, soft.flatten(1), atol=1e-6)
    soft.flatten(1).backward(grad)
    assert torch.allclose(carried, trained.grad, atol=1e-5)
