"""`PruningRun`: the plan, the method and the search of one run, and where it stands."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME

from ..config import PruningConfig
from ..masking.dtensors import class_name, reshard
from ..masking.schedule import LevelPlan
from ..methods.base import Method
from ..methods.gumbel import Gumbel
from ..methods.hard import FindWeights, HardMethod
from ..methods.movement import Movement
from ..methods.pdp import Pdp
from ..methods.structured import Structured
from ..search.bench import TrialBench
from ..search.search import MaskSearch
from ..search.weight_files import LevelBest
from ..storage.runs import check_best, read_trainer_state
from ..storage.state import NO_TEACHER, PruningState, load_method_state
from ..utils.processes import Processes
from ..utils.seeds import key_seed
from .checks import check_start
from .resumption import check_function
from .structure import Structure

Log = Callable[[dict[str, float]], None]


def run_fields(config: PruningConfig) -> dict[str, object]:
    """The arguments on which the parts of a run and the held-out rows depend."""
    return {**config.pruning_fields(), "seed": config.seed, "output_dir": config.output_dir}


def make_method(config: PruningConfig, find_weights: FindWeights, log: Log) -> Method:
    """Make the pruning method that a configuration names.

    Args:
        config: the arguments of the run.
        find_weights: model -> its prunable weights by name.
        log: called with what is worth logging when a soft mask hardens.
    """
    settings = config.resolved()
    pattern, sparsity, keep_zeros = settings.pattern, settings.sparsity, config.keep_zeros
    scored, fits = settings.criterion != "magnitude", settings.fits_start
    if settings.gumbel is not None:

        def seed_of(step: int) -> int:
            return key_seed(config.seed, "gumbel", step)

        return Gumbel(
            find_weights, log, pattern, sparsity, settings.gumbel, seed_of, scored, settings.refits_cuts, keep_zeros
        )
    if settings.structure is not None:
        return Structured(find_weights)
    if settings.method == "pdp":
        tau, relative_tau = settings.pdp_taus
        return Pdp(find_weights, log, pattern, sparsity, tau, relative_tau, scored, fits, keep_zeros)
    if settings.method == "movement":
        rate, prior = config.movement_learning_rate, settings.movement_prior
        return Movement(find_weights, log, pattern, sparsity, rate, prior, scored, fits, keep_zeros)
    return HardMethod(find_weights, keep_zeros)


class PruningRun:
    """The plan, the method and the search of one run.

    It never calls the trainer: the trainer passes what a call needs.

    Args:
        config: the arguments of the run.
        method: keeps the masks in force.
        bench: scores the model on the held-out rows.
        search: chooses the masks of a level.
        processes: the processes of the run.
        log: records metrics.
        say: prints text, on one process.
    """

    plan: LevelPlan

    def __init__(
        self,
        config: PruningConfig,
        method: Method,
        bench: TrialBench,
        search: MaskSearch,
        processes: Processes,
        log: Log,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.settings = config, config.resolved()
        self.method, self.bench, self.search, self.processes = method, bench, search, processes
        self.made_from = run_fields(config)
        self._log, self._say = log, say
        self.level_best = LevelBest(config.output_dir or "") if config.level_eval_steps else None
        options = self.settings.structure
        self.structure = None if options is None else Structure(config, options, bench, processes)
        self.start = 0.0  # sparsity of the model that the run began with
        self.at_level = -1  # level of the checkpoint that a run resumes from
        self.resumed = False  # whether `start` comes from a checkpoint
        self.planned = False

    # -- the plan ----------------------------------------------------------------------------------------------------

    def make_plan(self, model: nn.Module, max_steps: int) -> None:
        """Plan a run of `max_steps` optimizer steps from the model as it is, or as its first checkpoint saw it.

        Raises:
            ValueError: the target cannot be reached, or the model's zeros do not allow it.
        """
        self.method.attach(model)  # FSDP has replaced the parameters by sharded ones
        masks = None if self.resumed or self.structure else self.method.fixed_masks
        if masks is not None:
            self.start = masks.sparsity()
        self.plan, self.planned = self.settings.plan(max_steps, self.start), True
        if masks is not None:
            check_start(self.config, masks, self.plan)

    def open(self, step: int) -> list[list[tuple[int, int]]]:
        """Clear what an earlier run left in the output folder, and connect the processes.

        Args:
            step: the optimizer steps that are done.

        Returns:
            (candidates, steps) of every rung, for each level.

        Raises:
            ValueError: a cut of the plan lies before `step`, but the checkpoint is without it.
        """
        self._check_cuts(step)
        if self.config.should_save:
            self.search.clean(new_run=step == 0)
            if self.level_best and step == 0:
                self.level_best.forget()
        rungs = [self.search.rungs(self.plan, level) for level in range(len(self.plan.levels))]
        # Between trials a rank waits for the slowest one: ddp_timeout for every hundred steps of a trial.
        longest = max((steps for level in rungs for _, steps in level), default=0)
        self.processes.open(self.config.ddp_timeout * max(1, -(-longest // 100)))
        return rungs

    def _check_cuts(self, step: int) -> None:
        """Raise a ValueError if the plan has a cut before `step` that was not made: nobody would make it any more."""
        level = self.plan.level_at(step - 1)
        if level < 0 or (self.at_level >= level if self.settings.soft else self.reached(level)):
            return
        raise ValueError(
            f"the checkpoint of step {step} has sparsity {self.method.masks.sparsity():.4f}, but in a run of "
            f"{self.plan.max_steps} steps to {self.settings.sparsity:g} in {len(self.plan.levels)} level(s) step "
            f"{step} comes after the cut to {self.plan.levels[level]:.4f}, which would be skipped: resume with the "
            "steps and levels of the checkpoint's run or with more steps, or start a new run from its model"
        )

    # -- levels ------------------------------------------------------------------------------------------------------

    def reached(self, level: int) -> bool:
        """Whether the masks in force are as sparse as `level`. An emergent sparsity is reached with any mask."""
        if self.structure is not None:
            return self.method.level >= level
        masks = self.method.masks
        if self.settings.emergent:
            return masks.kept < masks.total
        return masks.reaches(self.settings.pattern, self.plan.levels[level])

    @property
    def at_target(self) -> bool:
        """Whether the last level is reached."""
        return self.reached(len(self.plan.levels) - 1)

    def start_level(self, level: int, step: int, model: nn.Module) -> None:
        """Choose the masks of `level`, put them in force and refit what they keep; all ranks call it together.

        This is one act: where it fails or is interrupted, the run is as it was before. Then log the result and print
        the candidates.
        """
        with self.bench.sandbox.undone_on_error():
            self.method.prepare_level()
            if not self.settings.emergent and self.reached(level):  # the model was that sparse before
                return self.method.start_level(level, self.method.masks)
            if self.level_best and level > 0:
                self.restore_level_best(level - 1, model)
            masks, search = self.search.choose(level, self.plan, step)
            reshard(model)  # the next forward pass must see what is written next
            self.method.start_level(level, masks)
            if self.search.adopted is not None:
                self._consider(level, self.search.adopted, model)
        self.search.history.append(search)
        if self.processes.rank == 0:
            self.search.write()
        if self.settings.searches:
            title = f"Level {level + 1}: candidates for sparsity {search.sparsity:.4f} ({search.seconds:.0f} s)"
            self._say(f"{title}\n{search.table()}")
        self._log(search.metrics())

    def start_shape(self, level: int, model: PreTrainedModel) -> bool:
        """Give the model the smaller shape of `level`; all ranks call it together.

        Returns:
            whether the model has changed: it may have been small enough before.
        """
        assert self.structure is not None
        if self.level_best and level > 0:
            self.restore_level_best(level - 1, model)
        target = self.structure.target(level)
        candidates = self.settings.num_candidates
        self._say(f"Level {level + 1}: looking for a shape for {target} (num_candidates={candidates})")
        report = self.structure.shrink(model, level)
        self.method.attach(model)
        self.method.start_level(level, self.method.masks)
        if report is not None:
            self._say(f"Level {level + 1}: {target}\n{report}")
            self._log(report.metrics())
        return report is not None

    def score_level(self, step: int, model: nn.Module) -> dict[str, float]:
        """Score the model every `level_eval_steps` steps and at the end of a level, and keep the level's best weights.

        Returns:
            what to log; empty between the steps that are scored.
        """
        level = self.method.level
        if self.level_best is None or level < 0:
            return {}
        first, last = self.plan.span(level)
        if (step - first) % self.config.level_eval_steps and step != last:
            return {}
        score = self.processes.first(self.bench.score())
        return {"selection_score": score, "selection_best": float(self._consider(level, score, model))}

    def _consider(self, level: int, score: float, model: nn.Module) -> bool:
        """Keep the weights if they are the best of the level so far, on the process that saves; whether they are."""
        if not (self.level_best and self.config.should_save):
            return False
        masks, scoring = self.method.masks.digest(), self.bench.identity.of_scores()
        return self.level_best.consider(level, score, model, masks, scoring)

    def restore_level_best(self, level: int, model: nn.Module) -> None:
        """Load the best weights of `level`; all ranks call it together.

        Raises:
            RuntimeError: not every rank sees the file.
        """
        assert self.level_best is not None
        self.processes.gather(None)  # the file may still be written
        restored = self.processes.gather(self.level_best.restore(level, model, self.method.masks.digest()))
        if len(set(restored)) > 1:
            raise RuntimeError(
                f"rank {restored.index(False)} does not see the weights that rank {restored.index(True)} wrote to "
                f"{self.config.output_dir}: put it on storage that all machines share, or set save_on_each_node=True"
            )
        self.method.on_optimizer_step()  # keeps the pruned weights at zero

    def on_step_begin(self, step: int) -> None:
        """Prepare the weights for an optimizer step; all ranks call it together."""
        if self.method.soft_phase_due(step):
            with self.bench.sandbox.undone_on_error():
                errors = self.search.begin_soft_phase()
            if errors:
                self._log(errors)
        self.method.on_step_begin(step)

    # -- the end -----------------------------------------------------------------------------------------------------

    def finalize(self, step: int, model: nn.Module) -> None:
        """Leave the model plain and exactly sparse, with the best weights of the last level, or undo it all."""
        with self.bench.sandbox.undone_on_error():
            if self.level_best and self.method.level >= 0:
                self.restore_level_best(self.method.level, model)
            self.method.finalize()
        if self.level_best and self.method.level >= 0 and self.config.should_save:
            self.level_best.forget()
        if step >= self.plan.max_steps:
            self.search.forget()  # a run that was stopped may be resumed

    def warn_if_short(self, step: int) -> None:
        """Warn where training ended before the target. Soft masks are always cut to it.

        All ranks call it together, since sharded masks are gathered; rank 0 warns.
        """
        if self.settings.emergent or self.at_target:
            return
        reached = f"sparsity {self.method.masks.sparsity():.4f}" if self.structure is None else "an earlier shape"
        if self.processes.rank:
            return
        warnings.warn(
            f"training ended after {step} of {self.plan.max_steps} steps at {reached}, "
            f"before the last level with the target {self.plan.levels[-1]:g}: resume from a "
            "checkpoint (resume_from_checkpoint), or start a new run from this model",
            stacklevel=2,
        )

    def summary(self) -> dict[str, float]:
        """`search_*` totals of the run so far."""
        totals = self.search.summary(self.plan.max_steps if self.planned else 0)
        if self.structure is not None:
            totals["search_seconds"] += round(self.structure.seconds, 1)
        return totals

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state(self, model: nn.Module, step: int) -> PruningState:
        """The masks in force and where the run stands."""
        masks, settings = self.method.masks, self.settings
        return PruningState(
            masks,
            method=settings.method,
            pattern=self.config.pattern,
            sparsity=masks.sparsity() if settings.emergent else settings.sparsity,
            step=step,
            level=self.method.level,
            seed=self.config.seed,
            start=self.start,
            architecture=class_name(model),
            teacher=self.bench.identity.teacher or NO_TEACHER,
            criterion=self.search.criterion if settings.soft else "",
        )

    def write_to(self, checkpoint: str) -> None:
        """Put what a resumed run needs of the search into a checkpoint."""
        self.search.write(checkpoint)
        if self.level_best:
            self.level_best.copy_to(checkpoint)

    def check_resumes(self, checkpoint: str, model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        """Raise a ValueError unless this run, with these prunable weights, can go on from `checkpoint`."""
        state = PruningState.load(checkpoint)
        target = state.sparsity if self.settings.emergent else self.settings.sparsity
        state.check_resumes(self.settings.method, self.config.pattern, target, class_name(model))
        state.check_criterion(self.search.criterion if self.settings.soft else "")
        state.check_saved(checkpoint)
        trainer_state = read_trainer_state(Path(checkpoint) / TRAINER_STATE_NAME)
        state.check_step(trainer_state["global_step"], checkpoint)
        check_best(trainer_state, checkpoint, self.config.output_dir or "")
        state.masks.check_fits(weights)
        if state.teacher not in ("", self.bench.identity.teacher or NO_TEACHER):
            raise ValueError(
                f"the checkpoint {checkpoint} was written with another teacher, or with none: resume with the same, "
                "or start a new run from the checkpoint's model"
            )
        check_function(checkpoint, model)

    def expect(self, checkpoint: str) -> None:
        """Take the start of the run from a checkpoint that will be loaded after the plan is made, as FSDP does."""
        state = PruningState.load(checkpoint)
        self.start, self.at_level, self.resumed = state.start, state.level, True

    def resume(self, checkpoint: str, model: nn.Module) -> None:
        """Go on from a checkpoint whose weights the model has loaded."""
        state = PruningState.load(checkpoint)
        self.method.attach(model)
        self.method.load_state_dict(state.masks, load_method_state(checkpoint), state.step)
        self.start, self.at_level, self.resumed = state.start, state.level, True
        self.search.recall(state.step, checkpoint)
        if self.level_best:
            LevelBest(checkpoint).check_scoring(self.bench.identity.of_scores())
            if self.config.should_save:
                self.level_best.copy_from(checkpoint)
