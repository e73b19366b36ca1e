"""An upload reads a copy that no later save changes, and leaves the output folder alone."""

from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from tiny import make_trainer

from hf_maskselect import load_pruned
from hf_maskselect.storage.runs import last_checkpoint


class Hub:
    """Takes uploads; each waits until `finish` is called."""

    def __init__(self):
        self.folders, self.uploads = [], []

    def upload_folder(self, folder_path, run_as_future=False, **options):
        assert Path(folder_path, "config.json").exists()
        self.folders.append(Path(folder_path))
        upload = Future()
        self.uploads.append(upload)
        return upload if run_as_future else "done"

    def finish(self):
        for upload in self.uploads:
            if not upload.done():
                upload.set_result("done")


def content(folder):
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def visible(folder):
    return {name: data for name, data in content(folder).items() if not name.startswith("_")}


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    return hub


@pytest.fixture
def trainer(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=4, hub_strategy="checkpoint")
    trainer.train()
    trainer.save_model()
    trainer.hub_model_id = "someone/model"
    trainer.push_in_progress = None
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "log").write_text("first")
    return trainer


def change(trainer):
    with torch.no_grad():
        trainer.model.classifier.bias += 1


def test_a_push_at_a_save_leaves_the_output_and_is_left_alone(tmp_path, hub, trainer):
    before = visible(tmp_path)
    trainer._push_from_checkpoint(last_checkpoint(tmp_path))
    assert visible(tmp_path) == before and trainer.args.output_dir == str(tmp_path)
    model, checkpoint = hub.folders
    uploaded = content(model), content(checkpoint)
    change(trainer)
    trainer.save_model()
    trainer._save_checkpoint(trainer.model, None)
    with open(tmp_path / "runs" / "log", "a") as log:
        log.write(", second")
    assert (content(model), content(checkpoint)) == uploaded
    load_pruned(model)
    assert {"runs/log", "README.md", "config.json"} <= uploaded[0].keys()
    assert torch.load(model / "training_args.bin", weights_only=False).output_dir == str(tmp_path)
    hub.finish()
    trainer._finish_current_push()
    assert not model.exists() and not [path for path in tmp_path.iterdir() if path.name.startswith("_")]


def test_a_push_that_nobody_waits_for_is_left_alone(tmp_path, hub, trainer):
    upload = trainer.push_to_hub(blocking=False)
    (model,) = hub.folders
    uploaded = content(model)
    assert trainer.args.output_dir == str(tmp_path) and not upload.done()
    change(trainer)
    trainer.save_model()
    assert content(model) == uploaded and visible(tmp_path) != visible(model)
    load_pruned(model)


def test_a_push_that_is_waited_for_leaves_no_copy(tmp_path, hub, trainer):
    assert trainer.push_to_hub() == "done"
    assert not hub.folders[0].exists() and trainer.args.output_dir == str(tmp_path)


def test_a_push_that_fails_leaves_the_arguments(tmp_path, monkeypatch, hub, trainer):
    def fail(**options):
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "upload_folder", fail)
    before = visible(tmp_path)
    with pytest.raises(ConnectionError):
        trainer._push_from_checkpoint(last_checkpoint(tmp_path))
    assert trainer.args.output_dir == str(tmp_path) and visible(tmp_path) == before
    with pytest.raises(ConnectionError):
        trainer.push_to_hub()
    assert trainer.args.output_dir == str(tmp_path)
    load_pruned(tmp_path)
