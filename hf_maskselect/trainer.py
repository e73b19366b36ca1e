"""`PruningTrainer`: a `Trainer` that prunes the model it fine-tunes. Overrides are short and call `super()`."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import HubStrategy

from .config import PruningConfig
from .distillation.distiller import make_distiller, teacher_only
from .fields.rules import SELECTION_LOSSES
from .masking.dtensors import reshard
from .masking.maskset import MaskSet
from .masking.scores import ScoreFn, criteria_with
from .masking.targets import prunable_weights
from .methods.base import Method
from .reporting.card import Scores
from .search.bench import TrialBench
from .search.search import MaskSearch
from .storage.models import own_names
from .storage.pack import pack
from .storage.state import PruningState
from .training.atomic_checkpoints import AtomicCheckpoints
from .training.check_inputs import check_inputs
from .training.checkpoints import baked, describe, forget_preparation, put_baked, to_save
from .training.checks import (
    check_arguments,
    check_engine,
    check_fsdp,
    check_later_levels,
    check_model,
    check_planned,
    check_proposals,
    check_rows,
    selection_metric,
)
from .training.held_out import RowSplit
from .training.hub import complete_card, with_tags
from .training.optimizers import check_rate, check_renewable
from .training.plan import plan_text
from .training.pushes import WholePushes
from .training.run import PruningRun, make_method, run_fields
from .training.sigterm import CheckpointTogether
from .training.structured import StructuredTraining
from .utils.processes import Processes
from .utils.swapped import overrides, swapped
from .utils.wrappers import plain_model


class PruningTrainer(StructuredTraining, AtomicCheckpoints, WholePushes, Trainer):
    """Fine-tune and prune in one `train()`. The model ends with exactly the requested share of zeros.

    Takes every argument of `Trainer`, and:

    Args:
        args ([`PruningConfig`], *optional*): what to prune, how, and how to choose.
        teacher (`PreTrainedModel` or path, *optional*): dense model to distil from; it is frozen.
        selection_dataset (`Dataset`, *optional*): the rows on which candidates (and each level's best weights) are
            scored. By default a seeded `selection_fraction` is held out of `train_dataset`. Never pass the data you
            report on.
        score_fn (`Callable`, *optional*): the mask-generation hook, `score_fn(name, weight, grad_stats) -> scores`. It
            gets the name of the parameter, its `(out, in)` weight, and its [`WeightStats`] (fields are None where no
            gradients are sampled). It returns finite scores of the same shape; larger means more important. It
            replaces the criterion of `"random"`, `"pdp"` and `"gumbel"`, and that of `"movement"` where one is given.

    Attributes:
        run ([`PruningRun`]): the plan, method and search of the current run.

    Raises:
        ValueError: arguments do not fit together. Most of this is checked here, before training starts.
    """

    args: PruningConfig
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    run: PruningRun
    _gradients_are_ready = False  # whether the method has changed those of this step

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: PruningConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class=None,
        *,
        teacher: PreTrainedModel | str | os.PathLike | None = None,
        selection_dataset: Dataset | None = None,
        score_fn: ScoreFn | None = None,
        **kwargs,
    ) -> None:
        args, model = PruningConfig() if args is None else args, plain_model(model)
        check_arguments(args, model, score_fn, kwargs.get("compute_metrics") or self._own_metrics)
        self._rows = RowSplit()
        train_dataset, self.selection_dataset = self._rows.split(args, train_dataset, selection_dataset)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        self._score_fn = score_fn
        check_engine(args, self, score_fn)
        check_model(args, self.model, self.find_weights(self.model))
        if self.optimizer is not None and args.resolved().searches and not args.resolved().scores_after_refit:
            check_renewable(self.optimizer, self.lr_scheduler)
        if not self.loss_is_scaled_for_ga:  # else a subclass counts the labels itself
            # BERT-family heads take **kwargs but ignore num_items_in_batch. Believing them would scale the loss by the
            # accumulation steps and by the ranks (transformers#47688).
            self.model_accepts_loss_kwargs = False
        self._criteria = criteria_with(score_fn)
        check_proposals(args, self._criteria)
        self._processes = Processes()
        self._begin(teacher)
        self.add_callback(_StepEvents(self))
        if args.enable_jit_checkpoint:
            replaced: Any = self.pop_callback(JITCheckpointCallback)
            self.add_callback(CheckpointTogether(replaced, self._processes))

    # -- setting up a run ---------------------------------------------------------------------------------------------

    def _begin(self, teacher: PreTrainedModel | str | os.PathLike | None) -> None:
        """Make what a run consists of, by the arguments as they are now."""
        args = self.args
        own = overrides(self, "distilled", StructuredTraining)
        self.distiller = None if teacher is None else make_distiller(teacher, self.model, args, own)
        self._was_distilled = False
        self._teacher_only = teacher_only(self.distiller, self.model)
        self.selection_metric = selection_metric(args, self.distiller)
        method = self.make_method()
        bench = TrialBench(self, method, self.selection_dataset)
        quiet = args.disable_tqdm or not self.is_world_process_zero()
        search = MaskSearch(bench, self._criteria, self._processes, quiet)
        self.run = PruningRun(args, method, bench, search, self._processes, self.log, self._say)

    def _hp_search_setup(self, trial) -> None:
        super()._hp_search_setup(trial)
        # `train` calls this before anything else that reads our arguments, which may have been set since the last run.
        if not any(isinstance(callback, _StepEvents) for callback in self.callback_handler.callbacks):
            self.add_callback(_StepEvents(self))  # the user has replaced them
        self._renew()
        if self.args.level_eval_steps or self.run.settings.searches:
            self.run.bench.identity.note_functions()
        check_inputs(self, self.run.bench)

    def _renew(self) -> None:
        """Make the parts of the run again if arguments or rows have changed since the last one."""
        args, rows = self.args, (self.train_dataset, self.selection_dataset)
        changed = self._take_model() or self.run.made_from != run_fields(args) or self._rows.changed(*rows)
        check_arguments(args, self.model, self._score_fn, self.compute_metrics or self._own_metrics)
        if not changed and self.model_init is None:
            return
        check_model(args, self.model, self.find_weights(self.model))
        check_fsdp(args, self, self._score_fn)
        check_later_levels(args)
        check_proposals(args, self._criteria)
        self.run.made_from = {}  # until a new run is made: what follows may raise
        if changed:
            self.train_dataset, self.selection_dataset = self._rows.split(args, *rows)
            self.run.method.restore_trained()
            self._forget_groups()
        teacher = self.teacher
        if self.distiller is not None:
            self.distiller.release()
        self._begin(teacher)

    def call_model_init(self, trial=None) -> nn.Module:
        """Make the model of a trial of a hyper-parameter search, without a wrapper that `model_init` put around it."""
        return plain_model(super().call_model_init(trial))

    @property
    def _own_metrics(self) -> Callable | None:
        """What a subclass computes metrics with beside `compute_metrics`, if anything."""
        own = (name for name in ("evaluate", "evaluation_loop") if overrides(self, name, PruningTrainer))
        return next((getattr(self, name) for name in own), None)

    def make_method(self) -> Method:
        """Make the method that keeps the masks in force. Override it to train under another one."""
        return make_method(self.args, self.find_weights, self.log)

    def find_weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The prunable weights of a model, by name."""
        settings = self.args.resolved()
        return prunable_weights(model, settings.target_modules, settings.exclude_modules)

    def _say(self, text: str) -> None:
        if self.is_world_process_zero():
            tqdm.write(text)

    def _prepare_for_training(self, max_steps: int, train_dataloader, resume_from_checkpoint: str | None):
        if resume_from_checkpoint is not None and self.is_fsdp_enabled:
            self.run.expect(resume_from_checkpoint)
        elif resume_from_checkpoint is not None and not self.run.resumed:  # a subclass has loaded the weights
            self.run.resume(resume_from_checkpoint, self.model)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._announce(own_schedule=self.lr_scheduler is not self._made_schedule)
        self.run.method.begin(self.run.plan, self.optimizer)
        self.run.resumed = False
        return prepared

    def _announce(self, own_schedule: bool) -> None:
        """Check what depends on the plan, and print it."""
        run, settings = self.run, self.run.settings
        check_rows(self.args, self.train_dataset, self.selection_dataset, draws=run.resumed or not run.at_target)
        rungs = run.open(self.state.global_step)
        if any(steps for level in rungs for _, steps in level):
            check_rate(self.peak_rate, self.optimizer)
            if self.given_optimizer is not None:
                check_renewable(self.given_optimizer, self.lr_scheduler if own_schedule else None)
        run.bench.batches.copy_collator()
        self.accelerator.wait_for_everyone()
        own = [self.given_optimizer, self.lr_scheduler if own_schedule else None]
        held_out = len(self.selection_dataset) if settings.needs_selection_split else 0
        peak = None if own_schedule else self.peak_rate
        self._say(plan_text(self.args, run.plan, rungs, peak, own, held_out, run.start))
        if settings.needs_selection_split and self.selection_metric not in SELECTION_LOSSES and not run.resumed:
            run.bench.score()  # a metric that fails must fail now, not when the first search begins

    # -- training ----------------------------------------------------------------------------------------------------

    def before_clipping(self) -> None:
        """Let the method change the gradients of a step, once. A subclass that clips by itself may call it first."""
        self.check_distilled()
        if not self._gradients_are_ready:
            self.run.method.before_clipping()
        self._gradients_are_ready = True

    def _clip_grad_norm(self, model):
        self.before_clipping()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        self.before_clipping()  # clipping may be off
        return super()._get_grad_norm(model, grad_norm)

    def _finalize_training(self, *args, **kwargs):
        self.accelerator.wait_for_everyone()
        self.run.finalize(self.state.global_step, self.model)
        self.run.warn_if_short(self.state.global_step)
        return super()._finalize_training(*args, **kwargs)

    def search_summary(self) -> dict[str, float]:
        """`search_*` totals of the run so far, in optimizer-step equivalents and seconds."""
        return self.run.summary()

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ):
        """Evaluate the exactly sparse model, and add its sparsity to the metrics."""
        prepares = not self.is_in_train and not self.accelerator._models
        with baked(self.run.method):
            options = prediction_loss_only, ignore_keys, metric_key_prefix
            output = super().evaluation_loop(dataloader, description, *options)
            reshard(self.model)
            settings = self.run.settings
            zeros = MaskSet.from_zeros(self.model, settings.target_modules, settings.exclude_modules)
        assert output.metrics is not None
        output.metrics[f"{metric_key_prefix}_sparsity"] = zeros.sparsity()
        if prepares:
            forget_preparation(self)
        return output

    def _evaluate(self, *args, **kwargs):
        with baked(self.run.method):  # `evaluate` of a subclass may not call `evaluation_loop`
            return super()._evaluate(*args, **kwargs)

    def _determine_best_metric(self, metrics, trial) -> bool:
        # The denser models of early levels score best and must not win.
        return self.run.at_target and super()._determine_best_metric(metrics, trial)

    # -- saving ------------------------------------------------------------------------------------------------------

    def pruning_state(self) -> PruningState:
        """The masks in force and where the run stands."""
        return self.run.state(self.model, self.state.global_step)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        run = self.run
        run.method.attach(self.model)
        state, extra = self._resumable(self.pruning_state()), run.method.state_dict()
        describe(self.model, state, run.settings)
        if self.is_fsdp_enabled:  # `state_dict` was gathered from the trained weights
            put_baked(run.method, state_dict)
        with self._whole(output_dir or self.args.output_dir or "") as folder:
            with baked(run.method), own_names(self.model):
                super()._save(folder, to_save(self.model, state_dict))
            if self.args.should_save:
                self._while_writing(folder, lambda: state.sealed(folder).save(folder, extra))
                if self._checkpointing:
                    run.write_to(folder)
                elif self.args.pack_on_save:
                    pack(folder, folder)

    def _write_checkpoint(self, model, trial, final: Path) -> None:
        own = any(overrides(self, name, PruningTrainer) for name in ("save_model", "_save"))
        hooks = {"save_model": functools.partial(self._save_by, self.save_model)} if own else {}
        with swapped(self, **hooks):
            super()._write_checkpoint(model, trial, final)

    def _save_by(self, save: Callable, folder: str, **kwargs) -> None:
        """Write the model of a checkpoint by a method of a subclass, which may leave out what a resumed run needs."""
        run = self.run
        state, extra = self.pruning_state(), run.method.state_dict()
        describe(self.model, state, run.settings)
        with baked(run.method), own_names(self.model):
            save(folder, **kwargs)
        if self.args.should_save and self._work is None:  # else `_save` of this class was called
            self._while_writing(folder, lambda: state.sealed(folder).save(folder, extra))
            run.write_to(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        with self._shape_of(resume_from_checkpoint):
            self.run.check_resumes(resume_from_checkpoint, self.model, self.find_weights(self.model))
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            self.run.resume(resume_from_checkpoint, self.model)

    def _load_best_model(self) -> None:
        folder = self.state.best_model_checkpoint or ""
        best = PruningState.load(folder)
        best.check_saved(folder)
        super()._load_best_model()
        self.run.method.set_masks(best.masks)

    # -- the Hub -----------------------------------------------------------------------------------------------------

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        *args,
        scores: Scores | None = None,
        dense_scores: Scores | None = None,
        **kwargs,
    ) -> None:
        """Write `README.md` for the saved model in `output_dir`: the metadata of [`Trainer`], and our text.

        Args:
            language: as in [`Trainer.create_model_card`], like the next five.
            license: of the model.
            tags: of the repository; ours follow.
            model_name: of the repository, if `hub_model_id` is not set.
            *args: further metadata.
            **kwargs: further metadata.
            scores: metric -> value, or a list with one value per seed. Default: the last evaluation.
            dense_scores: the same of the model before pruning.
        """
        tags = with_tags(tags, self.args)
        super().create_model_card(language, license, tags, model_name, *args, **kwargs)
        complete_card(self, self.args.output_dir, self.teacher, model_name, scores, dense_scores)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._checkpointing or not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self._finish_current_push()  # an upload in flight still reads the copy
        with self._pushing(checkpoint_folder) as copy:
            super().create_model_card(tags=with_tags(None, self.args))
            complete_card(self, copy, self.teacher)
            super()._push_from_checkpoint(copy)


class _StepEvents(TrainerCallback):
    """Follow every optimizer step of a trainer. It holds no state, so that a checkpoint needs none of it."""

    def __init__(self, trainer: PruningTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        check_planned(self._trainer, PruningTrainer, self._trainer.run.planned)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        run, step = self._trainer.run, state.global_step
        level = run.method.level_due(step)
        if level is not None:  # the only place where a level starts
            self._trainer._start_level(level, step)
        run.on_step_begin(step)

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._trainer.before_clipping()  # a subclass may clip in its own way

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._trainer._gradients_are_ready = False
        self._trainer.run.method.on_optimizer_step()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        scores = self._trainer.run.score_level(state.global_step, self._trainer.model)
        if scores:
            due = control.should_log
            self._trainer.log(scores)
            control.should_log = due  # `log` clears it, and the loss of this step would be lost
