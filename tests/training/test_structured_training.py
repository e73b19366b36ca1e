"""A trainer that makes its model smaller and goes on with an ordinary one."""

import copy
import json

import pytest
import torch
import transformers
from tiny import losses, make, make_rows, make_trainer, same, weights_of

from hf_maskselect import verify
from hf_maskselect.cli import main
from hf_maskselect.storage.verify import check_smaller
from hf_maskselect.surgery.structured.record import StructureRecord


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("hf_maskselect.surgery.structured.latency._SECONDS", 0.0)


def deep(**changes):
    return make(num_hidden_layers=4, **changes)


def trainer_of(folder, model=None, **changes):
    given = {"pattern": "structured", "method": "random", "sparsity": 0.5, "num_levels": None, "num_candidates": 3}
    given |= {"latency_shape": [1, 8], "refit_rows": 32, "criterion_batches": 64}
    return make_trainer(folder, deep() if model is None else model, **given | changes)


def removed(before, after):
    def size(model):
        return sum(p.numel() for layer in model.bert.encoder.layer for p in layer.parameters())

    return 1 - size(after) / size(before)


def test_the_model_is_smaller_before_training_and_reloads_plainly(tmp_path, capsys):
    model = deep()
    dense = copy.deepcopy(model)
    trainer = trainer_of(tmp_path, model, num_candidates=6)
    trainer.train()
    assert trainer.model is model and 0.5 <= removed(dense, model) < 0.6
    assert len(losses(trainer)) == 12
    assert {id(p) for group in trainer.optimizer.param_groups for p in group["params"]} == set(
        map(id, model.parameters())
    )
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert same(weights_of(loaded), weights_of(model))
    record = StructureRecord.find(loaded.config)
    assert len(record.shape.layers) == loaded.config.num_hidden_layers and len(record.dense.layers) == 4
    assert record.shape.width == loaded.config.intermediate_size
    assert record.removed == pytest.approx(removed(dense, model))
    card = (tmp_path / "README.md").read_text()
    assert f"{record.removed:.1%} of the parameters of the layers are gone" in card
    assert f"| layers | 4 | {len(record.shape.layers)} |" in card and "zeros are stored" not in card
    assert main(["report", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert f"after:  {record.shape}" in told and "all prunable weights" not in told


@pytest.mark.slow
def test_verify_reloads_in_a_fresh_process(tmp_path, capsys):
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.save_model()
    assert verify(tmp_path).pattern == "structured"
    assert main(["verify", str(tmp_path)]) == 0
    assert "a fresh process loads it with the same outputs" in capsys.readouterr().out
    content = json.loads((tmp_path / "config.json").read_text())
    content["pruning"]["structure"]["shape"]["widths"][0] += 8
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="but its record tells of"):
        check_smaller(tmp_path)


def test_the_plan_counts_shapes(tmp_path, capsys):
    make(num_hidden_layers=4).save_pretrained(tmp_path)
    command = ["plan", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--pattern", "structured"]
    command += ["--max_steps", "100", "--train_rows", "4000", "--latency_shape", "8", "32", "--refit_rows", "900"]
    assert main([*command, "--target_speedup", "2", "--num_candidates", "5"]) == 0
    told = capsys.readouterr().out
    assert "shapes tried at each level: 5" in told
    rows = 5 * (8192 / 32 / 2 + 8192 / 32 / 3) + 900 / 2 + 400 / 3
    assert f"{rows / 8:.0f}" in told


def test_training_begins_from_the_fitted_model(tmp_path):
    model = deep()
    ids = make_rows(8)[0]["input_ids"][None]
    before = model.eval()(ids).logits.detach()
    trainer = trainer_of(tmp_path, model.train(), sparsity=0.05, learning_rate=1e-12)
    trainer.train()
    assert not torch.equal(before, model.eval()(ids).logits)
    assert torch.allclose(before, model(ids).logits, atol=0.2 * float(before.abs().max()))


def test_levels_shrink_the_model_again_and_the_optimizer_follows(tmp_path):
    model = deep()
    dense = copy.deepcopy(model)
    trainer = trainer_of(tmp_path, model, levels=[0.3, 0.6], sparsity=0.6, max_grad_norm=0.0)
    trainer.train()
    assert 0.6 <= removed(dense, model) < 0.7
    shares = [entry["structure_layers_removed"] for entry in trainer.state.log_history if "structure_speedup" in entry]
    assert len(shares) == 2 and 1 - (1 - shares[0]) * (1 - shares[1]) == pytest.approx(removed(dense, model))
    record = StructureRecord.find(model.config)
    assert set(record.shape.layers) <= set(range(4)) and record.removed == pytest.approx(removed(dense, model))
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == set(map(id, model.parameters()))
    assert all(p in trainer.optimizer.state for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("levels", [None, [0.3, 0.6]], ids=["one level", "two levels"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, levels):
    options = {"sparsity": 0.6, "levels": levels, "save_strategy": "steps", "save_steps": 5}
    whole = trainer_of(tmp_path / "whole", **options)
    whole.train()
    resumed = trainer_of(tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert same(weights_of(whole.model), weights_of(resumed.model))
    assert StructureRecord.find(resumed.model.config).shape == StructureRecord.find(whole.model.config).shape


def test_a_search_that_was_killed_keeps_its_choice(tmp_path, monkeypatch):
    from hf_maskselect.surgery.structured import job

    fitted, calls = job.ShapeJob._fitted, []

    def counted(self, shape, calls_of):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(shape)
        return fitted(self, shape, calls_of)

    with monkeypatch.context() as context:
        context.setattr(job.ShapeJob, "_fitted", counted)
        with pytest.raises(KeyboardInterrupt):
            trainer_of(tmp_path, num_candidates=4).train()
    assert len(calls) == 2
    again = []
    monkeypatch.setattr(job.ShapeJob, "_fitted", lambda *args: again.append(args[1]) or fitted(*args))
    trainer = trainer_of(tmp_path, num_candidates=4)
    trainer.train()
    assert not set(calls) & set(again[:-1])  # the last one is the fit of the choice
    whole = trainer_of(tmp_path / "whole", num_candidates=4)
    whole.train()
    assert StructureRecord.find(whole.model.config).shape == StructureRecord.find(trainer.model.config).shape
    assert same(weights_of(whole.model), weights_of(trainer.model))


def test_a_teacher_teaches_the_layers_that_stay(tmp_path):
    model = deep()
    teacher = copy.deepcopy(model)
    trainer = trainer_of(tmp_path, model, keywords={"teacher": teacher}, learning_rate=0.0)
    trainer.train()
    kept = StructureRecord.find(model.config).shape.layers
    batch = {name: torch.stack([row[name] for row in make_rows(4)]) for name in ("input_ids", "attention_mask")}
    ours = model(**batch, output_hidden_states=True).hidden_states
    theirs = teacher(**batch, output_hidden_states=True).hidden_states
    outputs = model(**batch, output_hidden_states=True)
    hidden = sum(
        torch.nn.functional.mse_loss(a, theirs[i]) for a, i in zip(ours, [0, *(k + 1 for k in kept)], strict=True)
    )
    logits = -(teacher(**batch).logits.softmax(-1) * outputs.logits.log_softmax(-1)).mean()
    torch.testing.assert_close(trainer.distiller.loss(batch, outputs, None), hidden + logits, rtol=1e-4, atol=1e-5)


def test_a_second_run_goes_on_from_the_shape(tmp_path):
    trainer = trainer_of(tmp_path / "first")
    trainer.train()
    trainer.save_model()
    shape = StructureRecord.find(trainer.model.config).shape
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "first")
    again = trainer_of(tmp_path / "second", loaded)
    again.train()
    assert StructureRecord.find(loaded.config).shape == shape
    further = trainer_of(tmp_path / "third", loaded, sparsity=0.7)
    further.train()
    record = StructureRecord.find(loaded.config)
    assert record.removed >= 0.7 and len(record.dense.layers) == 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "pdp"}, "method='pdp' has no meaning with pattern='structured'"),
        ({"keep_zeros": False}, "keep_zeros=False has no meaning with pattern='structured'"),
        ({"target_speedup": 2.0}, "needs target_speedup, such as 2.0, or sparsity, such as 0.5, and not both"),
        ({"pattern": "unstructured", "target_speedup": 2.0}, "target_speedup=2.0 has no meaning with"),
        ({"levels": [0.5, 0.4]}, "must be strictly increasing"),
        ({"sparsity": 0.9999}, "sparsity=0.9999 is reached by no shape"),
        ({"sparsity": 0.9999, "levels": [0.3, 0.9999]}, "sparsity=0.9999 is reached by no shape"),
        ({"refit_rows": 4}, "refit_rows=4 are too few rows to fit a smaller model: give at least 8"),
        ({"latency_device": "meta"}, "latency_device='meta' is no device of this machine"),
        ({"latency_shape": [1, 1000]}, "latency_shape has length 1000, but the model has 64 positions"),
    ],
)
def test_what_does_not_go_together(tmp_path, options, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        trainer_of(tmp_path, **options).train()


@pytest.mark.parametrize("options", [{"levels": [0.3, 0.5]}, {"pruning_warmup_steps": 2}], ids=["levels", "warm-up"])
def test_later_levels_do_not_go_with_a_compiled_model(tmp_path, options):
    with pytest.raises(ValueError, match="with torch_compile=True can only shrink before the first step"):
        trainer_of(tmp_path, torch_compile=True, **options)


def test_the_model_shrinks_after_dense_steps(tmp_path):
    model = deep()
    dense = copy.deepcopy(model)
    trainer = trainer_of(tmp_path, model, pruning_warmup_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    assert 0.5 <= removed(dense, model) < 0.6 and len(losses(trainer)) == 12
    again = trainer_of(tmp_path, deep(), pruning_warmup_steps=4, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights_of(again.model), weights_of(model))


def test_mixed_precision_and_level_evaluation(tmp_path):
    model = deep()
    dense = copy.deepcopy(model)
    trainer = trainer_of(tmp_path, model, levels=[0.3, 0.5], bf16=True, level_eval_steps=2)
    trainer.train()
    assert 0.5 <= removed(dense, model) < 0.6
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_refused_resume_leaves_the_model_as_it_was(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5}
    trainer_of(tmp_path, **options).train()
    model = deep()
    before, layers = weights_of(model), model.config.num_hidden_layers
    trainer = trainer_of(tmp_path, model, keywords={"teacher": deep(seed=1)}, **options)
    with pytest.raises(ValueError, match="was written with another teacher, or with none"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert same(before, weights_of(model)) and model.config.num_hidden_layers == layers
    assert StructureRecord.find(model.config) is None
    trainer.train()  # the layers that the teacher teaches are those of the new search
    assert StructureRecord.find(model.config) is not None


def test_a_run_from_a_small_enough_model_resumes(tmp_path):
    first = trainer_of(tmp_path / "first")
    first.train()
    options = {"sparsity": 0.45, "save_strategy": "steps", "save_steps": 5}
    trainer_of(tmp_path / "second", copy.deepcopy(first.model), **options).train()
    again = trainer_of(tmp_path / "second", copy.deepcopy(first.model), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-5"))
    assert again.state.global_step == 12


def test_a_speedup_is_recorded_and_a_missed_one_is_told(tmp_path, monkeypatch):
    def told(jobs, *_):
        return {name: {"dense": 1.0, "small": 0.99}.get(name, 0.5) for name in jobs}

    monkeypatch.setattr("hf_maskselect.surgery.structured.latency.least_seconds", told)
    model = deep()
    with pytest.warns(UserWarning, match=r"speedup=1.5 was not reached: measured 1\.01"):
        trainer_of(tmp_path, model, sparsity=None, target_speedup=1.5).train()
    record = StructureRecord.find(model.config)
    assert record.speedup == pytest.approx(1 / 0.99) and record.target == "speedup=1.5"


def test_a_deeper_teacher_teaches_the_layers_that_stay(tmp_path):
    model, teacher = deep(), make(num_hidden_layers=8, seed=1)
    trainer = trainer_of(tmp_path, model, keywords={"teacher": teacher})
    trainer.train()
    kept = StructureRecord.find(model.config).shape.layers
    assert trainer.distiller._layers == tuple(2 * layer + 1 for layer in kept)


@pytest.mark.parametrize("family", ["DistilBert", "Electra", "ModernBert", "Albert"])
def test_other_families_train(tmp_path, family):
    model = make(family, **({"n_layers": 4} if family == "DistilBert" else {"num_hidden_layers": 4}))
    trainer = trainer_of(tmp_path, model, sparsity=0.3)
    trainer.train()
    trainer.save_model()
    loaded = type(model).from_pretrained(tmp_path)
    assert same(weights_of(loaded), weights_of(model)) and StructureRecord.find(loaded.config).removed >= 0.3


def test_a_tied_head_and_frozen_embeddings_stay(tmp_path):
    model = make(head="ForMaskedLM", num_hidden_layers=4)
    embeddings = model.get_input_embeddings()
    embeddings.weight.requires_grad_(False)
    rows = [{**row, "labels": row["input_ids"]} for row in make_rows()]
    trainer = trainer_of(tmp_path, model, rows=rows)
    trainer.train()
    assert model.get_input_embeddings() is embeddings and not embeddings.weight.requires_grad
    assert model.cls.predictions.decoder.weight is embeddings.weight


def test_noise_on_embeddings_ends_with_the_training(tmp_path):
    trainer = trainer_of(tmp_path, neftune_noise_alpha=5.0)
    trainer.train()
    trainer.model.train()
    ids = make_rows(8)[0]["input_ids"][None]
    assert torch.equal(trainer.model(ids).logits, trainer.model(ids).logits)


@pytest.mark.parametrize(
    "name, value",
    [
        ("speedup", 0.0),
        ("removed", 1.0),
        ("milliseconds", [1.0, float("nan")]),
        ("timed_shape", [1 << 40]),
        ("shape", {"layers": [0, 9], "widths": [8, 8], "heads": [1, 1]}),
        ("shape", {"layers": [1, 0], "widths": [8, 8], "heads": [1, 1]}),
        ("shape", {"layers": [1], "widths": [8], "heads": [1]}),
    ],
)
def test_a_record_that_cannot_be_is_refused(name, value):
    config = copy.deepcopy(make(num_hidden_layers=2).config)
    shape = {"layers": [0, 1], "widths": [64, 64], "heads": [2, 2]}
    record = {"dense": shape, "shape": shape, "target": "speedup=2.0", "speedup": 2.0, "removed": 0.5}
    record |= {"divergence": 0.1, "milliseconds": [2.0, 1.0], "timed": "8 x 128", "timed_shape": [8, 128]}
    record |= {"seconds": 1.0}
    config.pruning = {"structure": record}
    assert StructureRecord.find(config).speedup == 2.0
    config.pruning = {"structure": record | {name: value}}
    with pytest.raises(ValueError, match="config.pruning: structure"):
        StructureRecord.find(config)


def test_an_optimizer_of_the_dense_model_is_refused(tmp_path):
    model = deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = trainer_of(tmp_path, model, keywords={"optimizers": (optimizer, None)})
    with pytest.raises(ValueError, match="SGD with the parameters of the dense model"):
        trainer.train()


def test_another_target_does_not_resume(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5}
    trainer_of(tmp_path, **options).train()
    with pytest.raises(ValueError, match="was written with sparsity=0.5 at level 1, but this run has sparsity=0.6"):
        trainer_of(tmp_path, sparsity=0.6, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_a_small_model_is_pruned_like_any_other(tmp_path):
    trainer = trainer_of(tmp_path / "small")
    trainer.train()
    trainer.save_model()
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    sparse = make_trainer(tmp_path / "sparse", loaded, sparsity=0.75)
    sparse.train()
    sparse.save_model()
    config = json.loads((tmp_path / "sparse" / "config.json").read_text())
    assert config["pruning"]["pattern"] == "unstructured" and config["pruning"]["structure"]["removed"] > 0.4
