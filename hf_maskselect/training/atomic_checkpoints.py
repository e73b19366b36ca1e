"""Saved folders that are complete or not there at all."""

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..search.weight_files import LevelBest
from ..storage.derived import SECTIONS, of_weights, stays, weights_beside, write_section
from ..storage.runs import last_checkpoint, rotate
from ..storage.state import PruningState
from ..utils.files import sync
from ..utils.folders import STAGING, discarding, put, remove, replacing_folder
from .repeatable_batches import RepeatableBatches
from .resumption import check_complete, needed_files


class AtomicCheckpoints(RepeatableBatches):
    """A `Trainer` that may be killed at any time and leaves no half-written checkpoint.

    All ranks write a checkpoint into a staging folder. It is synced to disk and then renamed, so that a run can be
    resumed from every `checkpoint-*` folder that exists.
    """

    _checkpointing = False  # whether a checkpoint is being written
    _thread: ThreadPoolExecutor | None = None  # works while the optimizer state is written
    _work: Future | None = None  # the work of that thread

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Train, or resume; from the last checkpoint of `output_dir` if `resume_from_checkpoint` is True.

        Raises:
            ValueError: there is no such checkpoint, or it lacks a file that a resume needs.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir or "")
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"{self.args.output_dir} has no complete checkpoint to resume from: start without "
                    "resume_from_checkpoint, or name the folder"
                )
        if resume_from_checkpoint:
            check_complete(resume_from_checkpoint, self)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args, **kwargs) -> None:
        # `Trainer` would train one step more after a resume from the last step.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._checkpointing else folder

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        written, final = folder / STAGING / name, folder / name
        if self.args.should_save:
            remove(folder / STAGING)  # left by a run that was killed
        self.accelerator.wait_for_everyone()
        with discarding(final, folder / STAGING) if self.args.should_save else nullcontext():
            self._write_checkpoint(model, trial, final)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))
                put(written, final)  # there is an old one if an earlier run was saved at this step
                remove(folder / STAGING)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate(folder, self.args.save_total_limit, self.state.global_step, self.state.best_global_step)

    def _write_checkpoint(self, model, trial, final: Path) -> None:
        """Let `Trainer` write a checkpoint, that will be named `final`, into the staging folder."""
        self._checkpointing = True
        try:
            with ThreadPoolExecutor(1) as self._thread:
                super()._save_checkpoint(model, trial)
            if self._work is not None:
                self._work.result()  # raises the error of the thread, before the folder gets its name
        finally:
            self._checkpointing, self._thread, self._work = False, None, None
        if self.state.best_global_step:  # `Trainer` looked for it in the staging folder
            best = final.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if best == final or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        self.accelerator.wait_for_everyone()

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = self.state.best_global_step
        if self.args.should_save and self.args.save_total_limit == 1 and best:
            # `Trainer` would delete the others now, file by file.
            rotate(Path(self.state.best_model_checkpoint or "").parent, 1, best)

    def _resumable(self, state: PruningState) -> PruningState:
        """Return the state with the list of what a resume needs, inside a checkpoint."""
        if not self._checkpointing:
            return state
        args: Any = self.args
        best = LevelBest(args.output_dir or "") if args.level_eval_steps else None
        return replace(state, needs=needed_files(self, best))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._checkpointing:  # else the folder does not have its name yet
            super()._push_from_checkpoint(checkpoint_folder)

    def _while_writing(self, folder: str, work: Callable[[], None]) -> None:
        """Do `work` on the model that was just saved in `folder`, and sync its weights to disk.

        While a checkpoint is written this happens in a thread, beside the writing of the optimizer state, which is
        twice as large as the model.
        """
        if self._thread is None:
            work()
            return
        weights = [path for path in Path(folder).iterdir() if of_weights(path.name)]

        def both() -> None:
            work()
            for path in weights:
                sync(path)

        self._work = self._thread.submit(both)

    @contextmanager
    def _whole(self, folder: str) -> Iterator[str]:
        """Yield the folder to write a model into; on leaving, it takes the place of the model in `folder`.

        Inside a checkpoint it is `folder` itself, which is a staging folder already.
        """
        if self._checkpointing or not self.args.should_save:
            yield folder
            return
        saved = Path(folder)
        weights = functools.cache(lambda: weights_beside(written))
        with replacing_folder(saved, keeps=lambda name: stays(saved / name, weights)) as written:
            yield str(written)
            for file in SECTIONS:
                if not stays(saved / file, weights):
                    write_section(saved, written, file)
