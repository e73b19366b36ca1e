"""Weights in another memory order than row-major train, save and resume as row-major ones do."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import METHODS, losses, make, make_trainer, weights_of
from torch import nn
from transformers import AutoModelForSequenceClassification

from hf_maskselect import MaskSet, load_pruned, prunable_weights
from hf_maskselect.masking.patterns import parse_pattern
from hf_maskselect.masking.ranking import top_k_masks
from hf_maskselect.methods.boundary import Boundary

OPTIMIZERS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "plain": {"foreach": False}}


class Net(nn.Module):
    """Two convolutions and a linear layer that are prunable, and a head; in double precision."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            [nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8 * 16, 16)]
        )
        self.head = nn.Linear(16, 2)
        self.double().train()

    def forward(self, pixel_values, labels=None):
        hidden = self.layers[1](self.layers[0](pixel_values.double()).relu()).relu()
        logits = self.head(self.layers[2](hidden.flatten(1)).relu())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def relaid(model, layout):
    """The model with its prunable weights in another order in memory."""
    for module in model.layers:
        weight = module.weight.data
        if layout == "other" and weight.dim() == 4:
            weight = weight.contiguous(memory_format=torch.channels_last)
        elif layout == "other":
            weight = weight.t().contiguous().t()
        elif layout == "gaps":
            weight = torch.stack([weight, weight], -1)[..., 0]
        module.weight = nn.Parameter(weight)
        assert module.weight.is_contiguous() == (layout == "rows")
    return model


def pictures(count=64):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (count,), generator=generator)
    images = torch.randn(count, 4, 4, 4, generator=generator) + 0.5 * labels.view(-1, 1, 1, 1)
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def run(folder, layout, optimizer="fused", resume=None, start="rows", **changes):
    options = {"lr": 1e-2, "weight_decay": 0.01, **OPTIMIZERS[optimizer]}
    keywords = {"optimizer_cls_and_kwargs": (torch.optim.AdamW, options)}
    changes = {"learning_rate": 1e-2, **changes}
    trainer = make_trainer(folder, relaid(Net(), layout), pictures(), keywords=keywords, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_alike(first, second):
    """Losses and weights within float noise, masks equal."""
    assert losses(first) == pytest.approx(losses(second), rel=1e-6)
    assert first.pruning_state().masks.digest() == second.pruning_state().masks.digest()
    for (name, one), other in zip(weights_of(first.model).items(), weights_of(second.model).values(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-8), name


def named(options):
    return "-".join(str(options[field]) for field in ("method", "pattern") if field in options)


PATTERNS = [
    {"method": "pdp", "pattern": "2:4", "sparsity": None, "num_levels": None},
    {"method": "gumbel", "pattern": "2:4", "sparsity": None, "num_levels": None},
    {"method": "pdp", "pattern": "channel", "sparsity": 0.5, "num_levels": None},
    {"method": "fisher", "pattern": "channel", "sparsity": 0.5},
    {"method": "random", "scope": "global", "criterion": "taylor", "num_candidates": 2, "trial_steps": 0},
]


@pytest.fixture(scope="module")
def row_major(tmp_path_factory):
    """(method, optimizer) -> the trainer of a run with row-major weights; trained once."""
    trained = {}

    def of(method, optimizer):
        key = (str(method), optimizer)
        if key not in trained:
            trained[key] = run(tmp_path_factory.mktemp("rows"), "rows", optimizer, **method)
        return trained[key]

    return of


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_a_fused_optimizer_trains_them_alike(tmp_path, row_major, method):
    assert_alike(row_major(method, "fused"), run(tmp_path, "other", **method))


# Every method in both layouts, and every optimizer in both, but not each method with each optimizer.
TRIED = [
    pytest.param(method, layout, list(OPTIMIZERS)[(number + turn) % 3], id=f"{named(method)}-{layout}-{number}")
    for turn, layout in enumerate(("other", "gaps"), start=1)
    for number, method in enumerate([*METHODS, *PATTERNS])
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "layout", "optimizer"), TRIED)
def test_every_optimizer_trains_them_alike(tmp_path, row_major, method, layout, optimizer):
    assert_alike(row_major(method, optimizer), run(tmp_path, layout, optimizer, **method))


@pytest.mark.parametrize("method", METHODS[2:], ids=named)
def test_gradients_and_moments_lie_as_their_tensors(tmp_path, method):
    trainer = make_trainer(tmp_path, relaid(Net(), "other"), pictures(), **method)
    seen = []

    def look(optimizer, *_):
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if parameter.grad is not None:
                assert parameter.grad.stride() == parameter.stride()
                seen.append(parameter.stride())

    trainer.create_optimizer().register_step_pre_hook(look)
    trainer.train()
    for parameter, state in trainer.optimizer.state.items():
        assert state["exp_avg"].stride() == parameter.stride()
    assert len(set(seen)) > 3
    assert not trainer.model.layers[0].weight.is_contiguous()  # the user's choice stays


@pytest.mark.parametrize("method", [pytest.param(METHODS[2], marks=pytest.mark.slow), METHODS[3]], ids=named)
def test_they_are_saved_and_resumed_across_layouts(tmp_path, row_major, method):
    whole = row_major(method, "fused")
    saved = {"save_strategy": "steps", "save_steps": 5}
    run(tmp_path / "a", "other", **{**method, **saved})
    resumed = run(tmp_path / "b", "rows", resume=str(tmp_path / "a/checkpoint-5"), **{**method, **saved})
    assert_alike(whole, resumed)
    resumed.save_model()
    file = load_file(tmp_path / "b/model.safetensors")
    assert all(torch.equal(file[name], tensor) for name, tensor in weights_of(resumed.model).items())
    assert MaskSet.load(tmp_path / "b/pruning_state.safetensors")[0].digest() == whole.pruning_state().masks.digest()


@pytest.mark.parametrize("method", [METHODS[2], pytest.param(METHODS[3], marks=pytest.mark.slow)], ids=named)
def test_a_transposed_transformer_goes_the_round_trip(tmp_path, method):
    model = make()
    for weight in prunable_weights(model).values():
        weight.data = weight.data.t().contiguous().t()
    trainer = make_trainer(tmp_path, model, optim="adamw_torch_fused", **method)
    trainer.train()
    trainer.save_model()
    own = weights_of(trainer.model)
    for loaded in (load_pruned(tmp_path)[0], AutoModelForSequenceClassification.from_pretrained(tmp_path)):
        assert all(torch.equal(own[name], tensor) for name, tensor in weights_of(loaded).items())


def layouts(tensor):
    """The same values in every order of the axes, with and without gaps."""
    for axes in ((0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0), (1, 0, 3, 2)):
        back = [axes.index(axis) for axis in range(4)]
        yield tensor.permute(axes).contiguous().permute(back)
        yield torch.stack([tensor, tensor], -1)[..., 0].permute(axes).permute(back)


def test_ranks_among_equal_values_do_not_depend_on_strides():
    values = torch.randint(4, (8, 4, 2, 2), generator=torch.Generator().manual_seed(0)).float()
    expected, patterns = top_k_masks([values, values], 100), [parse_pattern(p) for p in ("2:4", "channel")]
    for same in layouts(values):
        assert all(map(torch.equal, top_k_masks([same, same], 100), expected))
        assert Boundary().find(same, 40) == Boundary().find(values, 40)
        for pattern in patterns:
            masks, wanted = pattern.masks({"w": same}, 0.5)["w"], pattern.masks({"w": values}, 0.5)["w"]
            assert torch.equal(masks, wanted)
            assert torch.equal(pattern.unit_sizes(same), pattern.unit_sizes(values))
            assert MaskSet({"w": masks}).digest() == MaskSet({"w": wanted}).digest()
