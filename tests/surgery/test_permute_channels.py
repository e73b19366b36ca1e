"""Moving channels changes no output; training on the moved model ends in the pattern."""

import copy

import pytest
import torch
from tiny import FAMILIES, make, make_trainer, same, weights_of
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from hf_maskselect import permute_channels, prunable_weights, verify
from hf_maskselect.masking.patterns import NM
from hf_maskselect.surgery.permute_channels import COUPLINGS, couplings_of


def logits(model):
    ids = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=mask).logits


def with_biases(family):
    model = make(family)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_the_function_is_the_same_and_more_magnitude_is_kept(family, pattern):
    model = with_biases(family)
    before, weights, names = logits(model), copy.deepcopy(weights_of(model)), list(prunable_weights(model))
    report = permute_channels(model, pattern)
    assert torch.allclose(logits(model), before, rtol=1e-4, atol=1e-5)
    assert len(report.rows) == 2 * len(COUPLINGS[model.config.model_type]) // (2 if family == "Albert" else 1)
    assert all(after >= old for _, old, after in report.rows) and report.mean_gain > 0.005
    moved = {name for name, weight in weights_of(model).items() if not torch.equal(weight, weights[name])}
    assert {name for name, *_ in report.rows} <= moved <= {*names, *(n.replace(".weight", ".bias") for n in names)}


def test_only_what_will_be_pruned_moves():
    model = make()
    names = [name for name in prunable_weights(model) if "layer.1.output" in name]
    report = permute_channels(model, "2:4", names)
    assert [name for name, *_ in report.rows] == names
    with pytest.raises(ValueError, match="none of the matrices to prune is a plain linear layer that reads"):
        couplings_of(model, NM(2, 4), ["bert.encoder.layer.0.attention.self.query.weight"])


def test_what_cannot_move_alone_stays():
    """Heads whose channels make no whole groups, and layers with an adapter, whose own weights would have to move."""
    odd = make(hidden_size=36, num_attention_heads=6)
    assert all("attention" not in name for name, *_ in permute_channels(odd).rows)
    peft = pytest.importorskip("peft")
    model = with_biases("Bert")
    model.add_adapter(peft.LoraConfig(target_modules=["value", "intermediate.dense"], init_lora_weights=False))
    before = logits(model)
    with pytest.raises(ValueError, match="none of the matrices to prune is a plain linear layer"):
        permute_channels(model)
    assert torch.equal(logits(model), before)


def test_a_single_zero_does_not_keep_channels_from_moving():
    model = make()
    model.bert.encoder.layer[0].output.dense.weight.data[0, 0] = 0
    assert permute_channels(model, "2:4").mean_gain > 0.005


def test_nothing_to_gain_is_no_error():
    model = make()
    for weight in prunable_weights(model).values():
        weight.data.zero_()
    assert permute_channels(model).rows == () and permute_channels(model).mean_gain == 0


def test_models_that_are_not_known_are_refused():
    model = GPT2ForSequenceClassification(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, pad_token_id=0))
    with pytest.raises(ValueError, match="the channels of a 'gpt2' model are not known to be free to move"):
        permute_channels(model)
    with pytest.raises(ValueError, match="'Linear' model"):
        permute_channels(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="pattern='channel' has no groups"):
        permute_channels(make(), "channel")


def permuted(seed=0):
    model = make(seed=seed)
    permute_channels(model, "2:4")
    return model


@pytest.mark.parametrize(
    "method", ["random", *(pytest.param(name, marks=pytest.mark.slow) for name in ("magnitude", "pdp", "gumbel"))]
)
def test_a_permuted_model_ends_in_the_pattern_and_resumes_to_the_bit(tmp_path, method):
    changes = {"method": method, "pattern": "2:4", "sparsity": None}
    changes |= {"num_levels": None, "save_strategy": "steps", "save_steps": 6}
    whole = make_trainer(tmp_path / "a", permuted(), **changes)
    whole.train()
    whole.save_model()
    assert verify(tmp_path / "a", "2:4").masks.sparsity() == 0.5
    resumed = make_trainer(tmp_path / "b", make(seed=5), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert same(weights_of(whole.model), weights_of(resumed.model))
    plain = make_trainer(tmp_path / "c", **changes)
    plain.train()
    assert not same(weights_of(whole.model), weights_of(plain.model))


def test_a_model_in_the_pattern_keeps_its_order(tmp_path):
    trainer = make_trainer(tmp_path, permuted(), pattern="2:4", sparsity=None, num_levels=None)
    trainer.train()
    before = copy.deepcopy(weights_of(trainer.model))
    assert permute_channels(trainer.model, "2:4").mean_gain == 0
    assert same(weights_of(trainer.model), before)
