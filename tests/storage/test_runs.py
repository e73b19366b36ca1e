"""Checkpoints are found and deleted in the order of their steps."""

import os

import pytest
from tiny import make_trainer
from transformers import TrainerCallback

from hf_maskselect.storage.runs import checkpoints, rotate

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
