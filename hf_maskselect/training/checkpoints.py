"""Checkpoints of a pruning run: its weights as a user gets them, and beside them what going on needs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..masking.dtensors import class_name, exchange, part, whole
from ..masking.targets import prunable_weights
from ..methods.base import Method
from ..search.level_best import LevelBest
from ..search.search import MaskSearch
from ..storage.models import own_names
from ..storage.pack import pack
from ..storage.state import PruningState, load_method_state
from .hub import HubTrainer

FORMAT_VERSION = 1  # of config.pruning


class PrunedCheckpoints(HubTrainer):
    """A `Trainer` that saves exactly sparse weights, with the masks, choices and place of the run, and goes on from
    them to the bit. What it saves is set by `PruningTrainer`."""

    _method: Method
    _search: MaskSearch
    _level_best: LevelBest | None
    _start: float  # sparsity of the model the run began with
    _resumed: bool  # whether that is known from a checkpoint

    def _find_weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return prunable_weights(model, self.args.target_modules, self.args.exclude_modules)

    @contextlib.contextmanager
    def _baked(self) -> Iterator[None]:
        """Inside, the model is what a user would get: exactly sparse, whatever the method trains on."""
        baked = self._method.baked_state_dict() or {}
        trained = {name: exchange(self._method.weights[name], part(tensor)) for name, tensor in baked.items()}
        try:
            yield
        finally:
            for name, tensor in trained.items():
                exchange(self._method.weights[name], tensor)

    def pruning_state(self) -> PruningState:
        """Masks in force and where the run stands."""
        args = self.args
        step, masks = self.state.global_step, self._method.masks
        sparsity = masks.sparsity() if args.emergent else args.sparsity
        return PruningState(
            masks,
            args.method,
            args.pattern,
            sparsity,
            step,
            self._method.level,
            args.seed,
            self._start,
            class_name(self.model),
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self._method.attach(self.model)
        state = self.pruning_state()
        if isinstance(self.model, PreTrainedModel):
            self.model.config.pruning = {
                "method": state.method,
                "pattern": state.pattern,
                "sparsity": state.sparsity,
                "achieved": state.masks.sparsity(),
                "version": FORMAT_VERSION,
            }
            modules = {"target_modules": self.args.target_modules, "exclude_modules": self.args.exclude_modules}
            self.model.config.pruning |= {name: value for name, value in modules.items() if value is not None}
        extra = self._method.state_dict()
        if self.is_fsdp_enabled:  # what it gathered are the trained weights
            baked = {name: whole(tensor) for name, tensor in (self._method.baked_state_dict() or {}).items()}
            state_dict |= {name: tensor.to(state_dict[name]) for name, tensor in baked.items() if name in state_dict}
        with self._whole(self.args.output_dir if output_dir is None else output_dir) as folder:
            with self._baked(), own_names(self.model):
                super()._save(folder, state_dict)
            if self.args.should_save:
                self._while_writing(folder, lambda: state.sealed(folder).save(folder, extra))
                if self._checkpointing:
                    self._search.write(folder)
                    if self._level_best:
                        self._level_best.copy_to(folder)
                if self.args.pack_on_save and not self._checkpointing:
                    pack(folder, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        state, extra = PruningState.load(resume_from_checkpoint), load_method_state(resume_from_checkpoint)
        args = self.args
        target = state.sparsity if args.emergent else args.sparsity
        state.check_resumes(args.method, args.pattern, target, class_name(self.model))
        state.check_saved(resume_from_checkpoint)
        told = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
        state.check_step(told.global_step, resume_from_checkpoint)
        state.masks.check_fits(self._find_weights(self.model))
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._method.attach(self.model)
        self._method.load_state_dict(state.masks, extra, state.step)
        self._start, self._resumed = state.start, True
        self._search.recall(state.step, resume_from_checkpoint)
        if self._level_best and self.args.should_save:
            self._level_best.copy_from(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = PruningState.load(self.state.best_model_checkpoint)
        best.check_saved(self.state.best_model_checkpoint)
        super()._load_best_model()
        self._method.set_masks(best.masks)
