"""`PruningTrainer`: the overrides of `Trainer`, each short, each calling `super()`."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from .config import PruningConfig
from .distillation.distiller import make_distiller
from .fields.rules import SELECTION_LOSSES
from .masking.dtensors import reshard
from .masking.maskset import MaskSet
from .masking.schedule import LevelPlan
from .masking.scores import CRITERIA, Criterion, ScoreFn
from .masking.targets import transposed_weights
from .methods.base import Method
from .methods.gumbel import Gumbel
from .methods.hard import HardMethod
from .methods.pdp import Pdp
from .search.bench import TrialBench
from .search.journal import Journal
from .search.level_best import LevelBest
from .search.search import MaskSearch
from .storage.state import PruningState
from .training.checkpoints import PrunedCheckpoints
from .training.checks import (
    check_adapter,
    check_batches,
    check_metric,
    check_modules,
    check_packs,
    check_parameters,
    check_proposals,
    check_rows,
    check_score_fn,
    check_shapes,
    check_start,
)
from .training.engines import check_devices, check_engine
from .training.held_out import selection_rows
from .training.optimizers import check_renewable, first_rate, renewed
from .training.plan import plan_text, rewound_rate
from .training.sigterm import CheckpointTogether
from .training.used_fields import Used, check_used, run_fields, split_fields
from .utils.processes import Ranks
from .utils.seeds import key_seed


class PruningTrainer(PrunedCheckpoints):
    """Fine-tunes and prunes in one `train()`; the model comes out with exactly the asked-for share of zeros.

    Takes every argument of `Trainer`, and:

    Args:
        args ([`PruningConfig`], *optional*): what to prune, how, and how to choose.
        teacher (`PreTrainedModel` or path, *optional*): dense model to distil from; it is frozen.
        selection_dataset (`Dataset`, *optional*): what candidates (and each level's best weights) are chosen on. By
            default a seeded `selection_fraction` is held out of `train_dataset`. Never pass the data you report on.
        score_fn (`Callable`, *optional*): the mask-generation hook, `score_fn(name, weight, grad_stats) -> scores`:
            name of the parameter, its `(out, in)` weight, and its [`WeightStats`] (fields None with
            `criterion_batches=0`); returns finite scores of the same shape, larger = more important. It replaces the
            criterion of `method="random"`, and every scope, pattern and the search work on top of it.

    Raises:
        ValueError: something does not fit together (checked here, before training starts).
    """

    loss_is_scaled_for_ga: bool | None = None  # `Trainer` of the oldest transformers that are supported has none

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
        args = PruningConfig() if args is None else args
        if not isinstance(args, PruningConfig):
            raise ValueError(
                f"args must be a PruningConfig, got {type(args).__name__}: it takes every TrainingArguments field"
            )
        args.check_again()
        check_devices(args)
        check_packs(args, model)
        check_batches(args)
        check_score_fn(args, score_fn)
        check_metric(args, kwargs.get("compute_metrics"))
        self._split = split_fields(args, args.needs_selection_split and selection_dataset is None)
        train_dataset, selection_dataset = selection_rows(args, train_dataset, selection_dataset)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        check_engine(args, self, score_fn)
        check_adapter(self.model)
        check_modules(args, self.model)
        self._given_optimizer = self.optimizer
        if self._given_optimizer is not None and args.searches and not args.compares_fitted:
            check_renewable(self._given_optimizer, self.lr_scheduler)
        if not self.loss_is_scaled_for_ga:  # else a subclass counts the labels itself
            # BERT-family heads take **kwargs but ignore num_items_in_batch: believing them would scale the loss by the
            # accumulation steps and by the ranks (transformers#47688).
            self.model_accepts_loss_kwargs = False
        weights = self._find_weights(self.model)
        check_parameters(weights)
        check_shapes(args, weights, transposed_weights(self.model))
        own = "compute_loss_func" if self.compute_loss_func is not None else "loss_is_scaled_for_ga=True"
        if teacher is not None and (self.compute_loss_func is not None or self.loss_is_scaled_for_ga):
            raise ValueError(f"{own} and a teacher do not go together: its loss is scaled in another way")
        self.selection_dataset = selection_dataset
        self._criteria = (
            CRITERIA if score_fn is None else {**CRITERIA, "score_fn": Criterion(score_fn, ("square", "product"), 5.0)}
        )
        check_proposals(args, self._criteria)
        self._ranks = Ranks()
        self._assemble(teacher)
        self.add_callback(_StepEvents(self))
        if args.enable_jit_checkpoint:
            self.add_callback(CheckpointTogether(self.pop_callback(JITCheckpointCallback), self._ranks))

    # -- setting up --------------------------------------------------------------------------------------------------

    def _assemble(self, teacher: PreTrainedModel | str | os.PathLike | None) -> None:
        """Make what a run consists of, by the arguments as they are now."""
        args = self.args
        self._distiller = None if teacher is None else make_distiller(teacher, self.model, args)
        # A BERT teacher of a DistilBERT student: the pair's segment ids must reach the one and not the other.
        takes = set(inspect.signature(self.model.forward).parameters)
        wants = set() if self._distiller is None else set(self._distiller.teacher_arguments)
        self._teacher_only = {"token_type_ids"} & (wants - takes)
        self.selection_metric = self._metric()
        if self.selection_metric == "teacher" and not self._has_soft_labels:
            raise ValueError(
                "selection_metric='teacher' needs a teacher of a classification task and distill_logits > 0: "
                "choose 'loss'"
            )
        self._plan: LevelPlan | None = None
        self._start = 0.0  # sparsity of the model the run began with
        self._resumed = False  # whether that is known from a checkpoint
        self._method = self.make_method()
        self._bench = TrialBench(self, self._method, self.selection_dataset)
        told = Journal(args.output_dir), self._ranks, not self._speaks
        self._search = MaskSearch(args, self._bench, self._method, self._criteria, *told)
        self._level_best = LevelBest(args.output_dir) if args.level_eval_steps else None
        self._made_by = {**self._fields(), **self._split}

    @property
    def _has_soft_labels(self) -> bool:
        return self._distiller is not None and self.args.distill_logits > 0 and not self._distiller.is_regression

    def _metric(self) -> str:
        """What masks are chosen by."""
        return self.args.selection_metric or ("teacher" if self._has_soft_labels else "loss")

    def _fields(self) -> Used:
        return run_fields(self.args, self._distiller is not None, self._metric())

    def _hp_search_setup(self, trial) -> None:
        super()._hp_search_setup(trial)
        if self.model_init is not None:  # a run of another model, by what a hyper-parameter search has set for it
            self.args.check_again()
            check_metric(self.args, self.compute_metrics)
            if self._distiller is not None:
                self._distiller.release()
            self._assemble(self.teacher)

    def make_method(self) -> Method:
        """The method that keeps the masks in force; override it to train under another one."""
        args, pattern = self.args, self.args.mask_pattern
        if args.method == "pdp":
            return Pdp(self._find_weights, self.log, pattern, args.sparsity, args.pdp_tau, args.keep_zeros)
        if args.method == "gumbel":

            def seed_of(*keys: object) -> int:
                return key_seed(args.seed, "gumbel", *keys)

            options = args.gumbel_options
            return Gumbel(self._find_weights, self.log, pattern, args.sparsity, options, seed_of, args.keep_zeros)
        return HardMethod(self._find_weights, args.keep_zeros)

    @property
    def teacher(self) -> PreTrainedModel | None:
        """The frozen model that is distilled from."""
        return None if self._distiller is None else self._distiller.teacher

    @property
    def _speaks(self) -> bool:
        return self.is_world_process_zero() and not self.args.disable_tqdm

    def _say(self, text: str) -> None:
        if self.is_world_process_zero():
            tqdm.write(text)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._teacher_only and not self._teacher_only & set(self._signature_columns):
            self._signature_columns = [*self._signature_columns, *self._teacher_only]

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        self._method.attach(self.model)
        optimizer = super().create_optimizer(model)
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for group in self._method.parameter_groups():
            if not known & {id(parameter) for parameter in group["params"]}:
                optimizer.add_param_group(group)
        return optimizer

    @property
    def peak_rate(self) -> float:
        """Learning rate of the run before its schedule; of a given optimizer the first above 0."""
        made = self._given_optimizer is None and self.optimizer_cls_and_kwargs is None
        if made or self.optimizer is None:
            return self.args.learning_rate
        return first_rate(self.optimizer)

    def new_optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        """A fresh optimizer of the run's own class and parameter groups; the run's own is left alone."""
        if self._given_optimizer is not None:
            optimizer = renewed(self._given_optimizer)
        else:
            kept, self.optimizer = self.optimizer, None
            optimizer, self.optimizer = super().create_optimizer(), kept
        for group in optimizer.param_groups:
            group["lr"] *= learning_rate / self.peak_rate
        return optimizer

    def _prepare_for_training(self, max_steps: int, train_dataloader, resume_from_checkpoint: str | None):
        if resume_from_checkpoint is not None and self.is_fsdp_enabled:  # which loads after the plan is made
            self._start, self._resumed = PruningState.load(resume_from_checkpoint).start, True
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._method.begin(self._plan, self.optimizer)
        self._resumed = False
        return prepared

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        args = self.args
        args.check_again()  # it may have been changed after this trainer was made
        check_used(self._made_by, {**self._fields(), **split_fields(args, held_out=True)})
        check_batches(args)
        self._method.attach(self.model)  # FSDP has put other parameters in the place of those it found
        masks = None if self._resumed else self._method.masks
        self._start = self._start if masks is None else masks.sparsity()
        self._plan = args.plan(num_training_steps, self._start)
        if masks is not None:
            check_start(args, masks, self._plan)
        draws = masks is None or not self._reached(len(self._plan.levels) - 1)
        check_rows(args, self.train_dataset, self.selection_dataset, draws)
        if args.should_save:
            self._search.clean(anew=self.state.global_step == 0)
            if self._level_best and self.state.global_step == 0:
                self._level_best.forget()  # of an earlier run in the same folder
        rungs = [self._search.rungs(self._plan, level) for level in range(len(self._plan.levels))]
        given = [made for made in (self._given_optimizer, self.lr_scheduler) if made is not None]
        if self._given_optimizer is not None and any(steps for level in rungs for _, steps in level):
            check_renewable(self._given_optimizer, self.lr_scheduler)
        # Between trials a rank waits for the slowest: ddp_timeout for every hundred steps of one.
        longest = max((steps for level in rungs for _, steps in level), default=0)
        self._ranks.open(args.ddp_timeout * max(1, -(-longest // 100)))
        self.accelerator.wait_for_everyone()
        held_out = len(self.selection_dataset) if args.needs_selection_split else 0
        peak = None if self.lr_scheduler is not None else self.peak_rate
        self._say(plan_text(args, self._plan, rungs, peak, given, held_out, self._start))
        if args.needs_selection_split and self.selection_metric not in SELECTION_LOSSES and not self._resumed:
            self._bench.score()  # a metric that cannot be had is to be told now, not when the first search begins
        if self.lr_scheduler is None and args.lr_rewind:
            rate = rewound_rate(args, self._plan)
            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, rate)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # -- training ----------------------------------------------------------------------------------------------------

    def own_inputs(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those of the model, without what is for the teacher alone."""
        return {name: value for name, value in inputs.items() if name not in self._teacher_only}

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        own = self.own_inputs(inputs)
        if self._distiller is None or not model.training:
            return super().compute_loss(model, own, return_outputs, num_items_in_batch)
        asked = {**own, **self._distiller.student_kwargs}
        label_loss, outputs = super().compute_loss(model, asked, True, num_items_in_batch)
        with self.accelerator.autocast():
            loss = self._distiller.loss(inputs, outputs, label_loss)
        return (loss, outputs) if return_outputs else loss

    def soft_labels(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The teacher's logits on one batch."""
        with self.accelerator.autocast():
            return self._distiller.soft_labels(inputs)

    def selection_loss(self, inputs: dict[str, torch.Tensor], soft_labels: torch.Tensor | None) -> torch.Tensor:
        """What a trial is scored by on one batch, with the model in eval mode: mean over rows, lower is better.
        Without soft labels it is the label loss."""
        if soft_labels is None:
            items = self._get_num_items_in_batch([inputs], self.args.device)
            return self.compute_loss(self.model, inputs, num_items_in_batch=items)
        with self.accelerator.autocast():
            return self._distiller.disagreement(inputs, self.model(**self.own_inputs(inputs)), soft_labels)

    def _clip_grad_norm(self, model):
        self._method.before_clipping()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None:  # clipping is off
            self._method.before_clipping()
        return super()._get_grad_norm(model, grad_norm)

    def _choose_masks(self, level: int) -> MaskSet:
        reshard(self.model)
        if not self.args.emergent and self._reached(level):  # the model was that sparse before
            return self._method.masks
        if self._level_best and level > 0:
            self._restore_level_best(level - 1)
        chosen = self._search.choose(level, self._plan, self.state.global_step)
        reshard(self.model)  # what is written next must be seen by the next forward pass
        if self._level_best and self._search.adopted is not None and self.args.should_save:
            self._level_best.consider(level, self._search.adopted, self.model)
        if self.is_world_process_zero():
            self._search.write()
        done = self._search.history[-1]
        if self.args.searches:
            self._say(
                f"Level {level + 1}: candidates for sparsity {done.sparsity:.4f} ({done.seconds:.0f} "
                f"s)\n{done.table()}"
            )
        self.log(done.metrics())
        return chosen

    def _reached(self, level: int) -> bool:
        """Whether the masks in force are as sparse as `level`, in the pattern; an emergent sparsity is reached once
        masks are."""
        masks = self._method.masks
        if self.args.emergent:
            return masks.kept < masks.total
        return masks.reaches(self.args.mask_pattern, self._plan.levels[level])

    def _score_level(self) -> None:
        """Inside a level, at its marks and its end: keep the weights if the selection split likes them best."""
        level = self._method.level
        if self._level_best is None or level < 0:
            return
        first, last = self._plan.span(level)
        done = self.state.global_step - first
        if done % self.args.level_eval_steps == 0 or self.state.global_step == last:
            score = self._ranks.first(self._bench.score())
            best = self._level_best.consider(level, score, self.model) if self.args.should_save else False
            self.log({"selection_score": score, "selection_best": float(best)})

    def _restore_level_best(self, level: int) -> None:
        self.accelerator.wait_for_everyone()
        found = self._ranks.gather(self._level_best.restore(level, self.model))
        if len(set(found)) > 1:
            raise RuntimeError(
                f"rank {found.index(False)} does not see the weights that rank {found.index(True)} kept in "
                f"{self.args.output_dir}: put it on storage that all machines share, or set save_on_each_node=True"
            )
        self._method.on_optimizer_step()

    def _finalize_training(self, *args, **kwargs):
        if self._level_best and self._method.level >= 0:
            self._restore_level_best(self._method.level)
            if self.args.should_save:
                self._level_best.forget()
        self._method.finalize()
        self._warn_if_short()
        if self.state.global_step >= self.state.max_steps:
            self._search.forget()  # else it was stopped, and may go on
        return super()._finalize_training(*args, **kwargs)

    def _warn_if_short(self) -> None:
        """Hard masks stay at their level where a run is stopped; soft ones are cut to their target."""
        reached = self.args.emergent or self._reached(len(self._plan.levels) - 1)
        if not reached and self.is_world_process_zero():
            warnings.warn(
                f"training ended after {self.state.global_step} of {self._plan.max_steps} steps at sparsity "
                f"{self._method.masks.sparsity():.4f}, before the last level cut to the target "
                f"{self.args.sparsity:g}: resume from a checkpoint (resume_from_checkpoint), or start a new run from "
                "this model",
                stacklevel=2,
            )

    def search_summary(self) -> dict[str, float]:
        """`search_*` totals of the run so far, in optimizer-step equivalents and seconds."""
        return self._search.summary(self._plan.max_steps if self._plan else 0)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        prepares = not self.is_in_train and not self.accelerator._models
        with self._baked():
            output = super().evaluation_loop(
                dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
            reshard(self.model)
            sparsity = MaskSet.from_zeros(self.model, self.args.target_modules, self.args.exclude_modules).sparsity()
        output.metrics[f"{metric_key_prefix}_sparsity"] = sparsity
        if prepares:
            # An evaluation before training marks the raw model as prepared, and a later train() would run without DDP.
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model._is_accelerate_prepared = False
            self.model_wrapped = self.model
            self.accelerator.free_memory()
        return output

    def _card_options(self) -> dict[str, object]:
        options = super()._card_options()
        if self.teacher is not None:  # a name on the Hub is told, of a folder only its own name
            given = self.teacher.name_or_path
            options["teacher"] = Path(given).name if Path(given).is_dir() else given or type(self.teacher).__name__
        return options

    def _determine_best_metric(self, metrics, trial) -> bool:
        # Early, denser models score best and must not win.
        if not self._reached(len(self._plan.levels) - 1):
            return False
        return super()._determine_best_metric(metrics, trial)


class _StepEvents(TrainerCallback):
    """Tells the trainer's method of every optimizer step. Stateless: nothing of ours lives in callback state."""

    def __init__(self, trainer: PruningTrainer) -> None:
        self._trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        trainer, method = self._trainer, self._trainer._method
        level = method.level_due(state.global_step)
        if level is not None:  # masks change here and nowhere else
            method.prepare_level()
            method.start_level(level, trainer._choose_masks(level))
        method.on_step_begin(state.global_step)

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._trainer._method.on_optimizer_step()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        due = control.should_log
        self._trainer._score_level()
        control.should_log = due  # logging a score counts as this step's log, and its loss would be lost
