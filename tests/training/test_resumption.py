"""A run goes on only from a checkpoint that is complete, with the same model, and before no cut that it skips."""

import json
import shutil
import warnings

import pytest
from tiny import METHODS, make, make_trainer, same, weights_of
from transformers import BertConfig, BertForSequenceClassification

from hf_maskselect import PruningState
from hf_maskselect.storage.runs import last_checkpoint

SAVED = {"save_strategy": "steps", "save_steps": 3, "level_eval_steps": 1}
NEEDED = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_batches_0.safetensors", "trainer_state.json"]
NEEDED += ["_level_best.safetensors"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with checkpoints, each with the best weights of its level."""
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), **SAVED)
    trainer.train()
    return trainer


@pytest.fixture
def folder(tmp_path, whole):
    """A copy of the run's output folder."""
    return shutil.copytree(whole.args.output_dir, tmp_path / "out")


def resume(folder, checkpoint=True, model=None, **changes):
    """Go on in `folder`; returns the trainer."""
    trainer = make_trainer(folder, make(seed=5) if model is None else model, **{**SAVED, **changes})
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


# -- what a resume needs ---------------------------------------------------------------------------------------------


def test_the_state_lists_what_a_resume_needs(folder):
    listed = json.loads(PruningState.load(folder / "checkpoint-6").needs)
    assert sorted(listed) == sorted(NEEDED)
    assert all((folder / "checkpoint-6" / name).is_file() for name in listed)


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_missing_is_named_and_no_earlier_checkpoint_is_taken(folder, name):
    (folder / "checkpoint-12" / name).unlink()
    trainer = make_trainer(folder, make(seed=5), **SAVED)
    before = weights_of(trainer.model)
    with pytest.raises(ValueError, match=f"checkpoint-12 lacks {name}, so a resumed run would differ"):
        trainer.train(resume_from_checkpoint=True)
    assert same(before, weights_of(trainer.model))


def test_a_checkpoint_without_a_pruning_state_is_not_passed_over(folder):
    (folder / "checkpoint-12" / "pruning_state.safetensors").unlink()
    with pytest.raises(ValueError, match="checkpoint-12 has no pruning_state.safetensors"):
        resume(folder)


def test_a_checkpoint_of_the_model_alone_is_refused(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 6, "save_only_model": True}
    make_trainer(tmp_path, **changes).train()
    with pytest.raises(ValueError, match=r"lacks .*optimizer.pt.*it was saved with save_only_model=True"):
        resume(tmp_path, level_eval_steps=0)


def test_a_saved_model_is_no_checkpoint(folder, whole):
    whole.save_model(folder / "model")
    with pytest.raises(ValueError, match=r"model lacks trainer_state.json, optimizer.pt, scheduler.pt, rng_state.pth"):
        resume(folder, str(folder / "model"))


def forget_list(checkpoint):
    """Make the state one of an earlier version, which lists nothing."""
    state = PruningState.load(checkpoint)
    fields = {name: value for name, value in state.fields.items() if name != "needs"}
    state.masks.save(checkpoint / "pruning_state.safetensors", fields)


def test_an_earlier_checkpoint_without_a_list_goes_on_where_it_is_complete(folder, whole):
    forget_list(folder / "checkpoint-9")
    assert same(weights_of(resume(folder, str(folder / "checkpoint-9")).model), weights_of(whole.model))
    (folder / "checkpoint-9" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="checkpoint-9 lacks optimizer.pt"):
        resume(folder, str(folder / "checkpoint-9"))


def test_another_number_of_processes_is_warned_of(folder):
    (folder / "checkpoint-9" / "rng_state.pth").rename(folder / "checkpoint-9" / "rng_state_0.pth")
    forget_list(folder / "checkpoint-9")
    with pytest.warns(UserWarning, match="has no rng_state.pth, because another number of processes wrote it"):
        resume(folder, str(folder / "checkpoint-9"))


def test_the_best_weights_of_another_checkpoint_are_refused(folder):
    """Checkpoints 3 and 6 belong to different levels, 6 and 9 to one."""
    for other in (3, 9):
        shutil.copy(folder / f"checkpoint-{other}" / "_level_best.safetensors", folder / "checkpoint-6")
        with pytest.raises(ValueError, match="_level_best.safetensors is not the file that the checkpoint was saved"):
            resume(folder, str(folder / "checkpoint-6"))


def test_a_folder_that_is_no_checkpoint_is_passed_over(folder):
    (folder / "checkpoint-99").mkdir()
    assert last_checkpoint(folder) == str(folder / "checkpoint-12")


# -- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("hidden_act", "relu"),
        ("num_attention_heads", 4),
        ("layer_norm_eps", 1e-5),
        ("hidden_dropout_prob", 0.1),
        ("is_decoder", True),
        ("pad_token_id", 1),
    ],
)
def test_a_model_of_another_function_is_refused(folder, entry, value):
    then = getattr(make().config, entry)
    message = f"checkpoint-6 was written with {entry}={then!r} in the model's configuration but this run has {value!r}"
    with pytest.raises(ValueError, match=message):
        resume(folder, str(folder / "checkpoint-6"), make(seed=5, **{entry: value}))


def test_what_does_not_change_the_function_is_no_other_model(folder, whole):
    model = make(seed=5, use_cache=False, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    model.config.name_or_path, model.config.mine = "elsewhere", {"note": 1}
    model.config._attn_implementation = "eager" if model.config._attn_implementation == "eager" else "sdpa"
    resumed = resume(folder, str(folder / "checkpoint-6"), model)
    assert same(weights_of(resumed.model), weights_of(whole.model))


def test_a_default_that_an_earlier_version_did_not_write_is_no_difference(folder, whole):
    """A configuration class that has one more entry than the file."""

    class LaterConfig(BertConfig):
        later: int = 3

    model = BertForSequenceClassification(LaterConfig(**make().config.to_dict()))
    assert same(weights_of(resume(folder, str(folder / "checkpoint-6"), model).model), weights_of(whole.model))


# -- cuts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 5},
        {"max_steps": 3},
        {"num_levels": 1},
        {"levels": [0.7, 0.75], "num_levels": None, "max_steps": 6},
    ],
    ids=str,
)
def test_a_run_that_would_skip_a_cut_is_refused(folder, changes):
    """Checkpoint 3 has the first of two levels, .656."""
    with pytest.raises(ValueError, match=r"checkpoint of step 3 has sparsity 0.656.*which would be skipped: resume"):
        resume(folder, str(folder / "checkpoint-3"), **changes)


@pytest.mark.parametrize("changes", [{"max_steps": 24}, {"num_levels": 3}, {"max_steps": 10}], ids=str)
def test_another_length_or_level_count_reaches_the_target_where_it_can(folder, changes):
    resumed = resume(folder, str(folder / "checkpoint-3"), **changes)
    assert resumed.pruning_state().masks.sparsity() == 0.75


@pytest.mark.parametrize("method", METHODS[2:], ids=lambda method: method["method"])
def test_a_soft_run_that_would_skip_its_cut_is_refused(tmp_path, method):
    changes = {**method, "save_strategy": "steps", "save_steps": 6}
    make_trainer(tmp_path, **changes).train()
    for steps in (6, 8):
        with pytest.raises(ValueError, match=r"checkpoint of step 6 .*which would be skipped"):
            make_trainer(tmp_path, **changes, max_steps=steps).train(str(tmp_path / "checkpoint-6"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        longer = make_trainer(tmp_path, **changes, max_steps=14)
        longer.train(str(tmp_path / "checkpoint-6"))
    assert longer.pruning_state().masks.sparsity() == 0.75


def test_a_best_checkpoint_of_another_run_is_refused(folder, tmp_path):
    copied = shutil.copytree(folder / "checkpoint-6", tmp_path / "copied" / "checkpoint-6")
    other = shutil.copytree(folder / "checkpoint-6", tmp_path / "other" / "checkpoint-6")
    state = json.loads((other / "trainer_state.json").read_text())
    state["log_history"][0]["epoch"] += 0.1
    (other / "trainer_state.json").write_text(json.dumps(state))
    stateless = shutil.copytree(folder / "checkpoint-6", tmp_path / "stateless" / "checkpoint-6")
    (stateless / "trainer_state.json").unlink()
    known = [(folder / "checkpoint-6", False), (copied, False), (tmp_path / "gone", False)]
    for best, refused in (*known, (other, True), (stateless, True)):
        path = folder / "checkpoint-12" / "trainer_state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "best_model_checkpoint": str(best)}))
        if refused:
            with pytest.raises(ValueError, match="names the best checkpoint .* not of this run"):
                resume(folder)
        else:
            resume(folder)
