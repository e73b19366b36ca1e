"""Checkpoints are found and deleted in the order of their steps; what they say is checked, links lead nowhere."""

import json
import os
import shutil

import pytest
from tiny import make, make_trainer
from transformers import TrainerCallback

from hf_maskselect.storage.runs import checkpoints, rotate

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
AHEAD = 4_000_000_000.0  # seconds: a clock that was ahead when the files were written


class SetBack(TrainerCallback):
    """The clock goes back after each save."""

    def __init__(self):
        self.count = 0

    def on_save(self, args, state, control, **kwargs):
        for path in checkpoints(args.output_dir).values():
            os.utime(path, (AHEAD - self.count, AHEAD - self.count))
        self.count += 100


def steps(folder):
    return [*checkpoints(folder)]


@pytest.mark.parametrize("limit", [1, 2])
def test_a_clock_set_back_deletes_no_new_checkpoint(tmp_path, limit):
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": limit}
    make_trainer(tmp_path, **saving, keywords={"callbacks": [SetBack()]}).train()
    assert steps(tmp_path) == [10, 12][-limit:]


def make_folders(folder, found):
    for step in found:
        (folder / f"checkpoint-{step}").mkdir(parents=True)


@pytest.mark.parametrize(
    ("limit", "newest", "best", "left"),
    [
        (None, 12, None, [2, 4, 9, 12]),
        (0, 12, None, [2, 4, 9, 12]),
        (1, 12, None, [12]),
        (1, 12, 2, [2, 12]),
        (2, 12, 4, [4, 12]),
        (3, 12, 2, [2, 9, 12]),
        (2, 4, None, [2, 4]),  # the others are of an earlier, longer run
        (3, 4, None, [2, 4, 12]),
        (1, 4, 12, [4, 12]),
        (9, 12, None, [2, 4, 9, 12]),
    ],
)
def test_the_newest_and_the_best_stay(tmp_path, limit, newest, best, left):
    make_folders(tmp_path, [2, 4, 9, 12])
    rotate(tmp_path, limit, newest, best)
    assert steps(tmp_path) == left and len([*tmp_path.iterdir()]) == len(left)


def test_only_checkpoints_are_deleted(tmp_path):
    others = ["checkpoint-1-backup", "checkpoint-best", "checkpoint-", "checkpoint-\u0665", "my-checkpoint-1"]
    make_folders(tmp_path, [5, 10])
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-3").write_text("a file")
    rotate(tmp_path, 1, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["checkpoint-10", "checkpoint-3", *others])


def test_a_link_to_a_checkpoint_loses_its_name_only(tmp_path):
    kept = tmp_path / "elsewhere"
    kept.mkdir()
    (kept / "file").write_text("kept")
    make_folders(tmp_path / "out", [10])
    (tmp_path / "out" / "checkpoint-5").symlink_to(kept)
    rotate(tmp_path / "out", 1, 10)
    assert steps(tmp_path / "out") == [10] and (kept / "file").read_text() == "kept"


def test_a_deletion_that_was_killed_is_finished(tmp_path, monkeypatch):
    make_folders(tmp_path, [5, 10])
    (tmp_path / "checkpoint-5" / "weights").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *args, **kwargs: None)  # killed before the first file was deleted
        rotate(tmp_path, 1, 10)
    assert steps(tmp_path) == [10] and len([*tmp_path.iterdir()]) == 2
    rotate(tmp_path, 1, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def test_the_best_alone_is_left_after_training(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(
        tmp_path, **saving, save_total_limit=1, load_best_model_at_end=True, keywords={"callbacks": [SetBack()]}
    )
    trainer.train()
    assert steps(tmp_path) == [trainer.state.best_global_step]


WRONG = [
    {"more": 1},
    {"stateful_callbacks": [1]},
    {"stateful_callbacks": {"TrainerControl": 3}},
    {"train_batch_size": "x"},
    {"train_batch_size": None},
    {"best_metric": "x"},
    {"total_flos": {}},
    {"logging_steps": "x"},
    {"save_steps": None},
    {"global_step": 1 << 80},
    {"best_global_step": "x"},
]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """An output folder with a checkpoint of step 6. Do not change."""
    folder = tmp_path_factory.mktemp("stopped")
    make_trainer(folder, make(**SMALL), save_strategy="steps", save_steps=6, max_steps=6).train()
    return folder


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_run_does_not_resume_from_a_wrong_trainer_state(stopped, tmp_path, wrong):
    checkpoint = shutil.copytree(stopped / "checkpoint-6", tmp_path / "checkpoint-6")
    path = checkpoint / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **wrong}))
    with pytest.raises(ValueError, match=rf"trainer_state\.json.*{next(iter(wrong))}"):
        make_trainer(tmp_path, make(**SMALL)).train(str(checkpoint))


def test_a_run_neither_writes_nor_deletes_through_links(tmp_path):
    elsewhere, output = tmp_path / "elsewhere", tmp_path / "output"
    elsewhere.mkdir()
    output.mkdir()
    (elsewhere / "a.safetensors").write_text("x")
    for name in ("_survivors", "_saving", "_search-x"):
        (output / name).symlink_to(elsewhere)
    for name in ("README.md", "_search.json.tmp", "__level_best.safetensors.tmp"):
        (output / name).symlink_to(elsewhere / "a.safetensors")
    options = {"method": "random", "num_candidates": 3, "trial_steps": 1, "selection": "survivors"}
    trainer = make_trainer(output, make(**SMALL), save_strategy="steps", save_steps=6, **options)
    trainer.train()
    trainer.save_model()
    assert [path.name for path in elsewhere.iterdir()] == ["a.safetensors"]
    assert (elsewhere / "a.safetensors").read_text() == "x"
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-6"]
