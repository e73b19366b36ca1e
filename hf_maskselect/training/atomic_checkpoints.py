"""Folders that are saved whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..storage.packed_file import PACKED_FILE
from ..storage.runs import last_checkpoint
from ..utils.files import sync

_WEIGHTS = re.compile(
    rf"model(-\d{{5}}-of-\d{{5}})?\.safetensors|{re.escape(SAFE_WEIGHTS_INDEX_NAME)}|{re.escape(PACKED_FILE)}"
)
STAGING = "_saving"  # uploads to the Hub leave out what begins with an underscore


class WholeCheckpoints(Trainer):
    """A `Trainer` that may be killed at any time: a checkpoint is written aside by all ranks, brought to the disk and
    given its name in one rename, so that every `checkpoint-*` there is can be resumed from."""

    _checkpointing = False
    _second: ThreadPoolExecutor | None = None  # the thread beside a checkpoint's writing
    _beside: Future | None = None  # what it does

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"{self.args.output_dir} holds no whole checkpoint to resume from: start without "
                    "resume_from_checkpoint, or name the folder"
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step < self.state.max_steps:  # resumed after the last step, `Trainer` would add one
            super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._checkpointing else folder

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        written, final = folder / STAGING / name, folder / name
        if self.args.should_save:
            shutil.rmtree(folder / STAGING, ignore_errors=True)  # of a run that was killed
        self.accelerator.wait_for_everyone()
        self._checkpointing = True
        try:
            with ThreadPoolExecutor(1) as self._second:
                super()._save_checkpoint(model, trial)
            if self._beside is not None:
                self._beside.result()  # raises what it raised, and the folder gets no name
        finally:
            self._checkpointing, self._second, self._beside = False, None, None
        if self.state.best_global_step:  # `Trainer` looked for it where this one was written
            best = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best == final or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(written / TRAINER_STATE_NAME)
            sync_folder(written)
            if final.exists():  # saved at this step before, perhaps half-way by another hand
                shutil.rmtree(final)
            os.rename(written, final)
            sync(folder)
            shutil.rmtree(folder / STAGING)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(str(folder), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._checkpointing:  # else the folder has not got its name yet
            super()._push_from_checkpoint(checkpoint_folder)

    def _while_writing(self, folder: str, work: Callable[[], None]) -> None:
        """Do `work`, which is about the model just saved in `folder`: at once, or beside the writing of a checkpoint's
        optimizer, which is twice as large, and bring the weights to the disk there, too."""
        if self._second is None:
            work()
            return
        weights = [path for path in Path(folder).iterdir() if _WEIGHTS.fullmatch(path.name)]
        self._beside = self._second.submit(lambda: (work(), *map(sync, weights)))

    @contextmanager
    def _whole(self, folder: str) -> Iterator[str]:
        """Where to write a model meant for `folder`: aside, each file then takes its place in one rename. A checkpoint
        is aside already."""
        if self._checkpointing or not self.args.should_save:
            yield folder
            return
        final, written = Path(folder), Path(folder) / STAGING
        shutil.rmtree(written, ignore_errors=True)
        yield str(written)
        sync_folder(written)
        new = {file.name for file in written.iterdir()}
        for name in new:
            if (final / name).is_dir():  # a rename does not replace these
                shutil.rmtree(final / name)
            os.replace(written / name, final / name)
        for file in final.iterdir():
            if _WEIGHTS.fullmatch(file.name) and file.name not in new:  # of an earlier model
                file.unlink()
        written.rmdir()
        sync(final)


def sync_folder(folder: Path) -> None:
    """`sync` every file in a folder, and its names."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
