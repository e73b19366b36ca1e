"""Convolutions and transposed linear layers go through the same trainer."""

import pytest
import torch
import transformers
from tiny import make_trainer

from hf_maskselect import MaskSet, prunable_weights, verify

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_channels": 1}


def resnet():
    torch.manual_seed(0)
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**RESNET, num_labels=2)).train()


def pictures(count=96):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (count,), generator=generator)
    images = torch.randn(count, 1, 16, 16, generator=generator) + labels.view(-1, 1, 1, 1)
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def test_the_stages_of_a_resnet_are_chosen():
    names = list(prunable_weights(resnet()))
    assert all(name.startswith("resnet.encoder.stages.") and name.endswith("convolution.weight") for name in names)
    assert len(names) == 5  # two a layer and one shortcut


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "pdp", "pattern": "1:4", "sparsity": None},
        {"method": "pdp", "pattern": "channel", "sparsity": 0.5},
        {"method": "pdp"},
        {"method": "gumbel"},
        {"method": "gumbel", "pattern": "2:4", "sparsity": None},
        {"method": "gumbel", "gumbel_untrained": True, "sparsity": None, "gumbel_learning_rate": 1.0},
        {"method": "magnitude", "pattern": "channel", "sparsity": 0.5},
        {"method": "random", "pattern": "1:4", "sparsity": None, "trial_steps": 1},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_a_resnet_is_pruned(tmp_path, changes):
    trainer = make_trainer(tmp_path, resnet(), pictures(), **{"num_levels": None, **changes})
    trainer.train()
    trainer.save_model()
    state = verify(tmp_path)
    assert MaskSet.from_zeros(trainer.model).digest() == state.masks.digest()
    if changes.get("pattern") == "1:4":
        assert all((mask.movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1) == 1).all() for mask in state.masks.values())


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=16, pad_token_id=0)
    return transformers.GPT2ForSequenceClassification(config).train()


def test_transposed_layers_are_pruned_one_weight_at_a_time(tmp_path):
    names = prunable_weights(gpt2())
    assert {name.split(".", 3)[3] for name in names} == {
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    }
    trainer = make_trainer(tmp_path, gpt2(), method="pdp", num_levels=None)
    trainer.train()
    assert MaskSet.from_zeros(trainer.model).sparsity() == 0.75
    for changes in ({"pattern": "2:4", "sparsity": None}, {"pattern": "channel"}):
        with pytest.raises(ValueError, match="c_attn.weight: Conv1D stores its weight transposed"):
            make_trainer(tmp_path, gpt2(), method="pdp", num_levels=None, **changes)
