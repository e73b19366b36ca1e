"""What is uploaded to the Hub is a copy that no later save changes."""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..storage.derived import of_weights
from ..storage.state import PruningState
from ..utils.folders import discarding, remove

UPLOADED = "_uploaded"  # in `output_dir`: what is being uploaded
_MODEL = "model"
_NEVER_CHANGED = (".safetensors", ".pt", ".pth")  # files that are replaced, but not written again


class WholePushes(Trainer):
    """A `Trainer` that uploads a copy of its output. Large files have a second name there and are not copied."""

    _uploads_output = False  # whether `output_dir` is about to be uploaded

    def push_to_hub(self, *args, **kwargs):
        """Save the model and upload it, as [`Trainer.push_to_hub`] does."""
        output, self._uploads_output = self.args.output_dir, True
        try:
            upload = super().push_to_hub(*args, **kwargs)
        finally:
            self.args.output_dir, self._uploads_output = output, False
        if not isinstance(upload, Future):
            self._finish_current_push()
        return upload

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        output = Path(self.args.output_dir or "")
        if self.is_world_process_zero():
            remove(output / UPLOADED)
            if self._uploads_output:  # `Trainer` does that next
                _copy_output(output)
                self.args.output_dir = str(output / UPLOADED / _MODEL)

    @contextmanager
    def _pushing(self, checkpoint: str) -> Iterator[str]:
        """Yield a copy of a checkpoint; inside, `output_dir` is a copy of the output for the checkpoint's model."""
        args: Any = self.args
        output, folder = Path(args.output_dir), Path(checkpoint)
        copy = output / UPLOADED / folder.name
        try:
            with discarding(output, output / UPLOADED):
                _copy_output(output, without_weights=True)
                shutil.copytree(folder, copy, copy_function=_second_name)
                PruningState.load(copy).save(output / UPLOADED / _MODEL)  # without what only a resumed run needs
                args.output_dir = _Aside(output / UPLOADED / _MODEL, output)
                yield str(copy)
        finally:
            args.output_dir = str(output)


class _Aside(str):
    """A path that is pickled as another: `Trainer` uploads its arguments too."""

    _pickled: str

    def __new__(cls, path: Path, pickled: Path):
        self = super().__new__(cls, path)
        self._pickled = str(pickled)
        return self

    def __reduce__(self):
        return str, (self._pickled,)


def _copy_output(output: Path, without_weights: bool = False) -> None:
    """Copy what `Trainer` uploads of an output folder."""

    def left_out(folder: str, names: list[str]) -> list[str]:
        if Path(folder) != output:
            return []
        kept_here = ("_", f"{PREFIX_CHECKPOINT_DIR}-")
        return [name for name in names if name.startswith(kept_here) or (without_weights and of_weights(name))]

    target = output / UPLOADED / _MODEL
    shutil.copytree(output, target, ignore=left_out, copy_function=_second_name, ignore_dangling_symlinks=True)


def _second_name(source: str, target: str) -> None:
    """Link a file that never changes, and copy others."""
    if source.endswith(_NEVER_CHANGED):
        try:
            os.link(source, target)
            return
        except OSError:  # the disk has no links
            pass
    shutil.copy2(source, target)
