"""A trainer whose model becomes smaller at the levels of its run."""

import contextlib
from collections.abc import Iterator
from typing import Any

from ..storage.configs import load_config
from ..storage.state import PruningState
from ..surgery.structured.adopt import reshape, undone_on_error
from ..surgery.structured.layer_shapes import LayerShapes
from ..surgery.structured.record import StructureRecord
from .checks import check_rows
from .distilled import Distilled
from .optimizers import plain
from .run_optimizers import RunOptimizers


class StructuredTraining(Distilled, RunOptimizers):
    """A `Trainer` that makes its model smaller before the optimizer is made, and at later levels.

    With any other pattern than `"structured"` it changes nothing.
    """

    selection_dataset: Any  # the held-out rows

    def _prepare_for_training(self, max_steps: int, *args, **kwargs):
        run = self.run
        if run.structure is not None:
            self._check_own_optimizer()
            check_rows(self.args, self.train_dataset, self.selection_dataset, draws=not run.resumed)
            run.make_plan(self.model, max_steps)
            if not run.resumed and run.plan.starts[0] == 0 and run.method.level < 0:
                self._start_level(0, 0)
        return super()._prepare_for_training(max_steps, *args, **kwargs)

    def _start_level(self, level: int, step: int) -> None:
        """Begin a level before optimizer step `step`; all ranks call it together."""
        if self.run.structure is None:
            self.run.start_level(level, step, self.model)
        elif self.run.start_shape(level, self.model):
            self._follow_shape()

    @contextlib.contextmanager
    def _shape_of(self, checkpoint: str) -> Iterator[None]:
        """Give the model the shape that it had in a checkpoint, whose weights are loaded inside, or undo it all."""
        if self.run.structure is None:
            yield
            return
        with undone_on_error(self.model):
            changed = self._take_shape_of(checkpoint)
            yield
            if changed:
                self._follow_shape()

    def _take_shape_of(self, checkpoint: str) -> bool:
        """Give the model the shape of a checkpoint; return whether it had another one.

        Raises:
            ValueError: the checkpoint was written with other levels.
        """
        structure = self.run.structure
        then = None if structure is None else StructureRecord.find(load_config(checkpoint))
        if structure is None or then is None:
            return False
        level = PruningState.load(checkpoint).level
        targets = [str(structure.target(number)) for number in range(len(self.run.settings.levels))]
        if level >= 0 and targets[level : level + 1] != [then.target]:
            raise ValueError(
                f"the checkpoint {checkpoint} was written with {then.target} at level {level + 1}, but this run has "
                f"{', '.join(targets)}: resume with the same target and levels, or start a new run from its model"
            )
        now = StructureRecord.find(self.model.config)
        if now is not None and now.shape == then.shape:
            return False
        shape = then.shape if now is None else then.shape.inside(now.shape)
        reshape(self.model, shape, LayerShapes.of(load_config(checkpoint)))
        then.write(self.model.config)
        return True

    def _follow_shape(self) -> None:
        """Let the teacher and the optimizer follow a model that has become smaller. The moments begin anew."""
        if self.distiller is not None:
            self.distiller.follow(self.model)
        optimizer = plain(self.optimizer)
        if optimizer is None:
            return
        for group, made in zip(optimizer.param_groups, self._fresh_optimizer().param_groups, strict=True):
            group["params"] = made["params"]
        optimizer.state.clear()

    def _check_own_optimizer(self) -> None:
        """Raise a ValueError if the user has passed an optimizer, which holds the parameters of the dense model."""
        optimizer = plain(self.optimizer)
        if optimizer not in (None, self._made_optimizer):
            raise ValueError(
                f"optimizers holds {type(optimizer).__name__} with the parameters of the dense model, which "
                f"pattern={self.args.pattern!r} replaces: pass optimizer_cls_and_kwargs=(class, its arguments) instead"
            )
