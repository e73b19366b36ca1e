"""Models that transformers writes under the names of older files: they are saved as they are named in memory."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import COMMON, METHODS, NO_DROPOUT, make_trainer, same, weights_of
from transformers.utils import SAFE_WEIGHTS_NAME

from hf_maskselect import (
    MaskSet,
    export_semi_structured,
    load_pruned,
    load_semi_structured,
    pack,
    prunable_weights,
    sparsity_report,
    unpack,
    verify,
)

VISION = {name: COMMON[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
VISION |= {"intermediate_size": 64, "image_size": 8, "patch_size": 4, "num_channels": 1}
TEXT = {**COMMON, **NO_DROPOUT, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "NomicBertForSequenceClassification": TEXT,
    "GteForSequenceClassification": TEXT,
    "JinaEmbeddingsV3ForSequenceClassification": TEXT,
    "ViTForImageClassification": VISION,
    "BeitForImageClassification": VISION,
    "Dinov2ForImageClassification": VISION,
    "SwinForImageClassification": {
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 2],
        "window_size": 2,
        **{name: VISION[name] for name in ("image_size", "num_channels")},
        "patch_size": 2,
    },
}
SOME = ("NomicBertForSequenceClassification", "ViTForImageClassification", "SwinForImageClassification")
each_model = pytest.mark.parametrize("name", MODELS, ids=lambda name: name.partition("For")[0])


some_models = pytest.mark.parametrize("name", SOME, ids=lambda name: name.partition("For")[0])


def build(name, seed=0):
    torch.manual_seed(seed)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**MODELS[name], initializer_range=0.2)).train()


def rows(model, count=96):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (count,), generator=generator)
    if model.main_input_name == "pixel_values":
        inputs = torch.randn(count, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1)
    else:
        inputs = torch.randint(3, 64, (count, 8), generator=generator)
    return [{model.main_input_name: row, "labels": label} for row, label in zip(inputs, labels, strict=True)]


def trainer_of(folder, model, **changes):
    return make_trainer(folder, model, rows(model), **changes)


@each_model
def test_it_is_written_under_its_own_names_and_read_plainly(tmp_path, name):
    model = build(name)
    model.save_pretrained(tmp_path / "theirs")
    assert not prunable_weights(model).keys() <= load_file(tmp_path / "theirs" / SAFE_WEIGHTS_NAME).keys()
    trainer = trainer_of(tmp_path / "ours", model)
    trainer.train()
    trainer.save_model()
    assert prunable_weights(model).keys() <= load_file(tmp_path / "ours" / SAFE_WEIGHTS_NAME).keys()
    assert verify(tmp_path / "ours").masks.digest() == MaskSet.from_zeros(model).digest()
    again = type(model).from_pretrained(tmp_path / "ours")
    assert same(weights_of(again), weights_of(model))
    assert sparsity_report(tmp_path / "ours").sparsity == sparsity_report(model).sparsity == 0.75
    again.save_pretrained(tmp_path / "once more")  # plainly, under whichever names
    assert MaskSet.from_zeros(type(model).from_pretrained(tmp_path / "once more")).sparsity() == 0.75


@pytest.mark.parametrize(
    ("name", "method"),
    [pytest.param(name, METHODS[1], marks=[pytest.mark.slow] * ("Swin" in name or "Nomic" in name)) for name in SOME]
    + [("ViTForImageClassification", method) for method in METHODS[2:]],
    ids=lambda value: value.partition("For")[0] if isinstance(value, str) else value["method"],
)
def test_it_resumes_to_the_bit(tmp_path, name, method):
    saving = {"save_strategy": "steps", "save_steps": 6, **method}
    whole = trainer_of(tmp_path / "whole", build(name), **saving)
    whole.train()
    resumed = trainer_of(tmp_path / "again", build(name, seed=3), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert same(weights_of(whole.model), weights_of(resumed.model))


@some_models
def test_its_best_weights_come_back(tmp_path, name):
    trainer = trainer_of(
        tmp_path,
        build(name),
        metric_for_best_model="loss",
        greater_is_better=True,  # so that it does not end best
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        num_levels=1,
    )
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/{SAFE_WEIGHTS_NAME}")
    assert trainer.state.best_global_step < 12
    assert all(torch.equal(tensor, weights_of(trainer.model)[name]) for name, tensor in best.items())


@some_models
def test_it_is_packed_and_exported(tmp_path, name):
    model = build(name)
    trainer = trainer_of(tmp_path / "pruned", model, pattern="2:4", sparsity=None)
    trainer.train()
    trainer.save_model()
    pack(tmp_path / "pruned", tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    for folder in ("pruned", "packed", "unpacked"):
        loaded, masks = load_pruned(tmp_path / folder)
        assert same(weights_of(loaded), weights_of(model))
        assert masks.digest() == MaskSet.from_zeros(model).digest()
    verify(tmp_path / "unpacked", "2:4")
    weights = {n: w.detach().bfloat16() for n, w in prunable_weights(model).items()}
    for source, folder in ((tmp_path / "pruned", "of a folder"), (model, "of a model")):
        export_semi_structured(source, tmp_path / folder)
        exported = load_semi_structured(tmp_path / folder)
        assert all(torch.equal(exported.get_parameter(n), w) for n, w in weights.items())


@some_models
def test_one_that_others_saved_goes_on(tmp_path, name):
    model = build(name)
    scores = {n: weight.detach().abs() for n, weight in prunable_weights(model).items()}
    masks = MaskSet({n: score > score.median() for n, score in scores.items()})
    masks.apply_(model)
    model.save_pretrained(tmp_path / "theirs")
    loaded, found = load_pruned(tmp_path / "theirs")
    assert found.digest() == masks.digest()
    trainer = trainer_of(tmp_path / "ours", loaded.train())
    trainer.train()
    trainer.save_model()
    assert verify(tmp_path / "ours").masks.overlap(masks) == 1


@some_models
def test_a_file_under_older_names_is_told_from_one_of_another_model(tmp_path, name):
    model = build(name)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is prunable but not saved: .* names of older files.*save_original_format"):
        sparsity_report(tmp_path)
    with pytest.raises(ValueError, match="is prunable but not saved"):
        export_semi_structured(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    type(model).from_pretrained(tmp_path).save_pretrained(tmp_path / "again", save_original_format=False)
    found = sparsity_report(tmp_path / "again").tensors
    assert sorted(found, key=repr) == sorted(sparsity_report(model).tensors, key=repr)
